"""Ferret: clients train as ever; what travels are coordinates of their updates in random vectors that all can make.

Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", ICML 2025,
https://arxiv.org/abs/2409.06277; code: https://github.com/allen4747/Ferret.

    client:    Delta = w_end - w_start after T local steps of any first-order optimizer (published: SGD, momentum 0)
               block l of d_l numbers: V_l in R^{d_l x K_l}, entries N(0, 1) truncated at +-1/sqrt(d_l), variance rho_l
               gamma_l = V_l^T Delta_l / (rho_l K_l)        or, `solve`, (V_l^T V_l)^-1 V_l^T Delta_l
    everyone:  w_l <- w_l + eta_s sum_i p_i V_l^(i) gamma_l^(i)

K_l is proportional to |Delta_l| (D'Hondt's rule; at least one for a block that moved, at most d_l); sum_l K_l = k. What
V_l is in a tensor belongs to (seed, name, place), so each tensor of a block is made alone, in tiles of `TILE` numbers.
Bytes a round and client, L blocks: up 4 k + 4 L + 8; down as much for each update of each version that the client
missed, or the dense w where that is less. With `seeds = "fixed"`, one list of vectors for all, the server averages
gamma, and a version is one such set. Under a server optimizer, or a schedule that adds differences of whole weights,
the dense w travels down.
Client memory: as FedAvg, and one tile; its work beside training is sum_l d_l K_l draws, and the same for each update of
a version on the server and on whoever applies its news: 1.5 ns a draw on one core.
Exact: the mean of the reconstructions; on average over seeds, a reconstruction is Delta; `solve` with K_l = d_l.
Approximate: one reconstruction is Delta and noise sqrt(d_l / K_l) times as long; with `solve` it is a projection of
Delta, K_l / d_l of it on average and never longer than it.
The published code differs: it scales by d_l / K_l where the paper has 1 / (rho_l K_l) = 3 d_l / K_l, so reconstructs a
third of Delta (`scale = "published"`): its server rates of 10 and 3 are 3.3 and 1 at the unbiased scale. One list of
k vectors serves all clients and rounds, of which a client draws k |Delta_l| / max_l |Delta_l|, at least two, for each
block. The step along each vector is clipped to norm 10 (not built: it bends the mean). Blocks follow the model's order
(here sorted names), draws the device and the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import draws
from hocket.combine import Lazy, finite, wide
from hocket.methods.base import PLAIN, Local, State, Update, method
from hocket.methods.replay import Replay
from hocket.methods.splits import apportion, blocks
from hocket.tree import Tree, key, norm

GAMMA, COUNTS, SEED = "gamma", "counts", "seed"
"""An upload: all gamma_l, one after the other; the K_l; the seed."""
TILE = 1 << 18
"""Numbers of V that are in memory at a time; part of what keys them."""
Term = tuple[int, Tensor]
"""The seed of a block's vectors, and what each is multiplied by."""


class Sent(Lazy):
    """An upload with the shapes of the tensors that it stands for, as tensors without memory."""

    def __init__(self, payload: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        super().__init__(payload, payload.__getitem__)
        self.like = {k: torch.empty_like(v, device="meta") for k, v in params.items()}


@method("ferret")
@dataclass(frozen=True, config=PLAIN)
class Ferret(Replay):
    """Local training of all weights; uploads are coordinates in random bases."""

    k: int = Field(default=4096, ge=1, description="numbers a client sends a round, over all blocks")
    split: Literal["norm", "size", "even"] = Field(
        default="norm", description="a block's share of k: by the norm of its update, by its size, or the same for all"
    )
    scale: Literal["unbiased", "published"] = Field(
        default="unbiased", description="of coordinates: 1 / (rho K), or the published code's d / K, a third of it"
    )
    solve: bool = Field(
        default=False, description="least-squares coordinates (V^T V)^-1 V^T Delta; takes K^2 numbers of memory a block"
    )
    seeds: Literal["fresh", "fixed"] = Field(
        default="fresh", description="new vectors for each client and round, or one list for all (published code)"
    )

    increments: ClassVar[bool] = False  # every job has vectors of its own

    @model_validator(mode="after")
    def _possible(self) -> Ferret:
        if self.seeds == "fixed" and self.split == "norm":
            raise ValueError("split: one list of vectors for all (seeds = 'fixed') needs 'size' or 'even'")
        if self.solve and self.scale == "published":
            raise ValueError("scale: least-squares coordinates (solve = true) have none; leave it out")
        return self

    def covers(self, name: str) -> bool:
        return True

    def init(self, params: Tree, seed: int) -> State:
        return super().init(params, seed) | {"seed": key(seed, "ferret")}

    def train(self, local: Local, start: Tree) -> Tree:
        delta = local.fit(start, self.trains(local), self.mu)
        groups = blocks(delta)
        counts, dtype = self._counts(delta, groups), _wide(delta)
        if any(x.is_meta for x in delta.values()):
            meta: Any = {"device": "meta"}
            return {
                GAMMA: torch.empty(sum(counts), dtype=dtype, **meta),
                COUNTS: torch.empty(len(counts), dtype=torch.int32, **meta),
                SEED: torch.empty(1, dtype=torch.int64, **meta),
            }
        own = (local.client, local.visit) if self.seeds == "fresh" else ()
        seed = key(local.seed, "ferret", *own)
        jobs = [(seed, {k: delta[k] for k in names}, n) for names, n in zip(groups, counts, strict=True)]
        gamma = draws.spread(lambda job: self._project(*job), jobs, [float(_size(b) * n) for _, b, n in jobs])
        return {
            GAMMA: torch.cat(gamma).to(dtype),
            COUNTS: torch.tensor(counts, dtype=torch.int32),
            SEED: torch.tensor([seed]),
        }

    def _counts(self, tree: Mapping[str, Tensor], groups: list[list[str]]) -> list[int]:
        """K_l of each block."""
        sizes = [sum(tree[k].numel() for k in names) for names in groups]
        if self.split == "even":
            return apportion(self.k, [1.0] * len(sizes), sizes)
        if self.split == "size" or any(x.is_meta for x in tree.values()):
            return apportion(self.k, [float(n) for n in sizes], sizes)
        return apportion(self.k, [norm({k: tree[k] for k in names}) for names in groups], sizes)

    def _project(self, seed: int, block: Tree, count: int) -> Tensor:
        """gamma of one block; the work of this is making V."""
        size, dtype = _size(block), torch.float64 if self.solve else _wide(block)
        delta = {k: block[k].detach().cpu().reshape(-1).to(dtype) for k in sorted(block)}

        def onto(gram: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
            """V^T (Delta - V gamma); V^T V is added to `gram`."""
            out = torch.zeros(count, dtype=dtype)
            for name, x in delta.items() if count else ():
                for place, v in tiles(seed, name, x.numel(), count, size**-0.5):
                    v = v.to(dtype)
                    out.addmv_(v, x[place] if gamma is None else torch.addmv(x[place], v.T, gamma, alpha=-1))
                    if gram is not None:
                        gram.addmm_(v, v.T)
            return out

        if not self.solve:
            rho = draws.variance(size**-0.5) if self.scale == "unbiased" else 1 / size
            return onto() / (rho * max(count, 1))
        gram = torch.zeros(count, count, dtype=dtype)
        gamma = _solved(gram, onto(gram))
        if 2 * count > size:  # V is nearly square, and V^T V has the square of its condition
            gamma += _solved(gram, onto(gamma=gamma))
        return gamma

    def accept(self, then: Tree, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Sent(payload, then) if GAMMA in payload else payload

    def effect(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if GAMMA not in payload:
            return payload  # it is whole differences already
        if not isinstance(payload, Sent):
            raise TypeError("an upload of Ferret does not know the model's shapes; give it to accept() first")
        like, terms = payload.like, _terms(payload[GAMMA], [payload[COUNTS]], payload[SEED])
        where = {k: i for i, names in enumerate(blocks(like)) for k in names}
        sizes = _sizes(like)

        def make(name: str) -> Tensor:
            if payload[GAMMA].is_meta:
                return torch.empty_like(like[name])
            job = name, like[name], sizes[name], terms[where[name]]
            return draws.spread(lambda job: _made(*job), [job], [1.0])[0].to(like[name].dtype)

        return Lazy(where, make)

    def own(self, world: Tree, sent: Mapping[str, Tensor]) -> Tree:
        news = {GAMMA: sent[GAMMA] * self.server_lr, COUNTS: sent[COUNTS].unsqueeze(0), SEED: sent[SEED]}
        return self.apply(world, news)

    def check(self, state: State, update: Update) -> str | None:
        sent, names = update.payload, (GAMMA, COUNTS, SEED)
        if odd := [k for k in sent if k not in names]:
            return f"unknown tensor '{odd[0]}'"
        if missing := [k for k in names if k not in sent]:
            return f"tensor '{missing[0]}' is missing"
        gamma, counts, seed = (sent[k] for k in names)
        sizes = [sum(state["params"][k].numel() for k in names) for names in blocks(state["params"])]
        if seed.shape != (1,) or seed.dtype != torch.int64:
            return f"tensor '{SEED}' is {seed.dtype} of shape {tuple(seed.shape)}, expected one int64"
        if counts.shape != (len(sizes),) or counts.dtype != torch.int32:
            return f"tensor '{COUNTS}' is {counts.dtype} of shape {tuple(counts.shape)}, expected {len(sizes)} int32"
        if bad := [i for i, (n, d) in enumerate(zip(counts.tolist(), sizes, strict=True)) if not 0 <= n <= d]:
            return f"tensor '{COUNTS}' has {int(counts[bad[0]])} vectors for block {bad[0]} of {sizes[bad[0]]} numbers"
        total = min(self.k, sum(sizes))
        if int(counts.sum()) != total:
            return f"tensor '{COUNTS}' sums to {int(counts.sum())}, expected {total}"
        if gamma.shape != (total,) or not gamma.is_floating_point():
            return f"tensor '{GAMMA}' is {gamma.dtype} of shape {tuple(gamma.shape)}, expected {total} numbers"
        if not finite(gamma):
            return f"tensor '{GAMMA}' holds values that are not finite"
        if self.seeds == "fixed":
            if int(seed) != state["seed"]:
                return f"tensor '{SEED}' is of another list of vectors"
            if counts.tolist() != self._counts(state["params"], blocks(state["params"])):
                return f"tensor '{COUNTS}' is not the '{self.split}' split"
        return None

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        shares, params = weights if shares is None else shares, state["params"]
        if self.server_optimizer != "sgd" or any(GAMMA not in u.payload for u in updates):
            # sums of whole differences: there are no coordinates that a client could be sent instead
            dense = [replace(u, payload=self.effect(self.accept(params, u.payload))) for u in updates]
            return self.untold(state, super().step(state, dense, weights, shares))
        if not (total := sum(shares)) > 0:
            raise ValueError(f"weights of the updates sum to {total}")
        unit = self.server_lr / total
        news: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        for i, (u, w) in enumerate(zip(updates, weights, strict=True)):
            gamma, counts, seed = u.payload[GAMMA] * (w * unit), u.payload[COUNTS], u.payload[SEED]
            same = "fixed" if self.seeds == "fixed" else i  # of the same vectors coordinates can be summed
            news[same] = (gamma + news[same][0] if same in news else gamma, counts, seed)
        gammas, counts, seeds = zip(*news.values(), strict=True)
        return self.told(state, state, {GAMMA: torch.cat(gammas), COUNTS: torch.stack(counts), SEED: torch.cat(seeds)})

    def apply(self, held: Tree, news: Mapping[str, Tensor]) -> Tree:
        groups, sizes = blocks(held), _sizes(held)
        if news[GAMMA].is_meta:
            return held | {k: torch.empty_like(held[k]) for names in groups for k in names}
        by_block = _terms(news[GAMMA], list(news[COUNTS]), news[SEED])
        moved = [(k, terms) for names, terms in zip(groups, by_block, strict=True) if terms for k in names]

        def new(job: tuple[str, list[Term]]) -> Tensor:
            old = held[job[0]]
            change = _made(job[0], old, sizes[job[0]], job[1])
            return (change.to(old.device) + wide(old)).to(old.dtype)

        cost = [float(held[k].numel() * sum(len(g) for _, g in terms)) for k, terms in moved]
        return held | dict(zip((k for k, _ in moved), draws.spread(new, moved, cost), strict=True))


def tiles(seed: int, name: str, size: int, count: int, bound: float) -> Iterator[tuple[slice, Tensor]]:
    """V^T of one tensor of `size` numbers, `count` rows, some columns at a time: good until the next."""
    width = min(size, max(1, TILE // count))
    memory = torch.empty(count * width)
    for at in range(0, size, width):
        n = min(width, size - at)
        yield slice(at, at + n), draws.truncated((count, n), bound, seed, name, at, out=memory)


def _terms(gamma: Tensor, counts: Sequence[Tensor], seeds: Tensor) -> list[list[Term]]:
    """For each block the updates that have vectors of it."""
    if gamma.is_meta:
        return [[]]
    rows = [c.tolist() for c in counts]
    cut = iter(gamma.cpu().split([n for row in rows for n in row]))
    parts = [[next(cut) for _ in row] for row in rows]
    every = list(zip(seeds.tolist(), parts, strict=True))
    return [[(seed, part[i]) for seed, part in every if len(part[i])] for i in range(len(rows[0]))]


def _made(name: str, like: Tensor, size: int, terms: Sequence[Term]) -> Tensor:
    """sum_i V_i gamma_i of one tensor in a block of `size` numbers, on the CPU, in fp32 at least."""
    out = torch.zeros(like.numel(), dtype=_wide({name: like}))
    for seed, gamma in terms:
        gamma = gamma.to(out.dtype)
        for place, v in tiles(seed, name, like.numel(), len(gamma), size**-0.5):
            out[place].addmv_(v.to(out.dtype).T, gamma)
    return out.view(like.shape)


def _solved(gram: Tensor, x: Tensor) -> Tensor:
    found, singular = torch.linalg.solve_ex(gram, x)
    return torch.linalg.pinv(gram, hermitian=True) @ x if singular else found


def _size(tree: Mapping[str, Tensor]) -> int:
    return sum(x.numel() for x in tree.values())


def _sizes(tree: Mapping[str, Tensor]) -> dict[str, int]:
    """For each tensor the size of its block."""
    return {k: sum(tree[j].numel() for j in names) for names in blocks(tree) for k in names}


def _wide(tree: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype in which a tree's tensors are summed."""
    dtypes = {x.dtype for x in tree.values() if x.is_floating_point()}
    return torch.float64 if torch.float64 in dtypes else torch.float32
