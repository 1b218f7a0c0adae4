"""SpaFL: clients share one threshold for each neuron and keep their weights; what is below its threshold is pruned.

Kim, Saad, Debbah, Hong, "SpaFL: Communication-Efficient Federated Learning with Sparse Models and Low Computational
Overhead", NeurIPS 2024, https://arxiv.org/abs/2406.00431 (details from its code, news-vt/SpaFL_NeruIPS_2024).

For a row w_k (one output neuron, n inputs) of each linear weight of the layers, with x_k = mean_j |w_kj| - tau_k:

    client i:  minimizes f_i(w o m) + alpha sum exp(-tau) over w and tau jointly,   m_k = 1[x_k > 0],  tau = 0 at first
               a layer of which at most 1 % of the rows are left gets tau = 0
    server:    tau <- tau + eta sum_i p_i (tau_i - tau)
    everybody: w_k <- w_k - d_k sign(sum_j w_kj) / n,   d = what tau has changed by since the client last heard it

    gradients: df/dtau_k = -s_k h_k,   df/dw_kj = m_k G_kj + s_k h_k sign(w_kj) / n,
               with G = df/d(w o m), dense also in pruned rows, and h_k = sum_j G_kj w_kj
               s_k = 1[|x_k| <= 1]   straight-through (`gradient = "straight"`)
               s_k = 1[|x_k| > 1]    the published code (`gradient = "published"`): weights are far smaller than 1, so
                                     nothing of f reaches tau, and only the regularizer moves it
               s_k = 0 where tau is frozen: the mask is a constant then, and without regularizer this is local SGD

Bytes a round and client, each way: 4 sum rows. Client memory: dense training + rows; between jobs all weights and tau.
Nothing is computed faster: pruned rows are computed and dropped. Embeddings, norms, biases and heads train plainly;
they and the weights never leave the client, so there is no global model, and a client's own is scored and exported,
with rows at zero by the thresholds it trained last (the server's, if it never trained).
Exact: the mean of tau; the shift of w over one version. Over several versions at once a client applies the sum of their
d: the same, unless sum_j w_kj changes sign in between (where one |d_k| exceeds it). Under overlap d holds the client's
own updates in flight, and turns into the mean as they are heard. The published code resets a layer one pass later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.methods.base import PLAIN, Local, Method, State, Update, method
from hocket.methods.fedsa import OWN
from hocket.tree import Tree

ROWS = ".threshold"
"""tau of a module: a vector."""
HEARD = "heard/"
"""Of the thresholds, in a client's memory, that its weights have been moved by."""
OPEN = -1.0
"""A threshold that keeps every row."""


@method("spafl")
@dataclass(frozen=True, config=PLAIN)
class SpaFL(Method):
    """Personal models pruned by common thresholds; one number a neuron travels."""

    alpha: float = Field(default=1e-4, ge=0, description="of the regularizer exp(-tau), which raises the thresholds")
    regularizer: Literal["sum", "mean"] = Field(
        default="sum", description="over all thresholds: summed as published, or their mean"
    )
    gradient: Literal["straight", "published"] = Field(
        default="straight", description="through the mask where |x| <= 1, or as the published code only beyond"
    )

    view: ClassVar[Literal["thresholds"]] = "thresholds"
    personal: ClassVar[bool] = True

    def train(self, local: Local, start: Tree) -> Tree:
        begin, memory = self._heard(start, local.memory), local.memory
        for k in begin:
            memory.pop(OWN + k, None)  # there is one copy of the weights, not two
        delta = local.fit(begin, self.trains(local), self.mu, self._penalty if self.alpha else None)
        sent = {k: delta.pop(k) for k in thresholds(delta)}
        memory.update({OWN + k: begin[k] + delta.pop(k) for k in sorted(delta)})
        for k, d in sent.items():
            left = alive(memory[OWN + weight(k)], begin[k] + d)
            sent[k] = torch.where(left, d, -begin[k])
            memory[OWN + k] = (begin[k] + d) * left
        memory.update({HEARD + k: begin[k] for k in thresholds(begin)})
        return sent

    def personalized(self, view: Tree, memory: Mapping[str, Tensor]) -> Tree:
        mine = self._heard(view, memory)
        for k in thresholds(view):
            w, tau = mine[weight(k)], memory.get(OWN + k, view[k])
            keep = gap(w, tau * alive(w, tau)) > 0
            mine |= {weight(k): w * keep.unsqueeze(1), k: torch.full_like(tau, OPEN)}
        return mine

    def check(self, state: State, update: Update) -> str | None:
        for k in update.payload:
            if not k.endswith(ROWS):
                return f"'{k}' is its client's own and not to be shared"
        return super().check(state, update)

    def _heard(self, view: Tree, memory: Mapping[str, Tensor]) -> Tree:
        """A client's own tensors, its weights moved by what the thresholds of `view` have changed since it heard."""
        mine = {k: v if k.endswith(ROWS) else memory.get(OWN + k, v) for k, v in view.items()}
        for k in thresholds(view):
            d = view[k] - memory[HEARD + k] if HEARD + k in memory else view[k]  # all began at 0
            if d.is_meta or d.any():
                w = mine[weight(k)]
                mine[weight(k)] = w - (d * w.sum(1).sign() / w.shape[1]).to(w.dtype).unsqueeze(1)
        return mine

    def _penalty(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """alpha sum exp(-tau)."""
        every = torch.cat([tensors[k] for k in thresholds(tensors)])
        each = torch.exp(-every)
        return self.alpha * (each.sum() if self.regularizer == "sum" else each.mean())


def thresholds(names: Iterable[str]) -> list[str]:
    """Those of these tensors that are thresholds."""
    return [k for k in names if k.endswith(ROWS)]


def weight(threshold: str) -> str:
    """The tensor that a threshold is of."""
    return threshold.removesuffix(ROWS) + ".weight"


def gap(w: Tensor, tau: Tensor) -> Tensor:
    """x_k = mean_j |w_kj| - tau_k."""
    return torch.linalg.vector_norm(w, 1, dim=1, dtype=tau.dtype) / w.shape[1] - tau


def alive(w: Tensor, tau: Tensor) -> Tensor:
    """Whether more than 1 % of the rows are left, as a tensor: nobody looks at it, so that shapes alone can pass."""
    return (gap(w, tau) > 0).sum() * 100 > len(tau)


class Rows(torch.autograd.Function):
    """(w o m) x + b of a linear module, and the gradients above. What is kept for the backward pass is what the plain
    module keeps: x and the weight itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, tau: Tensor, b: Tensor | None, plain: Callable[[Tensor], Tensor], beyond: bool
    ) -> Tensor:
        """`plain` is the module without a mask, w (out x in) and b its parameters; `beyond`: the published gradient."""
        d = gap(w, tau)
        ctx.save_for_backward(x, w, d)
        ctx.beyond, ctx.bias = beyond, None if b is None else b.dtype
        y = plain(x)
        return torch.where(d > 0, y, y.new_zeros(()) if b is None else b.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradients of x, w, tau and b."""
        x, w, d = ctx.saved_tensors
        keep, flat = d > 0, dy.flatten(0, -2)
        dx = (dy * keep) @ w.to(dy.dtype) if ctx.needs_input_grad[0] else None
        db = flat.sum(0).to(ctx.bias) if ctx.needs_input_grad[3] else None
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, db, None, None
        dw, through = (flat.T @ x.flatten(0, -2).to(dy.dtype)).to(w.dtype), torch.zeros_like(d)  # G
        if ctx.needs_input_grad[2]:
            passes = d.abs() > 1 if ctx.beyond else d.abs() <= 1
            through = torch.where(passes, (dw * w).sum(1, dtype=d.dtype), through)
        dw.mul_(keep.unsqueeze(1)).addcmul_(w.sign(), (through / w.shape[1]).to(w.dtype).unsqueeze(1))
        return dx, dw, -through, db, None, None
