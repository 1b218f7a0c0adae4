"""What a method is.

A method is a frozen dataclass: its fields are hyper-parameters, its functions are pure in (state, updates). The
defaults *are* FedAvg on the trainable view, so a new method overrides only what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hocket.combine import finite, mean, moved
from hocket.methods.nouns import Between, Client, Job, Local, Masks, Penalty, Trainer, Update
from hocket.registry import Registry
from hocket.tree import Tree

__all__ = [
    "PLAIN", "Between", "Client", "Job", "Local", "Masks", "Method", "Penalty", "State", "Trainer", "Update", "method",
]  # fmt: skip

State = dict[str, Any]  # nested dicts of tensors and plain data; "params" holds the trainable view
PLAIN = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

method: Registry[Method] = Registry("method", "hocket.methods")


@dataclass(frozen=True, config=PLAIN)
class Method:
    """Federated averaging of whatever the view makes trainable, with the usual options of the mean step.

    theta <- theta + server step of Delta, with Delta = sum_i p_i Delta_i, p_i = w_i / sum_j w_j over the clients that
    sent this tensor. Server optimizers: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295;
    FedAvgM: Hsu et al. 2019, arXiv 1909.06335. Proximal term: Li et al., "Federated Optimization in Heterogeneous
    Networks" (FedProx), MLSys 2020, arXiv 1812.06127: clients minimize f_i(w) + mu/2 |w - w_start|^2.
    """

    server_lr: float = Field(default=1.0, gt=0, description="server rate eta")
    server_optimizer: Literal["sgd", "momentum", "adagrad", "adam", "yogi", "amsgrad"] = Field(
        default="sgd",
        description="what is done with the mean update: add it, FedAvgM, FedAdagrad, FedAdam, FedYogi, or AMSGrad",
    )
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="momentum of FedAvgM and first moment of FedAdam, FedYogi, AMSGrad"
    )
    beta2: float = Field(default=0.99, ge=0, lt=1, description="second moment of FedAdam, FedYogi, AMSGrad")
    tau: float = Field(default=1e-3, gt=0, description="adaptivity floor added to the root of the second moment")
    mu: float = Field(default=0.0, ge=0, description="FedProx's proximal coefficient; 0 switches it off")

    name: ClassVar[str] = ""
    view: ClassVar[Literal["full", "blocks", "lora", "biases", "adapter", "thresholds"]] = "full"
    """Which parameters can move at all; the rest is frozen and shared."""

    increments: ClassVar[bool] = True
    """Whether a client's uploads are changes of the same thing from job to job, so that what was lost of one can be
    made good in the next, and optimizer state can be kept."""

    anchored: ClassVar[bool] = False
    """Whether an upload can be read only against the version its job started from (see `accept`)."""

    personal: ClassVar[bool] = False
    """Whether every client ends with a model of its own (see `personalized`), so that the server's alone is none."""

    verbatim: ClassVar[str] = ""
    """Why what is sent down must arrive to the bit, and what to do instead of losing some; empty: it need not."""

    rebuilds: ClassVar[bool] = False
    """Whether clients begin every job at the start model plus what is sent, whatever they held before."""

    @property
    def whole(self) -> bool:
        """Whether a client starts from the version its job names, in every part."""
        return True

    @property
    def additive(self) -> bool:
        """Whether the server's step adds the mean delta, so that a client can add its own update ahead of it."""
        return self.server_optimizer == "sgd"

    @property
    def not_additive(self) -> str:
        """Why it is not, and what to do, for error messages."""
        return f"'{self.name}' with server_optimizer = '{self.server_optimizer}' has none; use 'sgd' or schedule 'sync'"

    @property
    def steady(self) -> bool:
        """Whether the state's tensors mean the same in every version, so that models of any two can be mixed."""
        return True

    @property
    def prelude(self) -> int:
        """Aggregations before the first training turn, whose outcome clients must hear before they can train."""
        return 0

    def unfit(self, training: Any) -> str | None:
        """Why clients cannot train this method under the recipe's section [training], naming its field; or None."""
        return None

    def vain(self, params: Mapping[str, torch.Tensor], training: Any) -> str | None:
        """What of this method saves nothing on a view of these shapes under [training], naming its field; or None."""
        return None

    def init(self, params: Tree, seed: int) -> State:
        """Server state at version 0 from the trainable view of the start model, and the run's seed."""
        return {"params": dict(params), "slots": {}}

    def send(self, state: State, client: Client, version: int) -> Tree:
        """The whole logical view of `client`; `ship` takes what it lacks from it."""
        return state["params"]

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        """What travels to a client that holds version `since` (below 0: nothing) so that it holds `version`.

        Tensors of the view replace the client's. Others are named `<version>/...`, one set for each version that the
        client missed, and `load` applies them in order.

        Args:
            changed: version in which each tensor of the state last changed, if ever.
        """
        params = state["params"]
        view = self.send(state, client, version)
        return {k: v for k, v in view.items() if v is not params.get(k) or changed.get(k, 0) > since or since < 0}

    def load(self, held: Tree, payload: Mapping[str, torch.Tensor]) -> Tree:
        """What a client holds once `payload`, made by `ship`, has arrived."""
        return held | dict(payload)

    def trains(self, local: Local) -> Callable[[str], bool]:
        """Which tensors this client moves and uploads in this job."""
        return lambda name: True

    def train(self, local: Local, start: Tree) -> Tree:
        """One job on a client: from `start` (the view, own updates in flight included) to what is uploaded."""
        return local.fit(start, self.trains(local), self.mu)

    def accept(self, then: Tree, payload: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What the server makes of an upload once `check` has passed it; `then` are the state's "params", if `anchored`
        those of the version that its job started from."""
        return payload

    def model(self, params: Tree) -> Mapping[str, torch.Tensor]:
        """The tensors of which effects are differences, where those are others than the state's "params"."""
        return params

    def effect(self, payload: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What an upload stands for: the difference it would make to each tensor of the view, by itself and at a server
        rate of 1. A tree of such differences can be given to `step` in place of an upload."""
        return payload

    def beside(self, names: Iterable[str]) -> list[str]:
        """Those of these tensors that are none of the method's own: a new head and norms beside its adapters, whose
        bytes are counted apart."""
        return []

    def at(self, rate: float) -> Method:
        """This method with its server rate multiplied by `rate`."""
        return self if rate == 1 else replace(self, server_lr=self.server_lr * rate)

    def own(self, world: Tree, sent: Mapping[str, torch.Tensor]) -> Tree:
        """`world` with one of the client's own updates, still in flight, as the server would add it alone."""
        return world | dict(moved(world, [sent], [1.0], rate=self.server_lr))

    def check(self, state: State, update: Update) -> str | None:
        """Why this update cannot be used, or None. The default wants finite deltas of known tensors."""
        params = state["params"]
        for k in update.payload:
            if k not in params:
                return f"unknown tensor '{k}'"
            if reason := _unlike(update.payload[k], params[k]):  # no name for it: the next is made when it is gone
                return f"tensor '{k}' {reason}"
        return None

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        """The next state from the updates of one aggregation; each may carry any subset of the tensors.

        Args:
            weights: of the updates; may be negative.
            shares: what each counts for in the divisor of the mean (see `hocket.combine.mean`); none: its weight.
        """
        payloads, params = [u.payload for u in updates], state["params"]
        if self.server_optimizer == "sgd":
            return state | {"params": params | dict(moved(params, payloads, weights, shares, self.server_lr))}
        params, slots = dict(params), dict(state["slots"])
        for k, delta in mean(payloads, weights, shares):
            step, slots[k] = self._server_step(delta, slots.get(k, {}))
            params[k] = params[k] + step.to(params[k].dtype)
        return state | {"params": params, "slots": slots}

    def layers(
        self, before: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float], after: State
    ) -> dict[str, dict[str, float]]:
        """What is worth writing down of a step, for each layer."""
        return {}

    def export(self, state: State) -> Tree:
        """The trainable view of the model that this state stands for."""
        return state["params"]

    def personalized(self, view: Tree, memory: Mapping[str, torch.Tensor]) -> Tree:
        """`export`'s view as a client has it that remembers `memory` (empty: it never trained)."""
        return view

    def _server_step(self, delta: torch.Tensor, slot: Tree) -> tuple[torch.Tensor, Tree]:
        """The change of one tensor and its optimizer's next memory."""
        m = slot.get("m", torch.zeros_like(delta))
        if self.server_optimizer == "momentum":
            m = self.beta1 * m + delta
            return self.server_lr * m, {"m": m}
        square = delta * delta
        if self.server_optimizer == "amsgrad":  # Reddi et al. 2018, arXiv 1904.09237, without bias correction
            m = self.beta1 * m + (1 - self.beta1) * delta
            v = (1 - self.beta2) * square + (self.beta2 * slot["v"] if slot else 0)
            top = torch.maximum(slot["top"], v) if slot else v
            return self.server_lr * m / (top.sqrt() + self.tau), {"m": m, "v": v, "top": top}
        v = slot.get("v", torch.full_like(delta, self.tau**2))
        if self.server_optimizer == "adagrad":
            m, v = delta, v + square
        else:
            m = self.beta1 * m + (1 - self.beta1) * delta
            if self.server_optimizer == "adam":
                v = self.beta2 * v + (1 - self.beta2) * square
            else:
                v = v - (1 - self.beta2) * square * torch.sign(v - square)
        keep = {"v": v} if self.server_optimizer == "adagrad" else {"m": m, "v": v}
        return self.server_lr * m / (v.sqrt() + self.tau), keep


def _unlike(x: torch.Tensor, like: torch.Tensor) -> str | None:
    """Why `x` cannot be a delta of `like`, or None."""
    if x.shape != like.shape:
        return f"has shape {tuple(x.shape)}, expected {tuple(like.shape)}"
    return None if finite(x) else "holds values that are not finite"
