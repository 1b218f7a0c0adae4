"""What the engine knows of jobs that are out, and of the ways to the sites that have them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hocket.deploy.nouns import Ask, Request
from hocket.methods import Job


@dataclass
class Out:
    """A job that a site was asked for.

    Attributes:
        asked: second of asking; sent: when its message left, if it did.
        bytes: of its download.
        abandoned: the server does not wait for it any more.
    """

    job: Job
    asked: float
    bytes: int
    sent: float | None = None
    abandoned: bool = False


@dataclass
class Way:
    """The way to one site: jobs that it was not sent yet, jobs whose updates have not come, and the message that is
    open."""

    waiting: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    forget: list[int] = field(default_factory=list)
    request: Request | None = None
    tries: int = 0
    hold: float = 0.0  # second before which a message that brings no job is not worth sending
    took: float = 0.0  # seconds that its last job took to compute
    left: float = 0.0  # second at which its last message left
    renewed: int = 0  # times that its jobs were made whole since an update came

    def message(
        self, number: int, client: int, outs: Mapping[int, Out], outbox: Path, largest: int, now: float, more: int
    ) -> Request | None:
        """The next message to the site, which is open from now on; None if none is worth sending now.

        Args:
            more: how many further jobs the site can get before the oldest one's update is here. If there are any, the
                message does not wait for the update: it would be in the way of the next job.
        """
        if self.request is not None or not (self.waiting or (self.sent and now >= self.hold)):
            return None
        asks = tuple(Ask(outs[j].job, outbox / f"{j}.hkt") for j in self.waiting)
        for a in asks:
            outs[a.job.id].sent = now
        self.sent, self.waiting = self.sent + self.waiting, []
        forget, self.forget = tuple(self.forget), []
        self.tries, self.left = 0, now
        self.request = Request(number, client, asks, self.sent[0], forget, largest, not (asks and more > 0))
        return self.request

    def taken(self, request: int) -> None:
        """The site has the jobs of a message that did not wait."""
        if self.request is not None and self.request.id == request:
            self.request, self.hold = None, self.left + self.took


def uses(out: Out, told: Mapping[str, Any], size: int, now: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a job used of its site's lanes, for the ledger. Clocks of sites are not ours: its own seconds are taken from
    the whole, and the rest is shared between the two directions by their bytes.

    Args:
        told: see `Answered`.
        size: bytes of the upload.
        now: second at which it was here.
    """
    began = out.asked if out.sent is None else out.sent
    waited, computed, kept = (max(0.0, float(told.get(k, 0.0))) for k in ("waited", "computed", "kept"))
    travel = max(0.0, now - began - waited - computed - kept)
    down = travel * out.bytes / max(1, out.bytes + size)
    start = min(now, began + down + waited)
    end = min(now, start + computed)
    job = out.job
    row: dict[str, Any] = {"client": job.client, "job": job.id, "turn": job.turn, "version": job.version}
    metrics = {k: v for k, v in sorted(told.get("metrics", {}).items()) if k in ("loss", "steps", "skipped")}
    yield "down", row | {"start": began, "end": began + down, "bytes": out.bytes}
    yield "compute", row | {"start": start, "end": end, "bytes": 0} | metrics
    more = {"raw": told.get("raw") or None, "beside": told.get("beside") or None, "after": told.get("after")}
    yield "up", row | {"start": min(now, end + kept), "end": now, "bytes": size} | more


def due(way: Way, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Note about when to ask a site for its next update, given what the last one used: once that is computed, less a
    way. A message that left at once would be open until then, and a job asked for meanwhile could not be brought."""
    travel = sum(rows[k]["end"] - rows[k]["start"] for k in ("down", "up"))
    way.took = float(rows["compute"]["end"] - rows["compute"]["start"])
    way.hold = float(rows["compute"]["end"] + way.took - travel / 2)


def fingerprint(packet: Path) -> str:
    """16 hex digits of an upload's bytes."""
    with packet.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def same(told: Mapping[str, Any], job: Job) -> bool:
    """Whether what was told is of this job, not of one that had its id before a server went back to a checkpoint."""
    return all(told.get(k) == getattr(job, k) for k in ("client", "version", "turn", "visit"))
