"""Rounds: every turn has its cohort. `overlap` lets a client go on while its last updates are still in the air.

With staleness s a client may start turn t once the server has version t - s: for s = 0 this is the synchronous round of
McMahan et al. 2017; for s = 1 with blocks it is ParaBlock, whose client computes round t while round t - 1 travels.

    seconds a round with compute C, download D, upload U:
        sync                              C + D + U
        overlap(s), link both ways        max(C, D, U, (C + D + U) / (s + 1))
        overlap(s), one way at a time     max(C, D + U)                          (the paper's clock; s >= 1)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from hocket.methods import Update
from hocket.schedules.base import PLAIN, Schedule, schedule

if TYPE_CHECKING:
    from hocket.server import Server

ATTEMPTS = 5  # how often one client is asked for one turn before it is given up


@schedule("sync")
@dataclass(frozen=True, config=PLAIN)
class Sync(Schedule):
    """Every turn waits for its cohort, up to a deadline."""

    cohort: int | float = Field(
        default=1.0,
        gt=0,
        description="clients a turn: a whole number, or a share of those online (1.0 = all; 0.2 = a fifth)",
    )
    minimum: int = Field(
        default=1, ge=1, description="arrivals needed to step when the rest of the cohort is lost or late"
    )
    over_selection: float = Field(
        default=1.0, ge=1, description="ask this many times the cohort; step at the first `cohort`"
    )
    deadline: float | None = Field(
        default=None, gt=0, description="seconds after which a job counts as lost; none: wait"
    )

    @model_validator(mode="after")
    def _share(self) -> Sync:
        if isinstance(self.cohort, float) and self.cohort > 1:
            raise ValueError(f"cohort: {self.cohort} is no share of the clients; write a whole number, or at most 1.0")
        return self

    @property
    def patience(self) -> float | None:
        return self.deadline

    def wants(self, server: Server) -> list[tuple[int, int]]:
        pairs = []
        prelude = server.method.prelude  # what training turns depend on must have been heard of before they start
        end = prelude if server.version < prelude else min(server.version + self.ahead + 1, server.turns)
        for turn in range(server.version, end):
            if turn not in server.rounds:
                pairs += [(c, turn) for c in self._open(server, turn)]
            else:
                pairs += [(c, turn) for c in self._replace(server, turn)]
        return pairs

    def _open(self, server: Server, turn: int) -> list[int]:
        online = sorted(server.online)
        goal = self.cohort if isinstance(self.cohort, int) else math.ceil(self.cohort * len(online) - 1e-9)
        if len(online) < self.minimum:
            return []  # a turn that could never have enough waits for others to join
        goal = min(goal, len(online))
        chosen = self._choose(server, turn, online, goal)
        if chosen:
            server.rounds[turn] = {"goal": goal, "asked": {}, "open": 0, "arrived": 0}
        return chosen

    def _choose(self, server: Server, turn: int, online: list[int], goal: int) -> list[int]:
        """The turn's cohort. Who is still busy with a turn that is over is asked only if the goal needs it, the longest
        busy last, so that a slow client never gathers a queue."""
        busy: dict[int, int] = {}
        for job in server.outstanding.values():
            if job.turn < server.version:
                busy[job.client] = min(job.turn, busy.get(job.client, job.turn))
        order = server.sample(online, len(online), "cohort", turn)
        free = [c for c in order if c not in busy][: math.ceil(goal * self.over_selection - 1e-9)]
        return free + sorted((c for c in order if c in busy), key=lambda c: -busy[c])[: max(0, goal - len(free))]

    def _replace(self, server: Server, turn: int) -> list[int]:
        """Others for those lost, only as many as the minimum needs; the least asked first."""
        r = server.rounds[turn]
        short = min(self.minimum, r["goal"]) - r["open"] - r["arrived"]
        if short <= 0:
            return []
        busy = {j.client for j in server.outstanding.values() if j.turn == turn} | server.arrived(turn)
        left = [c for c in sorted(server.online) if c not in busy and r["asked"].get(c, 0) < ATTEMPTS]
        tries = sum(r["asked"].values())
        shuffled = server.sample(left, len(left), "replace", turn, tries)
        return sorted(shuffled, key=lambda c: r["asked"].get(c, 0))[:short]

    def ready(self, server: Server) -> bool:
        r = server.rounds.get(server.version)
        if r is None:
            return False
        return r["arrived"] >= r["goal"] or (not r["open"] and r["arrived"] >= min(self.minimum, r["goal"]))

    def late(self, server: Server, update: Update) -> str | None:
        return f"turn {update.turn} is over" if update.turn < server.version else None


@schedule("overlap")
@dataclass(frozen=True, config=PLAIN)
class Overlap(Sync):
    """Rounds whose communication hides behind the next `staleness` rounds' computation."""

    staleness: int = Field(default=1, ge=0, description="turns a client may be ahead of the server; 0 is `sync`")

    @property
    def ahead(self) -> int:
        return self.staleness
