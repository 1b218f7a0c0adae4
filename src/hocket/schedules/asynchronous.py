"""What servers that wait for nobody have in common: a client that has reported is asked again at once.

Everything that arrives in one instant is heard before anybody is asked again: otherwise equal speeds would be the
synchronous round only once, and one version stale ever after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods import Update
from hocket.schedules.base import PLAIN, Schedule
from hocket.schedules.sync import Sync

if TYPE_CHECKING:
    from hocket.server import Server

SILENCE = 20  # failures in a row, beside five a client, after which nobody is asked any more


@dataclass(frozen=True, config=PLAIN)
class Async(Schedule):
    """Whoever is idle is asked, up to a concurrency; staleness is what it comes to."""

    concurrency: int | None = Field(
        default=None, ge=1, description="clients at work at the same time; none: all that are online"
    )
    selection: Literal["random", "fair"] = Field(
        default="random", description="who of the idle is asked: anybody, or those asked least (random among equals)"
    )
    max_staleness: int | None = Field(
        default=None, ge=0, description="versions an update may be behind; staler ones are refused; none: any"
    )
    deadline: float | None = Field(
        default=None, gt=0, description="seconds a job may take (its largest age); then it counts as lost; none: any"
    )

    @property
    def patience(self) -> float | None:
        return self.deadline

    def at(self, server: Server) -> Schedule:
        # what a method must know before it trains, it hears from everybody
        return Sync(deadline=self.deadline) if server.version < server.method.prelude else self

    def wants(self, server: Server) -> list[tuple[int, int]]:
        if server.silence > SILENCE + 5 * len(server.clients):
            return []  # nobody gets through: better an error than to ask for ever
        room = (self.concurrency or len(server.clients)) - len(server.at_work)
        if room <= 0:
            return []
        idle = sorted(server.online - server.at_work.keys() - server.overdue.keys() - self.resting(server))
        order = server.sample(idle, len(idle), "idle", server.next_id)
        if self.selection == "fair":
            order.sort(key=lambda c: server.visits.get(c, 0))
        return [(c, server.version) for c in order[:room]]

    def resting(self, server: Server) -> set[int]:
        """Clients that are not asked for now."""
        return set()

    def late(self, server: Server, update: Update) -> str | None:
        stale = server.version - update.version
        if self.max_staleness is not None and stale > self.max_staleness:
            return f"it started {stale} versions ago; schedule.max_staleness is {self.max_staleness}"
        return None

    def takes(self, server: Server) -> list[Update]:
        return sorted(server.buffer, key=lambda u: u.job)


@dataclass(frozen=True, config=PLAIN)
class Fading(Async):
    """Stale updates count less: s(tau) is 1; (1 + tau)^-a; or 1 up to b and then 1 / (a (tau - b) + 1).
    Xie et al. 2019, arXiv 1903.03934."""

    fading: Literal["constant", "polynomial", "hinge"] = Field(
        default="polynomial", description="how an update's weight falls with staleness"
    )
    a: float = Field(default=0.5, ge=0, description="exponent (polynomial) or slope (hinge; FedAsync's code: 10)")
    b: float = Field(default=4.0, ge=0, description="staleness at which the hinge begins")

    def discount(self, staleness: int) -> float:
        if self.fading == "polynomial":
            return float((1 + staleness) ** -self.a)
        late = 0 if self.fading == "constant" else max(0, staleness - self.b)
        return 1 / (self.a * late + 1)


def newest(server: Server, updates: list[Update]) -> list[Update]:
    """Those of `updates`, oldest first, that are their client's last for one of the tensors they move."""
    last = {(u.client, k): u.job for u in updates for k in server.method.effect(u.payload)}
    jobs = set(last.values())
    return [u for u in updates if u.job in jobs]
