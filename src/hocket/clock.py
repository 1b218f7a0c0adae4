"""Virtual time: an event heap, three serial lanes a client, devices and their links.

Time is computed from the plan (bytes / bandwidth + latency + what each message costs, steps x seconds a step), never
from this machine's clock. Units: seconds, and megabytes a second with 1 MB = 10^6 bytes.
"""

from __future__ import annotations

import heapq
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Lane = Literal["down", "compute", "up", "link"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Device:
    """One client's machine and link."""

    step_seconds: float = Field(default=1.0, ge=0, description="seconds for one local step")
    down_mb_s: float = Field(default=10.0, gt=0, description="download bandwidth, megabytes (10^6 bytes) a second")
    up_mb_s: float = Field(default=10.0, gt=0, description="upload bandwidth, megabytes (10^6 bytes) a second")
    gflops: float = Field(
        default=20.0, gt=0, description="10^9 operations a second at which it encodes packets (factorizations)"
    )
    latency: float = Field(
        default=0.0, ge=0, description="seconds before a sent packet arrives, each way, beside its bytes"
    )
    message_seconds: float = Field(
        default=0.0, ge=0,
        description="seconds for which each message takes up its link, both ways, beside its bytes: an engine's own",
    )  # fmt: skip
    duplex: bool = Field(default=True, description="down and up at the same time; false: one at a time on one link")
    loss: float = Field(default=0.0, ge=0, le=1, description="probability that a job is lost on this client")
    detect: float = Field(default=0.0, ge=0, description="seconds until the server learns that a job was lost")
    online: Annotated[
        tuple[tuple[float, float], ...],
        Field(description="when the client can be reached, as [from, to) in seconds; empty: always"),
    ] = ()
    period: Annotated[
        float | None, Field(gt=0, description="seconds after which `online` repeats; none: it does not")
    ] = None
    memory_gb: Annotated[float | None, Field(gt=0, description="memory of the machine, for the plan's warning")] = None

    rank: Annotated[
        int | None, Field(ge=1, description="adapter rank it can afford, for methods of unequal ranks; none: all of it")
    ] = None

    def __post_init__(self) -> None:
        last = 0.0
        for start, end in self.online:
            if not last <= start < end:
                raise ValueError(f"online: window [{start}, {end}) is empty or overlaps the one before")
            last = end
        if self.period is not None and (not self.online or self.period < last):
            raise ValueError(f"period: {self.period} s does not hold the windows of `online`, which end at {last} s")

    def down_seconds(self, size: int) -> float:
        """Seconds that a message of `size` bytes to this client takes up its link."""
        return self.message_seconds + size / (self.down_mb_s * 1e6)

    def up_seconds(self, size: int) -> float:
        """Seconds that a message of `size` bytes from this client does."""
        return self.message_seconds + size / (self.up_mb_s * 1e6)

    def next_change(self, now: float) -> tuple[float, bool] | None:
        """When this client next joins (True) or leaves (False) strictly after `now`; None if never again."""
        if not self.online:
            return None
        # boundaries are compared as they are made, never taken modulo the period: rounding would lose some
        lap = int(now // self.period) if self.period else 0
        for k in (lap - 1, lap, lap + 1, lap + 2) if self.period else (0,):
            base = k * (self.period or 0.0)
            for i, (start, end) in enumerate(self.online):
                first, last = i == 0, i == len(self.online) - 1
                wraps = self.period is not None and self.online[-1][1] == self.period and self.online[0][0] == 0.0
                joins = not (first and wraps) and (first or self.online[i - 1][1] != start)
                leaves = not (last and wraps) and (last or self.online[i + 1][0] != end)
                for at, joining, real in ((base + start, True, joins), (base + end, False, leaves)):
                    if real and at > now:
                        return at, joining
        return None

    def reachable(self, at: float) -> bool:
        """Whether the client is online at second `at`."""
        at = at % self.period if self.period else at
        return not self.online or any(start <= at < end for start, end in self.online)


class Clock:
    """Now, what happens next, and when each client's lanes are free. Ties go in the order of scheduling."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, str, int]] = []
        self._count = 0
        self._free: dict[tuple[int, str], float] = {}

    def schedule(self, at: float, kind: str, key: int) -> None:
        """Let event `kind` of job or client `key` happen at second `at`."""
        heapq.heappush(self._heap, (at, self._count, kind, key))
        self._count += 1

    def __bool__(self) -> bool:
        return bool(self._heap)

    def peek(self) -> float:
        """When the next event happens."""
        return self._heap[0][0]

    def pop(self) -> tuple[str, int]:
        """Move to the next event; its kind and key."""
        self.now, _, kind, key = heapq.heappop(self._heap)
        return kind, key

    def unpop(self, kind: str, key: int) -> None:
        """Put the event just popped back in front, as if it had not been popped."""
        heapq.heappush(self._heap, (self.now, -1, kind, key))

    def occupy(self, client: int, lane: Lane, at: float, seconds: float) -> tuple[float, float]:
        """Use a lane for `seconds` as soon as it is free after `at`; when that starts and ends."""
        start = max(at, self._free.get((client, lane), 0.0))
        self._free[client, lane] = start + seconds
        return start, start + seconds

    def vacate(self, client: int, lane: Lane, at: float) -> None:
        """The lane's last use ends at `at` after all."""
        self._free[client, lane] = at

    def release(self, client: int) -> None:
        """Nothing of this client goes on any more; its lanes are free now."""
        for lane in ("down", "compute", "up", "link"):
            self._free.pop((client, lane), None)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        free = [[client, lane, at] for (client, lane), at in sorted(self._free.items())]
        return {"now": self.now, "count": self._count, "heap": [list(e) for e in sorted(self._heap)], "free": free}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become the clock that `state_dict` described."""
        self.now, self._count = saved["now"], saved["count"]
        self._heap = [tuple(e) for e in saved["heap"]]
        self._free = {(client, lane): at for client, lane, at in saved["free"]}
