"""FedEx-LoRA: FedIT, and what averaging the factors loses is merged into the weights.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", 2024,
https://arxiv.org/abs/2410.09432.

    A <- sum_i p_i A_i,   B <- sum_i p_i B_i,   W <- W + s (sum_i p_i B_i A_i - B A)

The residual is s sum_i p_i dB_i (dA_i - dA) with dA = sum_i p_i dA_i, of the differences to the round's start; where
the p_i sum to 1, dB_i may be taken less the last client's, so its rank is at most (k - 1) r and not k r, and it travels
as factors of that rank.

Bytes a round and client: up s_c sum_m r (in_m + out_m); down as much, and the residual's s_c sum_m (k - 1) r (in_m +
out_m), or the dense W where that is less or rounds were missed. Weights must be writable. Exact: the mean of products,
when all started from the same version. Under a server optimizer the residual is what averaging lost, added as it is.
The published aggregation transposes the residual, which is right for GPT-2's Conv1D only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.methods.base import PLAIN, State, Update, method
from hocket.methods.lora import A, B, LoRA, modules, pair
from hocket.methods.merging import Merging
from hocket.products import Product
from hocket.tree import Tree


@method("fedex-lora")
@dataclass(frozen=True, config=PLAIN)
class FedEx(Merging):
    """FedIT made exact: the residual of averaging is merged into the weights."""

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        shares = weights if shares is None else shares
        stack: Tree = {}
        for m in modules(state["params"]):
            held = [(u.payload, w, s) for u, w, s in zip(updates, weights, shares, strict=True) if m + A in u.payload]
            held = [h for h in held if m + B in h[0]]
            unit = self.server_lr / (sum(s for _, _, s in held) or 1.0)
            if len(held) > _whole([w * unit for _, w, _ in held]):  # one alone, added whole, leaves nothing
                stack[m + A], stack[m + B] = self._residual(m, [(sent, w * unit) for sent, w, _ in held])
        return self.told(state, super().step(state, updates, weights, shares), stack)

    def _residual(self, m: str, held: Sequence[tuple[Mapping[str, Tensor], float]]) -> tuple[Tensor, Tensor]:
        """A and B of the residual."""
        das, dbs = [sent[m + A] for sent, _ in held], [sent[m + B] for sent, _ in held]
        share = [p for _, p in held]
        mean = sum((p * da for p, da in zip(share, das, strict=True)), torch.zeros_like(das[0]))
        if _whole(share):  # sum_i p_i (dA_i - dA) = 0: the last client's dB can be taken off all
            dbs, das, share = [db - dbs[-1] for db in dbs[:-1]], das[:-1], share[:-1]
        s = self.scale(m)
        a = torch.cat([s * p * (da - mean) for p, da in zip(share, das, strict=True)])
        return a, torch.cat(dbs, dim=1)

    def _sides(
        self, m: str, before: State, payloads: Sequence[Mapping[str, Tensor]], share: Sequence[float], after: State
    ) -> tuple[list[Product], list[Product]]:
        ideal, got = LoRA._sides(self, m, before, payloads, share, after)
        if m + A in after["last"]:
            a, b = pair(after["last"], m)
            got.append((b, a))
        return ideal, got


def _whole(share: Sequence[float]) -> bool:
    return abs(sum(share) - 1) < 1e-9
