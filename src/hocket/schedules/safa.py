"""SAFA: rounds close at a quota of arrivals, over everybody's last model; who is not too late goes on undisturbed.

Wu et al., "SAFA: A Semi-Asynchronous Protocol for Fast Federated Learning With Low Overhead", IEEE Transactions on
Computers 2021, https://arxiv.org/abs/1910.01355 (equations from its code's page).

    w*_i: client i's cached model (the start model before it is heard)
    a round closes at C N arrivals:   theta <- sum_i n_i w*_i / sum_i n_i   over *all* clients' caches
    up to date (heard in this round):  starts the next round from the new theta
    tolerable (at work, at most tau rounds behind):  goes on; its result is taken when it comes
    deprecated (further behind):  its cache becomes theta, its late result is refused, and it starts anew

What arrives beyond the quota enters the cache after the aggregation. A deprecated client here finishes its useless job
before it hears of it. n_i is the weight of a client's newest update, and of those not heard the mean. Caches are per
tensor: a client that was heard has no say in tensors that it never sent.
Bytes an arrival: the method's. Server memory: N packets and the versions they started from.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import Lazy
from hocket.methods import Update
from hocket.schedules.asynchronous import Async, newest
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

    @property
    def recalls(self) -> bool:
        return True

    def ready(self, server: Server) -> bool:
        return len(server.buffer) >= self._goal(server)

    def _goal(self, server: Server) -> int:
        return math.ceil(self.quota * len(server.clients) - 1e-9)

    def resting(self, server: Server) -> set[int]:
        return {u.client for u in server.buffer}  # they wait for the round to close

    def terms(self, server: Server, batch: list[Update]) -> list[Term]:
        """One term: from the model to the mean of the caches, tensor by tensor."""
        every = [*server.kept, *batch[: self._goal(server)]]
        trees = {u.job: server.method.effect(u.payload) for u in every}
        caches = {(u.client, k): u for u in every for k in trees[u.job]}
        weights = {u.client: u.weight for u in every}
        usual = sum(weights.values()) / len(weights)
        synced = self._synced(server)

        def direction(name: str) -> Tensor:
            out, total = torch.zeros_like(server.model[name]), 0.0
            for c in sorted(server.clients):
                w, u = weights.get(c, usual), caches.get((c, name))
                total += w
                if u is not None:
                    out.add_(server.difference([name], u.version)[name].add_(trees[u.job][name]), alpha=w)
                elif c not in weights:
                    out.add_(server.difference([name], synced[c])[name], alpha=w)
            return out.div_(total)

        names = dict.fromkeys(k for u in batch[: self._goal(server)] for k in trees[u.job])
        return [Term(replace(batch[-1], payload=Lazy(names, direction)), 1.0, 1.0)]

    def remember(self, server: Server, batch: list[Update]) -> list[Update]:
        """Everybody's newest results; deprecated clients have the new model instead."""
        bound = self.max_staleness or server.version
        gone = {j.client for j in server.outstanding.values() if server.version - j.version > bound}
        every = [u for u in [*server.kept, *batch] if u.client not in gone]
        synced = server.notes.get("synced", {}) | dict.fromkeys(sorted(gone), server.version)
        server.notes = {"synced": {c: v for c, v in synced.items() if c not in {u.client for u in every}}}
        return newest(server, every)

    def pins(self, server: Server) -> set[int]:
        heard = {u.client for u in server.kept}
        return {v for c, v in self._synced(server).items() if c not in heard}

    def _synced(self, server: Server) -> dict[int, int]:
        """The version that stands in each client's cache where no result does."""
        return dict.fromkeys(server.clients, server.method.prelude) | server.notes.get("synced", {})
