"""HetLoRA: zero-padded factors averaged by how much they do, a regularized tail, and ranks that shrink.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA), EMNLP 2024,
https://arxiv.org/abs/2401.06432 (abstract, captions and third parties' code read; gamma and lambda are not firm).

    client i:  A_i = A[:r_i], B_i = B[:, :r_i];   minimizes f_i + lambda sum_m ||B_i[:, t:]|| ||A_i[t:]||,
               t = max(1, floor(gamma r_i));   if that tail weighs less after training:  r_i <- t, and it is not sent
    server:    A <- sum_i w_i pad(A_i),  B <- sum_i w_i pad(B_i),   w_i = ||M_i|| / sum_j ||M_j||,  M_i = s_i B_i A_i

Bytes a round and client, each way: s_c sum_m r_i (in_m + out_m) with the rank of that round. With `norm = "none"`,
`decay = 0` and `gamma = 1` it is the plain zero-padded average. Approximate: products of means are not means of
products, and rows that a client lacks count as zero: row h of A and of B fade by sum_{i: r_i >= h} w_i a round each,
B A by its square. B's scale is in the server's B, so that clients with unequal alpha / r can be averaged. Schedules
that mix models, or keep a window or caches of updates, weigh as they say, and the server goes on sending first ranks.
FlexLoRA's version of this baseline takes the regularizer's gradient off the graph, leaves no tail (rounds 0.99 r up)
and averages without scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import products
from hocket.combine import Lazy, part
from hocket.methods.base import PLAIN, Client, Local, State, Update, method
from hocket.methods.lora import A, B, modules
from hocket.methods.unequal import Model, Unequal
from hocket.tree import Tree


@method("hetlora")
@dataclass(frozen=True, config=PLAIN)
class HetLoRA(Unequal):
    """LoRA of unequal ranks: zero-padded factors weighed by norms, ranks that prune themselves."""

    gamma: float = Field(
        default=0.99, gt=0, le=1, description="share of its rank a client keeps when it prunes; 1: never"
    )
    decay: float = Field(default=5e-3, ge=0, description="lambda, the weight of the tail's norms in the loss")
    norm: Literal["model", "matrix", "none"] = Field(
        default="model", description="norms that weigh updates: of the whole adapter, of each module, or none (by rows)"
    )

    @property
    def increments(self) -> bool:  # type: ignore[override]
        """Coordinates are the same in all versions, as long as ranks are."""
        return self.gamma == 1

    def init(self, params: Tree, seed: int) -> State:
        return super().init(params, seed) | {"ranks": {}}

    def send(self, state: State, client: Client, version: int) -> Tree:
        pruned = state["ranks"].get(client.id, {})
        return self._cut(state["params"], lambda m: pruned.get(m) or self.own_rank(m, client.traits))

    def train(self, local: Local, start: Tree) -> Tree:
        t = {m: max(1, int(self.gamma * len(start[m + A]))) for m in modules(start)}  # one component is no tail

        def tail(tree: Mapping[str, Tensor]) -> Tensor:
            norm = torch.linalg.vector_norm
            weighed = [norm(tree[m + B][:, k:]) * norm(tree[m + A][k:]) for m, k in t.items()]
            return torch.stack(weighed).sum()

        pull = (lambda live: self.decay * tail(live)) if self.decay and self.gamma < 1 else None
        delta = local.fit(start, self.trains(local), self.mu, pull)
        if self.gamma == 1 or start[next(iter(start))].is_meta:
            return delta
        if float(tail({k: start[k] + delta[k] for k in delta})) < float(tail(start)):
            for m, k in t.items():
                unit = self.scale(m, len(start[m + A])) / self.scale(m, k)  # it is read with the rank it has now
                delta[m + A], delta[m + B] = delta[m + A][:k].clone(), delta[m + B][:, :k] * unit
        return delta

    def accept(self, then: Tree, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Padded(Model(self, then, payload))

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        shares = weights if shares is None else shares
        found = [u.payload for u in updates if isinstance(u.payload, Padded)]
        if self.norm == "none" or len(found) < len(updates):
            after = super().step(state, updates, weights, shares)
        else:
            after = self._weighed(state, updates, found, weights, shares)
        ranks = {u.client: u.payload.ranks for u in updates if isinstance(u.payload, Padded)}
        return after | {"ranks": state["ranks"] | ranks} if self.gamma < 1 else after

    def _weighed(
        self, state: State, updates: Sequence[Update], found: Sequence[Padded], weights: Sequence[float],
        shares: Sequence[float],
    ) -> State:  # fmt: skip
        """Factors by norms, all else by the weights given. A discount of stale updates stays what it is."""
        factors = modules(state["params"])
        groups = [factors] if self.norm == "model" else [[m] for m in factors]
        named = {m + x for m in factors for x in (A, B)}
        rest = [replace(u, payload=part(u.payload, lambda k: k not in named)) for u in updates]
        state = super().step(state, rest, weights, shares)
        for group in groups:
            names = {m + x for m in group for x in (A, B)}
            norms = [p.norm(group) for p in found]
            share = norms if sum(norms) > 0 else list(shares)
            weight = [n * w / s for n, w, s in zip(share, weights, shares, strict=True)]
            mine = [replace(u, payload=part(u.payload, names.__contains__)) for u in updates]
            state = super().step(state, mine, weight, share)
        return state


class Padded(Lazy):
    """The differences that a client's model makes to the server's factors, rows it lacks counting as zero.

    Attributes:
        ranks: the client's in each module.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.ranks = {m: model.rank(m) for m in modules(model)}

        def make(k: str) -> Tensor:
            if not k.endswith((A, B)):
                return model[k]
            own, old = model[k], model.then[k]
            full = torch.zeros_like(old)
            (full[: len(own)] if k.endswith(A) else full[:, : own.shape[1]]).copy_(own)
            return full.sub_(old)

        super().__init__(model, make)

    def norm(self, group: Sequence[str]) -> float:
        """||M||_F over these modules."""
        held = [m for m in group if m + A in self._model]
        if any(self._model[m + A].is_meta for m in held):
            return 1.0  # a plan: shapes have no norm
        return sum(products.norm([(self._model[m + B], self._model[m + A])]) ** 2 for m in held) ** 0.5
