"""When a run's model is evaluated: at versions, or at regular seconds; always at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hocket.ledger import Ledger
from hocket.server import Server
from hocket.tree import Tree


@dataclass
class Evaluations:
    """What is measured of the server's model, and when.

    Attributes:
        measure: metrics of the exported view, or None for never.
        measure_last: more metrics, of the last evaluation.
        end: virtual second at which the run ends if its turns did not; it is evaluated then in any case.
        every: versions of training between evaluations.
        seconds: virtual seconds between evaluations; given, it replaces `every`.
        due: the version that is now in force is still to be evaluated.
        mark: the next evaluation by time is at `mark * seconds`.
    """

    measure: Callable[[Tree], dict[str, Any]] | None
    server: Server
    ledger: Ledger
    every: int = 1
    seconds: float | None = None
    measure_last: Callable[[Tree], dict[str, Any]] | None = None
    end: float | None = None
    due: bool = False
    mark: int = 1
    _seen: tuple[int, dict[str, Any]] | None = None  # what was measured last: a model that did not move is not again

    def stepped(self) -> None:
        """There is a new version."""
        turn = self.server.version - self.server.method.prelude
        regular = self.seconds is None and turn > 0 and turn % self.every == 0
        self.due = regular or self.server.finished

    def settle(self, now: float) -> None:
        """Evaluate what is due, before the next step."""
        if self.due:
            self._record(now, last=self.server.finished)
        self.due = False

    def until(self, at: float) -> float | None:
        """Evaluate at all marks up to second `at`, before what happens then; where the run ends before that, if so."""
        end = float("inf") if self.end is None else self.end
        while self.seconds and (mark := self.mark * self.seconds) <= at and mark < end:
            self._record(mark)
            self.mark += 1
        if at <= end:
            return None
        self._record(end, last=True)
        return end

    def _record(self, at: float, last: bool = False) -> None:
        if self.measure is not None:
            params, version = self.server.method.export(self.server.state), self.server.version
            if self._seen is None or self._seen[0] != version:
                self._seen = version, self.measure(params)
            result = dict(self._seen[1])
            if last and self.measure_last is not None:
                result |= self.measure_last(params)
            self.ledger.add("eval", t=at, version=version, **result)

    def state_dict(self) -> dict[str, Any]:
        """What is due and when."""
        return {"due": self.due, "mark": self.mark}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.due, self.mark = saved["due"], saved["mark"]
