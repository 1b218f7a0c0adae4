"""FLoRA: clients' adapters are stacked, not averaged, and merged into the base weights after every round.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024,
https://arxiv.org/abs/2409.05976.

    client i:  fresh A_i in R^{r_i x in} (random), B_i = 0 on top of the merged W;   sends A_i, B_i after training
    server:    A = [p_1 s_1 A_1; ...; p_k s_k A_k],   B = [B_1 ... B_k]   (p and s on one factor only)
    everyone:  W <- W + B A  =  W + sum_i p_i s_i B_i A_i

Bytes a round and client: up s_c sum_m r_i (in_m + out_m); down the stack, s_c sum_m (sum_j r_j) (in_m + out_m), and
for a client that missed rounds every missed stack, or the dense W where that is less. The server keeps only stacks
that could still be sent, so at most one dense W of them. With a server optimizer, or under a schedule that adds
differences of whole weights, the dense W travels down.
Client memory: weights (those adapted must be writable, so a 4- or 8-bit base will not do) + 16 bytes a number of A, B.
Exact: the stack is the mean of the products, for any ranks and scales; under a lossy downlink codec clients merge what
they decode, and what is lost adds up from round to round. New heads and other trainables are averaged.
The published code, in its homogeneous comparison, adds FedAvg's later clients to a misspelt name and so keeps the
first client's factors only, weighted p_0 each: its gap between FLoRA and FedIT should not be taken as a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import products
from hocket.combine import Lazy, finite, mean
from hocket.methods.base import PLAIN, Local, State, Update, method
from hocket.methods.lora import BASE, A, B, modules, pair
from hocket.methods.merging import Merging, add
from hocket.methods.replay import without
from hocket.products import Product
from hocket.tree import Tree, generator


@method("flora")
@dataclass(frozen=True, config=PLAIN)
class FLoRA(Merging):
    """LoRA by stacking: exact aggregation, merged into the base and started afresh every round."""

    unequal: ClassVar[bool] = True
    increments: ClassVar[bool] = False  # every job has factors of its own

    def train(self, local: Local, start: Tree) -> Tree:
        """Adapters as they ended, and the differences of whatever else trains (a new head)."""
        fresh: Tree = {}
        for m in modules(start):
            rank = local.traits.get("rank") or self.rank_of(m)
            fresh[m + A] = self._fresh(local, m, start[m + A].new_empty(rank, start[m + A].shape[1]))
            fresh[m + B] = start[m + B].new_zeros(len(start[m + B]), rank)
        delta = local.fit(start | fresh, self.trains(local), self.mu)
        for m in modules(start):
            delta[m + A] = delta[m + A] + fresh[m + A]  # B starts from zero: its difference is its end
        return delta

    def _fresh(self, local: Local, module: str, like: Tensor) -> Tensor:
        if like.is_meta:
            return torch.empty_like(like)
        bound = like.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5), as in peft
        g = generator(local.seed, "flora", local.client, local.visit, module)
        return ((torch.rand(like.shape, generator=g) * 2 - 1) * bound).to(like.dtype)

    def own(self, world: Tree, sent: Mapping[str, Tensor]) -> Tree:
        out = world | {k: world[k] + self.server_lr * sent[k] for k in sent if not k.endswith((A, B))}
        for m in modules(sent):
            unit = self.server_lr * self.scale(m, len(sent[m + A]))
            out[m + BASE] = add(world[m + BASE], unit * sent[m + A], sent[m + B])
        return out

    def check(self, state: State, update: Update) -> str | None:
        """Ranks may differ from client to client; everything else is as the state has it."""
        params, sent = state["params"], update.payload
        for m in modules(params):
            if m + A not in sent and m + B not in sent:
                continue
            if m + A not in sent or m + B not in sent:
                return f"'{m}' comes with one factor; it needs both"
            a, b = sent[m + A], sent[m + B]
            flat, most = a.ndim == b.ndim == 2, update.traits.get("rank") or self.rank_of(m)
            if not flat or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(params[m + BASE].shape):
                return f"'{m}' has factors of shapes {tuple(b.shape)} and {tuple(a.shape)}"
            if len(a) > most:
                return f"'{m}' has rank {len(a)}, and this client's is {most}"
            if not (finite(a) and finite(b)):
                return f"'{m}' holds values that are not finite"
        rest = without(sent, {m + x for m in modules(params) for x in (A, B)})
        return super().check(state, Update(update.job, update.client, update.version, update.turn, rest))

    def effect(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        bases = {m + BASE: m for m in modules(payload)}

        def make(name: str) -> Tensor:
            if name not in bases:
                return payload[name]
            a, b = payload[bases[name] + A], payload[bases[name] + B]
            return add(b.new_zeros(b.shape[0], a.shape[1]), self.scale(bases[name], len(a)) * a, b)

        return Lazy([*bases, *(k for k in payload if not k.endswith((A, B)))], make)

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        shares = weights if shares is None else shares
        if self.server_optimizer != "sgd" or any(k.endswith(BASE) for u in updates for k in u.payload):
            # differences of whole weights: there is no stack that a client could be sent instead
            whole = [replace(u, payload=self.effect(u.payload)) for u in updates]
            return self.untold(state, super().step(state, whole, weights, shares))
        stack: Tree = {}
        for m in modules(state["params"]):
            held = [(u.payload, w, s) for u, w, s in zip(updates, weights, shares, strict=True) if m + A in u.payload]
            if held:
                unit = self.server_lr / sum(s for _, _, s in held)
                stack[m + A], stack[m + B] = self.stacked(m, [(sent, w * unit) for sent, w, _ in held])
        params = dict(state["params"])
        for k, delta in mean([without(u.payload, stack) for u in updates], weights, shares):
            params[k] = params[k] + self.server_lr * delta.to(params[k].dtype)
        return self.told(state, state | {"params": params}, stack)

    def stacked(self, m: str, held: Sequence[tuple[Mapping[str, Tensor], float]]) -> tuple[Tensor, Tensor]:
        """A and B of what is merged into module `m`, from uploads and what each counts for."""
        b, a = products.stack(self._terms(m, held))
        return a, b

    def _terms(self, m: str, held: Sequence[tuple[Mapping[str, Tensor], float]]) -> list[Product]:
        return [(sent[m + B], sent[m + A] * (self.scale(m, len(sent[m + A])) * p)) for sent, p in held]

    def _sides(
        self, m: str, before: State, payloads: Sequence[Mapping[str, Tensor]], share: Sequence[float], after: State
    ) -> tuple[list[Product], list[Product]]:
        """(the clients' products, what was merged)."""
        if m + A not in after["last"]:
            return [], []
        a, b = pair(after["last"], m)
        return self._terms(m, list(zip(payloads, share, strict=True))), [(b, a)]
