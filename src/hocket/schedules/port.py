"""Port: a buffered server that weighs an update by its staleness and by how well it agrees with what happened since.

Su and Li, "How Asynchronous Can Federated Learning Be?", IWQoS 2022, https://doi.org/10.1109/IWQoS54832.2022.9812885
(equations as in Plato's example, TL-System/plato, snapshot 2025-10-01).

    p_i ~ n_i [lambda_s (1 + cos(Delta_i, theta_now - theta_start)) / 2 + lambda_tau B / (tau_i + B)],  sum p_i = 1
    theta <- theta + eta sum_S p_i Delta_i   at M arrivals, once nobody at work is B versions behind

theta_start is the version that the client started from (Plato's code takes the one before last, whatever tau_i). Of a
fresh update, and where nothing happened since, the cosine is 1. Semi-asynchronous: beyond the bound B the server waits;
the paper also tells such clients to send what they have, which is not done here.
Bytes an arrival: the method's. Server memory: the buffered packets and the versions in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods import Update
from hocket.schedules.base import PLAIN, Term, schedule
from hocket.schedules.fedbuff import Buffered

if TYPE_CHECKING:
    from hocket.server import Server


@schedule("port")
@dataclass(frozen=True, config=PLAIN)
class Port(Buffered):
    """A step every `buffer` arrivals, weighted by agreement and staleness; waits for whoever is far behind."""

    bound: int = Field(default=10, ge=1, description="staleness B beyond which the server waits for a client")
    similarity: float = Field(default=1.0, ge=0, description="weight lambda_s of the cosine")
    freshness: float = Field(default=3.0, gt=0, description="weight lambda_tau of the staleness term")

    @property
    def anchored(self) -> bool:
        return True

    def ready(self, server: Server) -> bool:
        behind = any(server.version - j.version >= self.bound for j in server.outstanding.values())
        return super().ready(server) and not behind

    def resting(self, server: Server) -> set[int]:
        return {u.client for u in server.buffer} if super().ready(server) else set()  # while others are waited for

    def terms(self, server: Server, batch: list[Update]) -> list[Term]:
        weights = [u.weight * self._worth(server, u) for u in batch]
        return [Term(u, w, w) for u, w in zip(batch, weights, strict=True)]

    def _worth(self, server: Server, update: Update) -> float:
        stale = server.version - update.version
        planned = any(x.is_meta for x in server.state["params"].values())  # shapes have no direction
        cosine = self._cosine(server, update) if stale and not planned else 1.0
        return self.similarity * (1 + cosine) / 2 + self.freshness * self.bound / (stale + self.bound)

    def _cosine(self, server: Server, update: Update) -> float:
        """Of the update and the server's way since its start, over the tensors that the update moves."""
        delta = server.method.effect(update.payload)
        back = server.difference(delta, update.version)
        products = torch.zeros(3, dtype=torch.float64)
        for k in sorted(delta):
            d, b = delta[k].flatten(), back[k].flatten()
            products += torch.stack([-(d @ b), d @ d, b @ b]).double().cpu()
        dot, a, b = products.tolist()
        return dot / (a * b) ** 0.5 if a * b > 0 else 1.0
