"""When clients start, when the server steps, what a late update counts: functions of the server's plain bookkeeping."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from hocket.methods import Method, Update
from hocket.registry import Registry

if TYPE_CHECKING:
    from hocket.server import Server

PLAIN = ConfigDict(extra="forbid")

schedule: Registry[Schedule] = Registry("schedule", "hocket.schedules")


class Term(NamedTuple):
    """One addend of a server step, theta <- theta + eta sum_i weight_i x_i / sum_i share_i over those with a tensor."""

    update: Update
    weight: float
    share: float


@dataclass(frozen=True, config=PLAIN)
class Schedule:
    """A frozen value like a method; whatever it must remember is in the server's `rounds`, `kept` and `notes`, hence in
    the checkpoint."""

    name: ClassVar[str] = ""

    @property
    def ahead(self) -> int:
        """How many turns a client may start before it has heard of its own last one; more than 0 needs an additive
        method, since the client then starts from the server's version plus its own updates in flight."""
        return 0

    @property
    def patience(self) -> float | None:
        """Seconds after which the server stops waiting for a job; None for never."""
        return None

    @property
    def anchored(self) -> bool:
        """Whether the server needs the versions that clients started from."""
        return False

    @property
    def composes(self) -> bool:
        """Whether a step adds differences that the server makes of updates and versions, not the updates alone."""
        return self.anchored

    @property
    def recalls(self) -> bool:
        """Whether a step mixes in models long past: the start model, or what a client had when it was last heard."""
        return False

    @property
    def carries(self) -> bool:
        """Whether clients send what changed since their last update that counts, instead of the update."""
        return False

    def adapt(self, method: Method) -> Method:
        """The method as this schedule runs it."""
        return method

    def refuses(self, method: Method) -> str | None:
        """Why this method cannot run under this schedule, or None."""
        if self.ahead and not method.additive:
            return (
                f"schedule '{self.name}' with staleness {self.ahead} starts clients from the server's version plus "
                f"their own updates in flight, which needs an additive step; {method.not_additive}"
            )
        if self.composes and not method.whole:
            return (
                f"schedule '{self.name}' needs the versions clients started from; '{method.name}' sends parts of them"
            )
        if self.recalls and not method.steady:
            return (
                f"schedule '{self.name}' mixes in the start model, of which '{method.name}' trains other tensors from "
                f"the middle of the run on; use 'sync', 'fedbuff' or 'fedasync'"
            )
        return None

    def at(self, server: Server) -> Schedule:
        """The schedule in force: turns of a method's prelude may want another."""
        return self

    def wants(self, server: Server) -> list[tuple[int, int]]:
        """The (client, turn) pairs to start now."""
        raise TypeError(f"{type(self).__name__} must define wants()")

    def ready(self, server: Server) -> bool:
        """Whether the server should step with what `takes` gives."""
        raise TypeError(f"{type(self).__name__} must define ready()")

    def takes(self, server: Server) -> list[Update]:
        """The buffered updates of this step, in the order of their jobs."""
        return sorted((u for u in server.buffer if u.turn <= server.version), key=lambda u: u.job)

    def terms(self, server: Server, batch: list[Update]) -> list[Term]:
        """What the step adds up, given what it takes."""
        return [Term(u, u.weight * self.discount(server.version - u.version), u.weight) for u in batch]

    def rate(self, server: Server, batch: list[Update]) -> float:
        """Factor on the method's server rate in this step."""
        return 1.0

    def remember(self, server: Server, batch: list[Update]) -> list[Update]:
        """The updates to keep once the step is done; it may write into `server.notes`."""
        return []

    def pins(self, server: Server) -> set[int]:
        """Versions to keep beside those that jobs and updates started from."""
        return set()

    def late(self, server: Server, update: Update) -> str | None:
        """Why an update comes too late to be of use, or None."""
        return None

    def discount(self, staleness: int) -> float:
        """Factor on the weight of an update that started `staleness` versions ago."""
        return 1.0
