"""CA2FL: a buffered server that remembers every client's last update, so that fast clients do not pull it their way.

Wang et al., "Tackling the Data Heterogeneity in Asynchronous Federated Learning with Cached Update Calibration",
ICLR 2024, https://openreview.net/forum?id=4aywmeb97I (from its abstract, reviews and third-party code).

    h_i: client i's last update (0 before),   H = sum_i n_i h_i / sum_i n_i   over *all* clients
    at M arrivals S:   theta <- theta + eta (H + sum_S n_i (Delta_i - h_i) / sum_S n_i),   then h_i <- Delta_i for S

h_i stays fixed within a buffer, so a client that reports twice is not measured against itself. n_i is the weight of a
client's first update, and of those not yet heard the mean; all 1 is the paper.

`caches = "clients"`: the client keeps h_i and sends C(Delta_i - h_i), and both sides add what was decoded:
    h_i <- h_i + d_i,   H <- H + n_i d_i / sum n,   theta <- theta + eta (H_old + sum_S n_i d_i / sum_S n_i)
With raw packets this is the same trajectory (a client twice in one buffer excepted) and the server stores nothing of
its clients; with a lossy codec it is EF21 (Richtarik et al. 2021, https://arxiv.org/abs/2106.05203) and needs no other
feedback. A client goes on from its last update that counted (`Job.follows`), so losses do not add up.
`news`: what the differences are divided by, the buffer's weight (as published; SAGA's estimate) or all clients' (SAG's:
less variance, more delay). `buffer = 1` with `news = "clients"` moves the model, on every arrival, by the mean of
everybody's last update: FedFa with one place in the window for each client.
Bytes an arrival: the method's. Server memory: 3 d and, with `caches = "server"`, N packets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import Lazy, wide
from hocket.methods import Method, Update
from hocket.schedules.asynchronous import newest
from hocket.schedules.base import PLAIN, Term, schedule
from hocket.schedules.fedbuff import Buffered

if TYPE_CHECKING:
    from hocket.server import Server


@schedule("ca2fl")
@dataclass(frozen=True, config=PLAIN)
class CA2FL(Buffered):
    """A step every `buffer` arrivals, calibrated by everybody's last update."""

    caches: Literal["server", "clients"] = Field(default="server", description="who keeps a client's last update")
    news: Literal["buffer", "clients"] = Field(
        default="buffer", description="whose weight the differences to last updates are divided by"
    )

    @property
    def carries(self) -> bool:
        return self.caches == "clients"

    @property
    def composes(self) -> bool:
        return True

    def refuses(self, method: Method) -> str | None:
        if self.carries and (method.anchored or not method.increments):
            return f"schedule.caches: '{method.name}' sends new factors each time; use caches = 'server'"
        return super().refuses(method)

    def terms(self, server: Server, batch: list[Update]) -> list[Term]:
        """One term: the whole direction, tensor by tensor."""
        (weights, total), sums = self._weights(server, batch), server.notes.get("sums", {})
        changes = self._changes(server, batch, weights)

        def direction(name: str) -> Tensor:
            held = [(tree, w) for tree, w in changes if name in tree]
            divisor = total if self.news == "clients" else sum(w for _, w in held)
            out = torch.zeros_like(server.model[name])
            for tree, w in held:
                out.add_(tree[name], alpha=w / divisor)
            return out.add_(sums[name], alpha=1 / total) if name in sums else out

        names = dict.fromkeys(k for tree, _ in changes for k in tree)
        return [Term(replace(batch[-1], payload=Lazy(names, direction)), 1.0, 1.0)]

    def remember(self, server: Server, batch: list[Update]) -> list[Update]:
        (weights, _), sums = self._weights(server, batch), dict(server.notes.get("sums", {}))
        changes = self._changes(server, batch, weights)
        last = {(u.client, k): i for i, (u, (tree, _)) in enumerate(zip(batch, changes, strict=True)) for k in tree}
        for i, (u, (tree, w)) in enumerate(zip(batch, changes, strict=True)):
            for k in (k for k in tree if self.carries or last[u.client, k] == i):
                sums[k] = torch.add(sums[k], tree[k], alpha=w) if k in sums else w * tree[k]
        server.notes = {"sums": sums, "weights": weights}
        return [] if self.carries else newest(server, [*server.kept, *batch])

    def _weights(self, server: Server, batch: list[Update]) -> tuple[dict[int, float], float]:
        """Each heard client's weight, and that of all clients."""
        known = {u.client: u.weight for u in reversed(batch)} | server.notes.get("weights", {})
        return known, sum(known.values()) / len(known) * len(server.clients)

    def _changes(self, server: Server, batch: list[Update], weights: dict[int, float]) -> list[tuple[Lazy, float]]:
        """For each update: Delta_i - h_i, each tensor when it is asked for, and the client's weight."""
        effect = server.method.effect
        last = {(u.client, k): tree for u in server.kept for tree in [effect(u.payload)] for k in tree}

        def tree(u: Update) -> Lazy:
            new = effect(u.payload)

            def change(k: str) -> Tensor:  # wide, for these go into sums of a whole run
                x = wide(new[k])
                return x - wide(last[u.client, k][k]) if (u.client, k) in last else x

            return Lazy(new, change)

        return [(tree(u), weights[u.client]) for u in batch]
