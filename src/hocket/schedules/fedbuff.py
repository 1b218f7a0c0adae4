"""FedBuff: updates gather in a buffer, and a full buffer is a step. FADAS: the same with AMSGrad on the buffer's mean.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
https://arxiv.org/abs/2106.06639; Wang et al., "FADAS: Towards Federated Adaptive Asynchronous Optimization", ICML 2024,
https://arxiv.org/abs/2407.18365 (equations from a digest; code: yujiaw98/FADAS).

    FedBuff:  theta <- theta + eta sum_i n_i s(tau_i) Delta_i / sum_i n_i  over M updates,  s(tau) = (1 + tau)^-1/2
    FADAS:    Delta = mean of M;  m, v: moving averages of Delta, Delta^2;  v^ = max(v^, v)
              theta <- theta + eta_t m / (sqrt(v^) + eps),   eta_t = eta unless tau_max > tau_c, then
                  formula: min(eta, 1 / tau_max)      code: eta / tau_max

n_i are the recipe's weights (all 1 in the paper). A fresh update counts fully; a stale one makes the step smaller, it
does not make the others larger. Delta_i is against the version the client started from, never against the current one.
With eta = 1e-3 the published formula acts beyond a staleness of 1000 only; the code's form is the one that adapts.
The published FADAS code starts clients from one model and takes Delta against another; that is not followed.
Bytes an arrival: the method's. Server memory: the buffered packets (on disk where they are many), FADAS also 3 d.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods import Method, Update
from hocket.schedules.asynchronous import Async, Fading
from hocket.schedules.base import PLAIN, schedule

if TYPE_CHECKING:
    from hocket.server import Server


@dataclass(frozen=True, config=PLAIN)
class Buffered(Async):
    """A step every `buffer` arrivals."""

    buffer: int = Field(default=4, ge=1, description="updates M a step (FedBuff's default, with many clients, is 10)")

    def ready(self, server: Server) -> bool:
        return len(server.buffer) >= self.buffer

    def takes(self, server: Server) -> list[Update]:
        return super().takes(server)[: self.buffer]


@schedule("fedbuff")
@dataclass(frozen=True, config=PLAIN)
class FedBuff(Buffered, Fading):
    """A step every `buffer` arrivals, stale updates discounted."""


@schedule("fadas")
@dataclass(frozen=True, config=PLAIN)
class FADAS(Buffered):
    """AMSGrad on a buffer's mean, slower when its updates are stale; replaces the method's server optimizer."""

    lr: float = Field(default=1e-3, gt=0, description="server rate eta")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="first moment")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    adaptive: Literal["code", "formula", "none"] = Field(
        default="code", description="rate of a stale buffer: lr / tau_max, min(lr, 1 / tau_max), or lr"
    )
    tau_c: int = Field(default=1, ge=1, description="largest staleness that does not slow the server down")

    def adapt(self, method: Method) -> Method:
        if not method.whole:
            return method
        return replace(
            method, server_optimizer="amsgrad", server_lr=self.lr, beta1=self.beta1, beta2=self.beta2, tau=self.eps
        )

    def refuses(self, method: Method) -> str | None:
        if not method.whole:
            return f"schedule 'fadas' has a server optimizer, and '{method.name}' stores parts as they come"
        if method.server_optimizer != "amsgrad":
            return "schedule 'fadas' needs AMSGrad at the server; build the method with schedule.adapt(method)"
        return super().refuses(method)

    def rate(self, server: Server, batch: list[Update]) -> float:
        stalest = max(server.version - u.version for u in batch)
        if self.adaptive == "none" or stalest <= self.tau_c:
            return 1.0
        return 1 / stalest if self.adaptive == "code" else min(1.0, 1 / (self.lr * stalest))
