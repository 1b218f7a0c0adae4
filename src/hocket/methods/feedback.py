"""FedKRSO with feedback: coordinates in a random subspace of inputs say which outputs to move next.

hocket's own, from FedKRSO (https://arxiv.org/abs/2602.03019, see `fedkrso`) and the randomized range finder (Halko,
Martinsson, Tropp, "Finding Structure with Randomness", SIAM Review 2011, https://arxiv.org/abs/0909.4061): for a
gradient G of fast falling spectrum, G P^T with few random rows P already spans the outputs in which most of G lies.

    W <- W + B A,  one of the factors known to everybody, the other from zero:
    version 0, 2, ...:  A = P, entries N(0, 1/r), from a seed;  clients train and send B_i;   W <- W + (sum_i p_i B_i) P
    version 1, 3, ...:  B = sqrt(m/r) Q, Q the left singular vectors of what was added last;  clients train A_i:
                        W <- W + B (sum_i p_i A_i)

So a turn along r of n inputs, blind, is followed by one along the r outputs that it has found, over all n inputs. The
factor sqrt(m/r) gives a step of AdamW on A the length of a dense one, as entries N(0, 1/r) of P do for B.

Bytes a turn and client: up and down s_c r m or s_c r n a module, in turn; the dense W where that is less. Who missed
turns gets what each added and makes P and Q itself. `biases` travel beside, m numbers each, and new heads.
Client memory: as FFA-LoRA, with the adapted weights written into. The server keeps the weights of every version that an
upload may still be of.
Exact: every step is FedAvg of the clients' weights, for one factor is common. A late upload counts with the factor of
its own version; then products are stacked, and both factors travel. Approximate: Q is of the last turn's steps, not of
the next gradient. Schedules that mix models and server optimizers other than SGD add dense matrices, in which nobody
looks for outputs: all versions are then like the even ones. Not for `overlap`: by the time that an update in flight is
added, its other factor is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import products
from hocket.combine import Lazy, finite, mean, wide
from hocket.methods.base import PLAIN, Local, State, Update, method
from hocket.methods.fedkrso import random_subspace, refuse_scales
from hocket.methods.flora import FLoRA
from hocket.methods.lora import BASE, A, B, modules
from hocket.methods.replay import without
from hocket.products import Product
from hocket.tree import Tree, key

TURN = "feedback.turn"
"""Of the state's parameters: (the run's key, how often the factors changed), int64."""


@method("fedkrso-feedback")
@dataclass(frozen=True, config=PLAIN)
class Feedback(FLoRA):
    """Full weights moved along random inputs and, in turn, along the outputs that these have pointed out."""

    rank: int = Field(default=4, ge=1, description="rows r of P, and columns of Q")
    biases: bool = Field(default=False, description="whether the biases of the weights that move train, too")

    unequal: ClassVar[bool] = False
    anchored: ClassVar[bool] = True

    @model_validator(mode="after")
    def _sound(self) -> Feedback:
        refuse_scales(self)
        return self

    @property
    def additive(self) -> bool:
        return False

    @property
    def not_additive(self) -> str:
        return (
            f"'{self.name}' moves along other directions in every version; use schedule 'sync' or an asynchronous one"
        )

    def scale(self, module: str, rank: int | None = None) -> float:
        """1: B A is the update itself."""
        return 1.0

    def covers(self, name: str) -> bool:
        return name.endswith((BASE, A, B)) or name == TURN

    def beside(self, names: Iterable[str]) -> list[str]:
        return [k for k in super().beside(names) if k != TURN]

    def init(self, params: Tree, seed: int) -> State:
        state = super().init(params, seed)
        return state | {"params": self._probing(params | {TURN: torch.tensor([key(seed, TURN), -1])})}

    def train(self, local: Local, start: Tree) -> Tree:
        """The factor that began at zero, and the differences of whatever else trains."""
        frozen = (BASE, A) if _probes(start) else (BASE, B)
        view = {k: v for k, v in start.items() if k != TURN}
        return local.fit(view, lambda name: not name.endswith(frozen), self.mu)

    def check(self, state: State, update: Update) -> str | None:
        """One factor of each module, of the state's shape. The wrong one would meet a zero, and move nothing."""
        params, sent = state["params"], update.payload
        factors = {m + x for m in modules(params) for x in (A, B)}
        for m in modules(sent):
            if m + A in sent and m + B in sent:
                return f"'{m}' comes with both factors; one of them is not a client's to change"
        for k in factors & set(sent):
            if sent[k].shape != params[k].shape or not sent[k].is_floating_point():
                return f"tensor '{k}' has shape {tuple(sent[k].shape)}, expected {tuple(params[k].shape)}"
            if not finite(sent[k]):
                return f"tensor '{k}' holds values that are not finite"
        if TURN in sent:
            return f"'{TURN}' is not a client's to change"
        return super().check(state, replace(update, payload=without(sent, factors)))

    def accept(self, then: Tree, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The upload with the factor that its version had beside it."""
        trained = B if _probes(then) else A  # the other is never the client's, whatever it has sent
        factors = [m + x for m in modules(payload) for x in (A, B)]
        known = {k: then[k] for k in factors if not k.endswith(trained) or k not in payload} | {TURN: then[TURN]}
        return Lazy({**dict.fromkeys(payload), **known}, lambda k: known[k] if k in known else payload[k])

    def effect(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return super().effect(without(payload, {TURN}))

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        shares = weights if shares is None else shares
        if self.server_optimizer != "sgd" or any(k.endswith(BASE) for u in updates for k in u.payload):
            whole = super().step(state, updates, weights, shares)
            return whole | {"params": self._probing(whole["params"])}
        params, news = dict(state["params"]), Tree()
        for m in modules(params):
            held = [(u.payload, w, s) for u, w, s in zip(updates, weights, shares, strict=True) if m + A in u.payload]
            if held:
                unit = self.server_lr / sum(s for _, _, s in held)
                turns = {int(sent[TURN][1]) for sent, _, _ in held}
                if len(turns) > 1:
                    b, a = products.stack([(sent[m + B], sent[m + A] * (w * unit)) for sent, w, _ in held])
                    news |= {m + A: a, m + B: b}
                    continue
                common, trained = (A, B) if min(turns) % 2 == 0 else (B, A)
                news[m + trained] = _mean((sent[m + trained], w * unit) for sent, w, _ in held)
                if turns != {int(params[TURN][1])}:  # of an older version, whose factor nobody holds any more
                    news[m + common] = held[0][0][m + common]
        factors = {m + x for m in modules(params) for x in (A, B)} | {TURN}
        for k, delta in mean([without(u.payload, factors) for u in updates], weights, shares):
            params[k] = params[k] + self.server_lr * delta.to(params[k].dtype)
        return self.told(state, state | {"params": params}, news)

    def apply(self, held: Tree, news: Mapping[str, Tensor]) -> Tree:
        both = {k: news.get(k, held[k]) for m in modules(news) for k in (m + A, m + B)}
        out = super().apply(held, both)
        if not _probes(held):
            return self._probing(out)
        for m in modules(news):
            a, b = both[m + A], both[m + B]
            q = products.svd([(b, a)])[0][:, : held[m + B].shape[1]]
            like = held[m + B]
            out[m + A] = torch.zeros_like(held[m + A])
            out[m + B] = torch.zeros_like(like)
            out[m + B][:, : q.shape[1]] = q * (len(like) / like.shape[1]) ** 0.5
        return out | {TURN: _next(held)}

    def _probing(self, params: Tree) -> Tree:
        """`params` with new random A, and B at zero."""
        out = params | {TURN: _next(params, even=True)}
        seed, turn = out[TURN].tolist()
        for m in modules(params):
            a = params[m + A]
            out[m + A] = random_subspace(key(seed, turn), 0, m, a.shape[0], a.shape[1], a)
            out[m + B] = torch.zeros_like(params[m + B])
        return out

    def _sides(
        self, m: str, before: State, payloads: Sequence[Mapping[str, Tensor]], share: Sequence[float], after: State
    ) -> tuple[list[Product], list[Product]]:
        last = after["last"]
        if m + A not in last and m + B not in last:
            return [], []
        ideal = [(sent[m + B], p * sent[m + A]) for sent, p in zip(payloads, share, strict=True)]
        a, b = (last.get(m + x, before["params"][m + x]) for x in (A, B))
        return ideal, [(b, a)]

    def export(self, state: State) -> Tree:
        factors = {m + x for m in modules(state["params"]) for x in (A, B)}  # of a product that is zero
        return {k: torch.zeros_like(v) if k in factors else v for k, v in state["params"].items() if k != TURN}


def _probes(tree: Mapping[str, Tensor]) -> bool:
    """Whether jobs from here train B."""
    return int(tree[TURN][1]) % 2 == 0


def _next(params: Mapping[str, Tensor], even: bool = False) -> Tensor:
    """The turn after; or the next one that probes."""
    seed, turn = params[TURN].tolist()
    return torch.tensor([seed, turn + 1 + (turn % 2 == 0 if even else 0)])


def _mean(terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    """sum p x, one term at a time."""
    total: Tensor | None = None
    for x, p in terms:
        total = torch.zeros_like(wide(x)) if total is None else total
        total.add_(x.to(total), alpha=p)
    assert total is not None  # there is an update
    return total
