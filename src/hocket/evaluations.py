"""When a run's model is evaluated: at versions, or at regular seconds; always at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hocket.ledger import Ledger
from hocket.server import Server
from hocket.tree import Tree


@dataclass
class Evaluations:
    """What is measured of the server's model, and when.

    Attributes:
        measure: metrics of the exported view, or None for never.
        measure_clients: metrics of the models of single clients, given a function from a client to its view; more of
            the last evaluation, and all that counts of a method that leaves each client a model of its own.
        memory: a client's private tensors as they are now.
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
    measure_clients: Callable[[Callable[[int], Tree]], dict[str, Any]] | None = None
    memory: Callable[[int], Mapping[str, Tensor]] = lambda client: {}
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
        if self.measure is None:
            return
        method, version = self.server.method, self.server.version
        params = method.export(self.server.state)
        own = lambda client: method.personalized(params, self.memory(client))  # noqa: E731
        result: dict[str, Any] = {}
        if not method.personal:
            if self._seen is None or self._seen[0] != version:
                self._seen = version, self.measure(params)
            result |= self._seen[1]
        if self.measure_clients is not None and (last or method.personal):
            result |= self.measure_clients(own)
        self.ledger.add("eval", t=at, version=version, **result)

    def state_dict(self) -> dict[str, Any]:
        """What is due and when."""
        return {"due": self.due, "mark": self.mark}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.due, self.mark = saved["due"], saved["mark"]
