"""FedAsync: every arriving model is mixed into the server's at once, the less the staler it is.

Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", 2019, https://arxiv.org/abs/1903.03934.

    theta <- (1 - alpha_t) theta + alpha_t w_i,   alpha_t = alpha s(tau),   w_i = theta_start + Delta_i
    s(tau): 1;   (1 + tau)^-a;   1 if tau <= b else 1 / (a (tau - b) + 1)

The mixture is made of tensors that the client sent; w_i is built from the stored version the client started from. The
paper's local proximal term rho/2 |x - theta_start|^2 is the method's `mu`.
Bytes an arrival: the method's, up and down. Server memory: the versions in use, at most one a client at work.
Exact: with alpha = 1 and s = 1 it is FedFa's model form with a window of 1. It is biased toward fast clients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods import Update
from hocket.schedules.asynchronous import Fading
from hocket.schedules.base import PLAIN, Term, schedule

if TYPE_CHECKING:
    from hocket.server import Server


@schedule("fedasync")
@dataclass(frozen=True, config=PLAIN)
class FedAsync(Fading):
    """A step on every arrival: mix the client's model in."""

    alpha: float = Field(default=0.6, gt=0, le=1, description="share of a fresh model in the mixture")

    @property
    def anchored(self) -> bool:
        return True

    def ready(self, server: Server) -> bool:
        return bool(server.buffer)

    def takes(self, server: Server) -> list[Update]:
        return super().takes(server)[:1]

    def terms(self, server: Server, batch: list[Update]) -> list[Term]:
        (update,) = batch
        return [Term(server.against(update), self.alpha * self.discount(server.version - update.version), 1.0)]
