"""SAFA: rounds close at a quota of arrivals, over everybody's last model; who is not too late goes on undisturbed.

Wu et al., "SAFA: A Semi-Asynchronous Protocol for Fast Federated Learning With Low Overhead", IEEE Transactions on
Computers 2021, https://arxiv.org/abs/1910.01355 (equations from its code's page).

    w*_i: client i's cached model (the start model before it is heard)
    a round closes at C N arrivals:   theta <- sum_i n_i w*_i / sum_i n_i   over *all* clients' caches
    up to date (heard in this round):  starts the next round from the new theta
    tolerable (at work, at most tau rounds behind):  goes on; its result is taken when it comes
    deprecated (further behind):  its cache becomes theta, its late result is refused, and it starts anew

What arrives beyond the quota in the closing instant enters the cache after the aggregation. A deprecated client here
finishes its useless job before it hears of it. n_i as in `ca2fl`.
Bytes an arrival: the method's. Server memory: N packets and the versions they started from.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import Lazy
from hocket.methods import Update
from hocket.schedules.asynchronous import Async
from hocket.schedules.base import PLAIN, Term, schedule

if TYPE_CHECKING:
    from hocket.server import Server


@schedule("safa")
@dataclass(frozen=True, config=PLAIN)
class SAFA(Async):
    """Rounds that close at a quota; the model is the mean of everybody's last one."""

    quota: float = Field(default=0.5, gt=0, le=1, description="share C of the clients whose arrival closes a round")
    max_staleness: int | None = Field(default=5, ge=1, description="rounds tau a client at work may be behind")

    @property
    def anchored(self) -> bool:
        return True

    def ready(self, server: Server) -> bool:
        return len(server.buffer) >= math.ceil(self.quota * len(server.clients) - 1e-9)

    def resting(self, server: Server) -> set[int]:
        return {u.client for u in server.buffer}  # they wait for the round to close

    def terms(self, server: Server, batch: list[Update]) -> list[Term]:
        """One term: from the model to the mean of the caches, tensor by tensor."""
        drafted = batch[: math.ceil(self.quota * len(server.clients) - 1e-9)]
        caches = {u.client: u for u in [*server.kept, *drafted]}
        trees = {c: server.method.effect(u.payload) for c, u in caches.items()}
        usual = sum(u.weight for u in caches.values()) / len(caches)
        synced = self._synced(server)

        def direction(name: str) -> Tensor:
            out: Tensor | None = None
            total = 0.0
            for c in sorted(server.clients):
                u = caches.get(c)
                x = server.difference([name], synced[c] if u is None else u.version)[name]
                x = x.add_(trees[c][name]) if c in trees and name in trees[c] else x
                w = usual if u is None else u.weight
                out, total = x.mul_(w) if out is None else out.add_(x, alpha=w), total + w
            assert out is not None  # there are clients
            return out.div_(total)

        moved = (k for k in server.changed if server.state["params"][k].is_floating_point())
        names = dict.fromkeys([*moved, *(k for tree in trees.values() for k in tree)])
        return [Term(replace(batch[-1], client=-1, payload=Lazy(names, direction)), 1.0, 1.0)]

    def remember(self, server: Server, batch: list[Update]) -> list[Update]:
        """Everybody's newest result; deprecated clients have the new model instead."""
        bound = self.max_staleness or server.version
        gone = {j.client for j in server.outstanding.values() if server.version - j.version > bound}
        synced = server.notes.get("synced", {}) | dict.fromkeys(sorted(gone), server.version)
        newest = {u.client: u for u in [*server.kept, *batch] if u.client not in gone}
        server.notes = {"synced": {c: v for c, v in synced.items() if c not in newest}}
        return sorted(newest.values(), key=lambda u: u.job)

    def pins(self, server: Server) -> set[int]:
        heard = {u.client for u in server.kept}
        return {v for c, v in self._synced(server).items() if c not in heard}

    def _synced(self, server: Server) -> dict[int, int]:
        """The version that stands in each client's cache where no result does."""
        return dict.fromkeys(server.clients, server.method.prelude) | server.notes.get("synced", {})
