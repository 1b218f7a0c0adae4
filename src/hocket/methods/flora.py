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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import Lazy, finite, mean
from hocket.methods.base import PLAIN, Client, Local, State, Update, method
from hocket.methods.lora import LoRA
from hocket.tree import Tree, generator

A, B, BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"


@method("flora")
@dataclass(frozen=True, config=PLAIN)
class FLoRA(LoRA):
    """LoRA by stacking: exact aggregation, merged into the base and started afresh every round."""

    merges: ClassVar[bool] = True
    increments: ClassVar[bool] = False  # every job has factors of its own

    def init(self, params: Tree, seed: int) -> State:
        return super().init(params, seed) | {"version": 0, "stacks": {}}

    def train(self, local: Local, start: Tree) -> Tree:
        """Adapters as they ended, and the differences of whatever else trains (a new head)."""
        fresh = {m + A: self._fresh(local, m, start[m + A]) for m in _modules(start)}
        delta = local.fit(start | fresh, lambda name: not name.endswith(BASE), self.mu)
        for m in _modules(start):
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
        for m in _modules(sent):
            out[m + BASE] = _add(world[m + BASE], self.server_lr * self.scale(m) * sent[m + A], sent[m + B])
        return out

    def check(self, state: State, update: Update) -> str | None:
        """Ranks may differ from client to client; everything else is as the state has it."""
        params, sent = state["params"], update.payload
        for k in sent:
            if k.endswith(BASE):
                return f"'{k}' is not a client's to change"
        for m in _modules(params):
            if m + A not in sent and m + B not in sent:
                continue
            if m + A not in sent or m + B not in sent:
                return f"'{m}' comes with one factor; it needs both"
            a, b = sent[m + A], sent[m + B]
            flat = a.ndim == b.ndim == 2
            if not flat or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(params[m + BASE].shape):
                return f"'{m}' has factors of shapes {tuple(b.shape)} and {tuple(a.shape)}"
            if not (finite(a) and finite(b)):
                return f"'{m}' holds values that are not finite"
        rest = _without(sent, {m + x for m in _modules(params) for x in (A, B)})
        return super().check(state, Update(update.job, update.client, update.version, update.turn, rest))

    def effect(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        bases = {m + BASE: m for m in _modules(payload)}

        def make(name: str) -> Tensor:
            if name not in bases:
                return payload[name]
            a, b = payload[bases[name] + A], payload[bases[name] + B]
            return _add(b.new_zeros(b.shape[0], a.shape[1]), self.scale(bases[name]) * a, b)

        return Lazy([*bases, *(k for k in payload if not k.endswith((A, B)))], make)

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        version, shares = state["version"] + 1, weights if shares is None else shares
        if self.server_optimizer != "sgd" or any(k.endswith(BASE) for u in updates for k in u.payload):
            # differences of whole weights: there is no stack that a client could be sent instead
            whole = [replace(u, payload=self.effect(u.payload)) for u in updates]
            return super().step(state, whole, weights, shares) | {"version": version, "stacks": {}}
        stack: Tree = {}
        for m in _modules(state["params"]):
            held = [(u.payload, w, s) for u, w, s in zip(updates, weights, shares, strict=True) if m + A in u.payload]
            if held:
                unit = self.server_lr * self.scale(m) / sum(s for _, _, s in held)
                stack[m + A] = torch.cat([sent[m + A] * (unit * w) for sent, w, _ in held])
                stack[m + B] = torch.cat([sent[m + B] for sent, _, _ in held], dim=1)
        params = self.load(state["params"], {f"{version}/{k}": v for k, v in stack.items()})
        for k, delta in mean([_without(u.payload, stack) for u in updates], weights, shares):
            params[k] = params[k] + self.server_lr * delta.to(params[k].dtype)
        stacks = _cheap({**state["stacks"], str(version): stack}, params)
        return state | {"params": params, "version": version, "stacks": stacks}

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        rest = super().ship(state, client, version, since, changed)
        missed = [str(v) for v in range(max(since, 0) + 1, version + 1)]
        if since < 0 or any(v not in state["stacks"] for v in missed):
            return rest
        stacks = {f"{v}/{k}": x for v in missed for k, x in state["stacks"][v].items()}
        dense = {k: v for k, v in rest.items() if k.endswith(BASE)}
        return rest if _size(dense) <= _size(stacks) else _without(rest, dense) | stacks

    def load(self, held: Tree, payload: Mapping[str, Tensor]) -> Tree:
        out = held | {k: payload[k] for k in payload if "/" not in k}
        for k in sorted((k for k in payload if k.endswith(A) and "/" in k), key=lambda k: int(k.partition("/")[0])):
            base = k.partition("/")[2].removesuffix(A) + BASE
            out[base] = _add(out[base], payload[k], payload[k.removesuffix(A) + B])
        return out


def _modules(names: Iterable[str]) -> list[str]:
    """The adapted modules among tensor names."""
    return sorted(k.removesuffix(A) for k in names if k.endswith(A) and "/" not in k)


def _add(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + B A, as a new tensor. Factors in half precision are multiplied in fp32."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return torch.addmm(w.to(wide), b.to(wide), a.to(wide)).to(w.dtype)


def _without(tree: Mapping[str, Tensor], names: Iterable[str]) -> Tree:
    """What is left of `tree`; only that is decoded."""
    gone = set(names)
    return {k: tree[k] for k in tree if k not in gone}


def _size(tree: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for t in tree.values())


def _cheap(stacks: dict[str, Tree], params: Tree) -> dict[str, Tree]:
    """The newest stacks, as far back as sending all of them costs less than the dense weights."""
    left = sum(v.numel() for k, v in params.items() if k.endswith(BASE))
    keep: dict[str, Tree] = {}
    for version in sorted(stacks, key=int, reverse=True):
        left -= _size(stacks[version])
        if left < 0:
            break
        keep[version] = stacks[version]
    return dict(reversed(keep.items()))
