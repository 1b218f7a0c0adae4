"""Aggregation of what adapters do, not of their factors: the server adds products and decomposes the sum anew.

    D <- trunc_R(D + eta sum_i p_i Delta_i),   trunc_R(P) = U_R S_R V_R^T,   Delta_i from the client's model M_i

and methods differ in what a client's model is the difference to. Sums of products are decomposed through QR cores
(`hocket.products`), so D is never formed, unless a schedule gives differences of whole matrices (those that mix or
cache models) or the server has an optimizer: these add dense matrices.

The factors of D are B = U S, A = V^T (`split` B), B = U, A = S V^T (A), or sqrt(S) on each (even). Directions that D
does not have (S = 0) get a fresh random row of A and B = 0: the product is the same, and they can be trained.
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
from hocket.combine import Lazy, mean, part
from hocket.methods.base import PLAIN, State, Update
from hocket.methods.lora import BASE, A, B, compared, modules, pair
from hocket.methods.unequal import Model, Unequal
from hocket.products import Product
from hocket.tree import Tree, generator

GONE = 1e-12  # coefficients that are zero but for rounding


@dataclass(frozen=True, config=PLAIN)
class Effective(Unequal):
    """A method whose server adds products."""

    split: Literal["even", "A", "B"] = Field(
        default="even", description="where the singular values go when D is decomposed: on both factors, on A, or on B"
    )

    def init(self, params: Tree, seed: int) -> State:
        return super().init(params, seed) | {"seed": seed, "version": 0}

    def started(self, m: str, model: Model) -> int:
        """How many of D's components, in module `m`, a client's model is the difference to."""
        raise TypeError(f"{type(self).__name__} must define started()")

    def columns(
        self, m: str, models: Sequence[Model], weights: Sequence[float], shares: Sequence[float]
    ) -> list[Tensor]:
        """What each client's components count for (each of the client's rank), server rate aside."""
        total = sum(shares)
        return [torch.full((x.rank(m),), w / total, dtype=torch.float64) for x, w in zip(models, weights, strict=True)]

    def model(self, params: Tree) -> Mapping[str, Tensor]:
        bases = {m + BASE: m for m in modules(params)}
        rest = [k for k in params if not k.endswith((A, B))]

        def make(k: str) -> Tensor:
            return params[bases[k] + B] @ params[bases[k] + A] if k in bases else params[k]

        return Lazy([*bases, *rest], make)

    def effect(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not isinstance(payload, Model):
            return payload
        bases = {m + BASE: m for m in modules(payload)}

        def make(k: str) -> Tensor:
            return products.dense(self._sum(bases[k], [payload], [1.0], [1.0])) if k in bases else payload[k]

        return Lazy([*bases, *(k for k in payload if not k.endswith((A, B)))], make)

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        shares = weights if shares is None else shares
        payloads = [u.payload for u in updates]
        rest = [replace(u, payload=part(u.payload, lambda k: not k.endswith((A, B, BASE)))) for u in updates]
        after = super().step(state, rest, weights, shares) | {"version": state["version"] + 1}
        params, slots = after["params"] | {}, after["slots"] | {}
        found: dict[str, list[Product]] = {}
        if self.server_optimizer != "sgd" or any(k.endswith(BASE) for p in payloads for k in p):
            effects = [part(self.effect(p), lambda k: k.endswith(BASE)) for p in payloads]
            for k, delta in mean(effects, weights, shares):
                m, step = k.removesuffix(BASE), self.server_lr * delta
                if self.server_optimizer != "sgd":
                    step, slots[k] = self._server_step(delta, slots.get(k, {}))
                found[m] = [(params[m + B], params[m + A]), (step, torch.eye(step.shape[1]).to(step))]
        else:
            for m in modules(params):
                found[m] = self._sum(m, *_held(m, payloads, weights, shares), self.server_lr, params)
        for m, terms in found.items():
            if terms:
                params[m + B], params[m + A] = self._factors(m, terms, params, state["seed"], after["version"])
        return after | {"params": params, "slots": slots}

    def _sum(
        self, m: str, models: Sequence[Model], weights: Sequence[float], shares: Sequence[float], rate: float = 1.0,
        now: Tree | None = None,
    ) -> list[Product]:  # fmt: skip
        """D + eta sum_i p_i Delta_i of module `m` as products; nothing if no client moved it. Without `now` no D.

        All that clients started from are columns of D, now or in an earlier version, so they are one product each.
        """
        if not models:
            return []
        known: dict[int, tuple[Tree, Tensor]] = {}
        if now is not None:
            known[id(now[m + A])] = now, torch.ones(len(now[m + A]), dtype=torch.float64)
        each = [rate * c for c in self.columns(m, models, weights, shares)]
        for x, c in zip(models, each, strict=True):
            then, k = x.then, self.started(m, x)
            _, count = known.setdefault(id(then[m + A]), (then, torch.zeros(len(then[m + A]), dtype=torch.float64)))
            count[:k] -= c if k == len(c) else c[0]
        terms = [(x[m + B] * c.to(x[m + B]), x[m + A]) for x, c in zip(models, each, strict=True)]
        for tree, count in known.values():
            live = count.abs() > GONE
            if live.any():
                terms.append((tree[m + B][:, live] * count[live].to(tree[m + B]), tree[m + A][live]))
        return terms

    def _factors(
        self, m: str, terms: Sequence[Product], params: Tree, seed: int, version: int
    ) -> tuple[Tensor, Tensor]:
        """B and A of the sum's truncation to the server's rank."""
        old_b, old_a = params[m + B], params[m + A]
        u, s, vt = products.svd(terms)
        if s.is_meta:
            rank = self.kept(m, len(s))
            return old_b.new_empty(len(old_b), rank), old_a.new_empty(rank, old_a.shape[1])
        if not float(s[0]) > 0:
            return old_b, old_a  # nobody moved anything yet: the random A that all have stays
        live = int((s > s[0] * len(s) * torch.finfo(s.dtype).eps).sum())  # rounding grows with the core, not the sides
        rank = self.kept(m, live)
        u, s, vt, live = u[:, :rank], s[:rank], vt[:rank], min(live, rank)
        left = {"A": torch.ones_like(s), "B": s, "even": s.sqrt()}[self.split]
        b, a = old_b.new_zeros(len(old_b), rank), old_a.new_empty(rank, old_a.shape[1])
        b[:, :live] = (u * left)[:, :live].to(b)
        g = generator(seed, "fresh", version, m)  # as peft draws A: uniform in +- 1/sqrt(in)
        a.copy_((torch.rand(a.shape, generator=g) * 2 - 1) * a.shape[1] ** -0.5)
        if self.split == "B":
            a[: len(s)] = vt.to(a)
        else:
            a[:live] = (vt * (s / left).unsqueeze(1))[:live].to(a)
        return b, a

    def kept(self, m: str, live: int) -> int:
        """Rank R of module `m` at the server, where the sum has `live` directions."""
        return self.rank_of(m)

    def layers(
        self, before: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float], after: State
    ) -> dict[str, dict[str, float]]:
        """What was lost of each module's sum by its truncation."""
        out: dict[str, dict[str, float]] = {}
        for m in modules(before["params"]) if self.server_optimizer == "sgd" else ():
            held = _held(m, [u.payload for u in updates], weights, shares)
            if held[0]:
                ideal = self._sum(m, *held, self.server_lr, before["params"])
                out[m] = compared(ideal, [pair(after["params"], m)[::-1]])
        return out


def _held(
    m: str, payloads: Sequence[Mapping[str, Tensor]], weights: Sequence[float], shares: Sequence[float]
) -> tuple[list[Model], list[float], list[float]]:
    """The models that move module `m`, with their weights and shares."""
    held = [(x, w, s) for x, w, s in zip(payloads, weights, shares, strict=True) if isinstance(x, Model) and m + A in x]
    return [x for x, _, _ in held], [w for _, w, _ in held], [s for _, _, s in held]
