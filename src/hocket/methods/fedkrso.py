"""FedKRSO: full weights move through random subspaces that a seed names; only coordinates in them travel.

"FedKRSO: Communication and Memory Efficient Federated Fine-Tuning of Large Language Models", 2026,
https://arxiv.org/abs/2602.03019 (from its abstract, a digest of its algorithms, and the code of a private variant).

    turn:      K subspaces P_k in R^{r x n}, entries N(0, 1/r), so E[P^T P] = I;   they follow from one seed
    client:    I intervals of J steps; in each one k of K at random, P = P_k:
                 G_B = grad f(W) P^T  (m x r);   W <- W - eta G_B P;   B_k <- B_k - eta G_B       (SGD, or AdamW on G_B)
    everyone:  W <- W + sum_k (sum_i p_i B^i_k) P_k        a client that did not use k counts with B^i_k = 0

Within an interval that is LoRA's F(W + B P) with A = P frozen and B from zero; at its end B P goes into the client's W,
B into B_k, and both begin anew, the optimizer's state too. The gradient of W never exists. The sum is exactly FedAvg of
the clients' weights, because W = W_0 + sum_k B_k P_k holds on each of them, whatever the optimizer. Decay is B's: it
pulls what an interval has learned back to zero, never W, which would break that identity.

Bytes a turn and client: up s_c sum_m min(K, I) m r at most (of I draws K (1 - (1 - 1/K)^I) are expected to differ);
down the sums in all subspaces that anybody used, s_c sum_m K m r at most, and a seed; the dense W where that is less.
W itself has m n numbers: K r >= n may save nothing. New heads are averaged beside, and `biases`, m numbers each.
Client memory: weights (those adapted are written into; what the server has, the next turn needs again) + 16 bytes a
number of B + the accumulators, min(K, I) m r + one P.
E|G P^T P|^2 = (n + r + 1)/r |G|^2: SGD's rate is multiplied by r/(n + r + 1), so that eta = 1/L gives the most descent
that an L-smooth f promises. A step of AdamW has the length of a dense one whatever r and n, and keeps its rate.
Approximate: in half precision each merge rounds the client's own W; the accumulators are fp32.
Published code differs: it averages whole merged models, draws seeds from 1..63, and all layers' P from one generator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import draws
from hocket.combine import Lazy, finite, mean, wide
from hocket.methods.base import PLAIN, Local, State, Update, method
from hocket.methods.lora import BASE, A, B, LoRA, modules
from hocket.methods.merging import Merging, add
from hocket.methods.replay import without
from hocket.tree import Tree, generator, key

SEED = "fedkrso"
"""Of the state's parameters: the key of this version's subspaces, one int64."""
PART = re.compile(r"(.+)\.lora_B\.([0-9a-f]{16})\.(\d{1,9})\.(\d{1,9})")
"""Coordinates B_k of a module: which key, which k, and how wide P_k is. So each says itself what it belongs to."""
PLAIN_LORA = LoRA()


@method("fedkrso")
@dataclass(frozen=True, config=PLAIN)
class FedKRSO(Merging):
    """Full weights trained in K random subspaces a turn: clients send coordinates, seeds say of what."""

    rank: int = Field(default=4, ge=1, description="rows r of a random subspace P")
    subspaces: int = Field(default=10, ge=1, description="subspaces K of a turn, the same for all clients")
    interval: int = Field(default=10, ge=1, description="optimizer steps J between two draws of a subspace")
    rescale: bool = Field(
        default=True, description="SGD's rate times r / (n + r + 1) for a weight of n inputs; no matter to AdamW"
    )

    biases: bool = Field(default=False, description="whether the biases of the weights that move train, too")

    increments: ClassVar[bool] = False  # each job's coordinates are in subspaces of its own

    @model_validator(mode="after")
    def _sound(self) -> FedKRSO:
        if self.mu:
            raise ValueError("mu: B begins at zero in every interval, so a pull to it is not FedProx's; use 0")
        refuse_scales(self)
        return self

    def vain(self, params: Mapping[str, Tensor], training: Any) -> str | None:
        intervals = self.subspaces if training.local_epochs else -(-training.local_steps // self.interval)
        used, all_ = min(self.subspaces, intervals), modules(params)
        full = [m for m in all_ if used * self.rank_of(m) >= params[m + BASE].shape[1]]
        if not full:
            return None
        return (
            f"method.subspaces: {used} of method.rank have as many coordinates as there are numbers in {len(full)} of "
            f"{len(all_)} weights, in '{full[0]}' for example, so that sending them saves nothing; lower either"
        )

    def scale(self, module: str, rank: int | None = None) -> float:
        """1: B P is the update itself."""
        return 1.0

    def init(self, params: Tree, seed: int) -> State:
        state = super().init(params, seed) | {"key": key(seed, SEED)}
        return self._seeded(state)

    def _seeded(self, state: State) -> State:
        """The state with the key of its version's subspaces."""
        return state | {"params": state["params"] | {SEED: torch.tensor([_key(state, state["version"])])}}

    def beside(self, names: Iterable[str]) -> list[str]:
        return [k for k in super().beside(names) if k != SEED and not PART.fullmatch(k)]

    def trains(self, local: Local) -> Callable[[str], bool]:
        return lambda name: not name.endswith((BASE, A))

    def train(self, local: Local, start: Tree) -> Tree:
        """Coordinates in the subspaces that were used, and the differences of whatever else trains (a new head)."""
        walk = Walk(self, local, start)
        view = {k: v for k, v in start.items() if k != SEED}
        return walk.ended(local.fit(view | walk.subspaces(0), self.trains(local), between=walk))

    def own(self, world: Tree, sent: Mapping[str, Tensor]) -> Tree:
        parts = {k: self.server_lr * sent[k] for k in sent if PART.fullmatch(k)}
        return super().own(self.apply(world, parts), without(sent, parts))

    def check(self, state: State, update: Update) -> str | None:
        """Coordinates must belong to the subspaces of the version that their job started from."""
        params, sent, expected = state["params"], update.payload, f"{_key(state, update.version):016x}"
        parts = [k for k in sent if PART.fullmatch(k)]
        for k in parts:
            m, seed, place, width = _parsed(k)
            if m + BASE not in params:
                return f"unknown tensor '{k}'"
            if seed != expected:
                return f"tensor '{k}' is of subspaces that version {update.version} does not have"
            if (
                int(place) >= self.subspaces
                or int(width) != params[m + BASE].shape[1]
                or k != _part(m, seed, place, width)
            ):
                return f"tensor '{k}' is of a subspace that does not exist"
            x = sent[k]
            if x.shape != params[m + B].shape or not x.is_floating_point():
                return f"tensor '{k}' has shape {tuple(x.shape)}, expected {tuple(params[m + B].shape)}"
            if not finite(x):
                return f"tensor '{k}' holds values that are not finite"
        for k in sent:
            if k.endswith((A, B)) or k == SEED:
                return f"'{k}' is not a client's to change"
        return super().check(state, replace(update, payload=without(sent, parts)))

    def effect(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        parts = _by_module(payload)

        def make(name: str) -> Tensor:
            m = name.removesuffix(BASE)
            if m not in parts:
                return payload[name]
            first = payload[parts[m][0]]
            return _summed(first.new_zeros(len(first), int(_parsed(parts[m][0])[3])), m, parts[m], payload)

        return Lazy([*(m + BASE for m in parts), *(k for k in payload if not PART.fullmatch(k))], make)

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        shares = weights if shares is None else shares
        if self.server_optimizer != "sgd" or any(k.endswith(BASE) for u in updates for k in u.payload):
            # differences of whole weights: there are no coordinates that a client could be sent instead
            dense = [replace(u, payload=self.effect(u.payload)) for u in updates]
            return self._seeded(self.untold(state, super().step(state, dense, weights, shares)))
        held = list(zip([u.payload for u in updates], weights, shares, strict=True))
        news: Tree = {}
        for m, parts in _by_module({k: None for u in updates for k in u.payload}).items():
            total = sum(s for sent, _, s in held if any(k in sent for k in parts))
            if not total > 0:
                raise ValueError(f"weights of module '{m}' sum to {total}")
            for k in parts:  # who did not use this subspace has 0 there, and counts
                news[k] = torch.zeros_like(state["params"][m + B])
                for sent, w, _ in held:
                    if k in sent:
                        news[k].add_(wide(sent[k]).to(news[k]), alpha=self.server_lr * w / total)
        params = dict(state["params"])
        for k, delta in mean([without(u.payload, news) for u in updates], weights, shares):
            params[k] = params[k] + self.server_lr * delta.to(params[k].dtype)
        return self._seeded(self.told(state, state | {"params": params}, news))

    def apply(self, held: Tree, news: Mapping[str, Tensor]) -> Tree:
        out = dict(held)
        for m, parts in _by_module(news).items():
            w = out[m + BASE]
            dtype = torch.promote_types(w.dtype, torch.float32)
            out[m + BASE] = _summed(w.to(dtype, copy=True), m, parts, news).to(w.dtype)
        return out

    def export(self, state: State) -> Tree:
        return {k: v for k, v in state["params"].items() if k != SEED}


class Walk:
    """One job: which subspace each interval uses, and the coordinates in them so far.

    Attributes:
        order: k of each interval.
        held: B_k of the subspaces that the job uses, on the CPU (see `Between`).
        rates: r / (n + r + 1) for each B, or nothing.
    """

    def __init__(self, method: FedKRSO, local: Local, start: Tree) -> None:
        self.method, self.start, self.modules, self.key = method, start, modules(start), int(start[SEED])
        intervals = -(-local.trainer.steps(local) // method.interval)
        g = generator(local.seed, SEED, local.client, local.visit)
        self.order = torch.randint(method.subspaces, (intervals,), generator=g).tolist()
        self.held: Mapping[str, Tensor] = {
            self._name(m, k): torch.zeros_like(start[m + B]) for m in self.modules for k in sorted(set(self.order))
        }
        ranks = {m: (start[m + B].shape[1], self._width(m)) for m in self.modules}
        self.rates: Mapping[str, float] = (
            {m + B: r / (n + r + 1) for m, (r, n) in ranks.items()} if method.rescale else {}
        )

    def subspaces(self, i: int) -> Tree:
        """P of every module in interval i, as A."""
        return {m + A: self._drawn(i, m) for m in self.modules}

    def __call__(self, step: int, live: Tree) -> Iterable[str]:
        """At an interval's end: B P into W, B into its accumulator, and on from zero in the next subspace."""
        i, rest = divmod(step, self.method.interval)
        if rest or not i:
            return ()
        for m in self.modules:
            w, a, b = live[m + BASE], live[m + A], live[m + B]
            self._kept(i - 1, m, b)
            if w.dtype == b.dtype == a.dtype:
                w.addmm_(b, a)
            else:  # half precision
                w.copy_(add(w, a, b))
            b.zero_()
            a.copy_(self._drawn(i, m))
        return [m + B for m in self.modules]

    def ended(self, delta: Tree) -> Tree:
        """The upload, given what the last interval left."""
        for m in self.modules:
            self._kept(-1, m, delta[m + B])
        return {k: v for k, v in delta.items() if not k.endswith(B)} | dict(self.held)

    def _kept(self, i: int, m: str, b: Tensor) -> None:
        self.held[self._name(m, self.order[i])].add_(b.to(self.start[m + B].device))

    def _drawn(self, i: int, m: str) -> Tensor:
        like = self.start[m + B]
        return random_subspace(self.key, self.order[i], m, like.shape[1], self._width(m), like)

    def _width(self, m: str) -> int:
        return self.start[m + BASE].shape[1]

    def _name(self, m: str, k: int) -> str:
        return _part(m, f"{self.key:016x}", k, self._width(m))


def refuse_scales(self: LoRA) -> None:
    """Refuse what would do nothing where a product of factors moves W itself. Raises `ValueError`."""
    for name in ("scaling", "dropout"):  # alpha comes with adapters that a run begins from
        if getattr(self, name) != getattr(PLAIN_LORA, name):
            raise ValueError(f"{name}: W moves by B P itself, which nothing scales or drops; leave it out")


def _key(state: State, version: int) -> int:
    """Of the subspaces of jobs that start from this version."""
    return key(state["key"], version)


def _part(module: str, seed: str, k: int | str, width: int | str) -> str:
    """The name of coordinates."""
    return f"{module}.lora_B.{seed}.{int(k)}.{int(width)}"


def _parsed(name: str) -> tuple[str, str, str, str]:
    """(module, key, k, width) of coordinates."""
    found = PART.fullmatch(name)
    assert found
    return found[1], found[2], found[3], found[4]


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of coordinates, in the one order in which everybody adds them."""
    out: dict[str, list[str]] = {}
    for k in sorted(names):
        if found := PART.fullmatch(k):
            out.setdefault(found[1], []).append(k)
    return out


def random_subspace(seed: int, k: int, module: str, rank: int, width: int, like: Tensor) -> Tensor:
    """P_k of a module (r x n): a function of its keys alone, whatever the order of modules."""
    if like.is_meta:
        return like.new_empty(rank, width)
    return draws.normal((rank, width), seed, k, module).div_(rank**0.5).to(like)


def _summed(w: Tensor, m: str, parts: Sequence[str], tree: Mapping[str, Tensor]) -> Tensor:
    """W + sum_k B_k P_k, written into `w`; one P at a time."""
    for name in parts:
        b = tree[name].to(w)
        _, seed, k, width = _parsed(name)
        w.addmm_(b, random_subspace(int(seed, 16), int(k), m, b.shape[1], int(width), w))
    return w
