"""When clients start, when the server steps, what a late update counts: functions of the server's plain bookkeeping."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from hocket.registry import Registry

if TYPE_CHECKING:
    from hocket.methods import Update
    from hocket.server import Server

PLAIN = ConfigDict(extra="forbid")

schedule: Registry[Schedule] = Registry("schedule", "hocket.schedules")


@dataclass(frozen=True, config=PLAIN)
class Schedule:
    """A frozen value like a method; whatever it must remember is in the server's `rounds`, hence in the checkpoint."""

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

    def wants(self, server: Server) -> list[tuple[int, int]]:
        """The (client, turn) pairs to start now."""
        raise TypeError(f"{type(self).__name__} must define wants()")

    def ready(self, server: Server) -> bool:
        """Whether the server should step with what `takes` gives."""
        raise TypeError(f"{type(self).__name__} must define ready()")

    def takes(self, server: Server) -> list[Update]:
        """The buffered updates of this step, in the order of their jobs."""
        return sorted((u for u in server.buffer if u.turn <= server.version), key=lambda u: u.job)

    def accepts(self, server: Server, turn: int) -> bool:
        """Whether an update meant for `turn` is still of use."""
        return True

    def discount(self, staleness: int) -> float:
        """Factor on the weight of an update that started `staleness` versions ago."""
        return 1.0
