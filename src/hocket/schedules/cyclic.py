"""Turns go round: one client, or a few, at a time; everybody else idles. The schedule of FedCyBGD
(https://arxiv.org/abs/2406.11187). A cycle of N clients takes N (C + D + U) seconds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.schedules.base import PLAIN, schedule
from hocket.schedules.sync import Sync

if TYPE_CHECKING:
    from hocket.server import Server


@schedule("cyclic")
@dataclass(frozen=True, config=PLAIN)
class Cyclic(Sync):
    """Turn t belongs to the next clients in a fixed round; their updates are averaged."""

    cohort: int = Field(default=1, ge=1, description="clients a turn (FedCyBGD's aggregated mode: several)")

    def _choose(self, server: Server, turn: int, online: list[int], goal: int) -> list[int]:
        first = turn * self.cohort % len(server.clients)
        order = [*range(first, len(server.clients)), *range(first)]
        return [c for c in order if c in server.online][: math.ceil(goal * self.over_selection - 1e-9)]
