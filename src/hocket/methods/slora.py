"""SLoRA: sparse fine-tuning of the adapted weights first; what it has learned is where low-rank adapters start.

Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models", FL@FM-NeurIPS 2023,
https://arxiv.org/abs/2308.06522 (from its abstract and secondary descriptions; no official code was found).

    stage 1 (R_1 turns):  W = W_0 + M o V;   clients move V alone;   V <- V + sum_i p_i V_i       M: one random mask
    at its end:           s B A = SVD_r(M o V),   W is W_0 again                                  for all clients
    stage 2:              W = W_0 + s B A;   A <- sum_i p_i A_i,   B <- sum_i p_i B_i             (FedIT)

M is keyed by (seed, module), so only its values travel: n = delta in out numbers of a module, by default as many as the
factors have. Bytes a turn and client, each way: stage 1 s_c sum_m n_m; stage 2 s_c sum_m r (in_m + out_m); and once
the factors down. Client memory in stage 1: the adapted weights must be writable; the optimizer's state is that of n
numbers, and one dense gradient exists at a time. The server decomposes each module once, in O(out in min(out, in)).
Exact: stage 1's mean; unmasked entries stay bit for bit, whatever decays; the switch, at r = min(in, out). Approximate:
the switch otherwise (its error is the spectrum's tail, large for a thin random mask: it keeps the direction, not the
update), and stage 2's mean, as FedIT's. Reconstructed: singular values go half on each factor; directions that V does
not have keep their random row of A and B = 0; turns of stage 1 are versions where nobody waits. A client still at
stage 1 when stage 2 has begun is not refused: its change is projected onto what A can express, B += s^-1 (M o V_i) A^+.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import products
from hocket.combine import Lazy
from hocket.methods.base import PLAIN, Client, Local, State, Update, method
from hocket.methods.lora import BASE, A, B, LoRA, modules, pair
from hocket.tree import Tree, generator

ENTRIES = ".base_layer.entries"
"""V of a module: a vector."""
STAGE = "slora"
"""What clients must know beside tensors: which stage it is, and the key of the masks."""


@method("slora")
@dataclass(frozen=True, config=PLAIN)
class SLoRA(LoRA):
    """Sparse fine-tuning through one shared mask, then FedIT from its decomposition."""

    sparse_turns: int = Field(default=5, ge=0, description="turns R_1 of sparse fine-tuning; 0 is FedIT")
    density: Annotated[
        float | None, Field(gt=0, le=1, description="share of a weight that moves; none: as many as A and B have")
    ] = None

    merges: ClassVar[bool] = True

    @property
    def steady(self) -> bool:
        return self.sparse_turns == 0

    def init(self, params: Tree, seed: int) -> State:
        # W_0 is among the parameters and never changes
        stage = {STAGE: torch.tensor([1 if self.sparse_turns else 2, generator(seed, "slora").initial_seed()])}
        values = {m + ENTRIES: params[m + BASE].new_zeros(self.count(m, params)) for m in modules(params)}
        return super().init(params | stage | (values if self.sparse_turns else {}), seed) | {"version": 0}

    def beside(self, names: Iterable[str]) -> list[str]:
        return [k for k in super().beside(names) if k != STAGE and not k.endswith(ENTRIES)]

    def count(self, module: str, params: Mapping[str, Tensor]) -> int:
        """Entries of a module that move in stage 1."""
        w = params[module + BASE]
        if self.density is None:
            return min(w.numel(), self.rank_of(module) * sum(w.shape))
        return max(1, round(self.density * w.numel()))

    def mask(self, module: str, params: Mapping[str, Tensor]) -> Tensor:
        """Positions of these entries, the same for everybody."""
        w, n = params[module + BASE], self.count(module, params)
        if w.is_meta:
            return torch.empty(n, dtype=torch.long, device="meta")
        return _drawn(int(params[STAGE][1]), module, w.numel(), n)

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        sent = super().ship(state, client, version, since, changed)
        return sent if _stage(state["params"]) == 1 else {k: v for k, v in sent.items() if not k.endswith(ENTRIES)}

    def train(self, local: Local, start: Tree) -> Tree:
        view = self._view(start)
        if _stage(start) == 2:
            return local.fit(view, lambda name: not name.endswith(BASE), self.mu)
        masks = {m + BASE: self.mask(m, start) for m in modules(start)}
        delta = local.fit(view, lambda name: not name.endswith((A, B)), self.mu, masks=masks)
        return {k.replace(BASE, ENTRIES): v for k, v in delta.items()}

    def own(self, world: Tree, sent: Mapping[str, Tensor]) -> Tree:
        return super().own(world, self._timely(world, sent))

    def check(self, state: State, update: Update) -> str | None:
        odd = (BASE, STAGE) if _stage(state["params"]) == 2 else (BASE, STAGE, A, B)
        for k in update.payload:
            if k.endswith(odd):
                return f"'{k}' is not a client's to change"
        return super().check(state, update)

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        updates = [replace(u, payload=self._timely(state["params"], u.payload)) for u in updates]
        after = super().step(state, updates, weights, shares) | {"version": state["version"] + 1}
        if _stage(state["params"]) == 1 and after["version"] == self.sparse_turns:
            slots = {k: v for k, v in after["slots"].items() if not k.endswith(ENTRIES)}
            return after | {"params": self._switched(after["params"]), "slots": slots}
        return after

    def export(self, state: State) -> Tree:
        return self._view(state["params"])

    def _view(self, params: Tree) -> Tree:
        """The tensors of the model: in stage 1 the weights hold what was learned, in stage 2 they are W_0."""
        view = {k: v for k, v in params.items() if k != STAGE and not k.endswith(ENTRIES)}
        if _stage(params) == 1:
            view |= {m + BASE: self._sum(m, params, params[m + BASE]) for m in modules(params)}
        return view

    def _sum(self, m: str, params: Tree, w: Tensor) -> Tensor:
        """W + M o V."""
        return w.flatten().index_add(0, self.mask(m, params), params[m + ENTRIES].to(w.dtype)).view_as(w)

    def _switched(self, params: Tree) -> Tree:
        """Stage 2's parameters: the factors stand for all that the model has learned."""
        out = params | {STAGE: torch.tensor([2, int(params[STAGE][1])])}
        for m in modules(params):
            (a, b), unit = pair(params, m), self.scale(m)
            learned = self._sum(m, params, torch.zeros_like(params[m + BASE]))
            u, s, vt = products.svd([(learned + unit * b @ a, torch.eye(a.shape[1]).to(learned))])
            if s.is_meta:
                out[m + A], out[m + B] = torch.empty_like(a), torch.empty_like(b)
                continue
            n = min(len(a), int((s > s[0] * max(learned.shape) * torch.finfo(s.dtype).eps).sum()))
            root = s[:n].sqrt()
            out[m + A] = torch.cat([(root.unsqueeze(1) * vt[:n]).to(a), a[n:]])
            out[m + B] = torch.cat([(u[:, :n] * root / unit).to(b), b.new_zeros(len(b), len(a) - n)], dim=1)
        return out

    def _timely(self, params: Tree, sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An upload as the stage of `params` has it: in stage 2, changes of V become the nearest changes of B."""
        late = {k.removesuffix(ENTRIES) + B: k for k in sent if k.endswith(ENTRIES)}
        if _stage(params) == 1 or not late:
            return sent

        def make(name: str) -> Tensor:
            return self._projected(name.removesuffix(B), params, sent[late[name]]) if name in late else sent[name]

        return Lazy([*late, *(k for k in sent if not k.endswith(ENTRIES))], make)

    def _projected(self, m: str, params: Tree, values: Tensor) -> Tensor:
        """The X of which s X A is nearest to M o V."""
        a, b = pair(params, m)
        if a.is_meta:
            return torch.empty_like(b)
        mask = self.mask(m, params)
        rows, columns = mask // a.shape[1], mask % a.shape[1]
        product = torch.zeros_like(b).index_add_(0, rows, values.to(b).unsqueeze(1) * a.T[columns])  # (M o V) A^T
        gram = torch.linalg.pinv((a @ a.T).double(), hermitian=True).to(a)
        return product @ gram / self.scale(m)


def _stage(params: Mapping[str, Tensor]) -> int:
    return int(params[STAGE][0])


@lru_cache(maxsize=1024)
def _drawn(key: int, module: str, size: int, n: int) -> Tensor:
    """`n` of `size` positions, ascending; pure, so the cache only saves time."""
    return torch.randperm(size, generator=generator(key, module))[:n].sort().values
