"""FLoRIST: FLoRA whose stack is decomposed and cut where enough of its energy is kept.

"FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language Models", 2025,
https://arxiv.org/abs/2506.09199.

    sum_i p_i s_i B_i A_i = U S V^T through QR cores;   merged: its first p components, the fewest with
    sum_{j <= p} S_j^2 >= tau sum_j S_j^2

Bytes a round and client: up s_c sum_m r_i (in_m + out_m), down s_c sum_m p_m (in_m + out_m), where FLoRA's are
sum_j r_j in place of p_m (a plan, which has no values, takes these). Approximate: the rest of the energy is lost. The
paper finds thresholds from 0.8 to 0.99 good; tau = 1 is FLoRA, in another basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import products
from hocket.methods.base import PLAIN, method
from hocket.methods.flora import FLoRA


@method("florist")
@dataclass(frozen=True, config=PLAIN)
class FLoRIST(FLoRA):
    """FLoRA with a thin stack: the fewest directions that hold a share of its energy."""

    energy: float = Field(default=0.9, gt=0, le=1, description="share tau of the squared singular values that is kept")

    def stacked(self, m: str, held: Sequence[tuple[Mapping[str, Tensor], float]]) -> tuple[Tensor, Tensor]:
        u, s, vt = products.svd(self._terms(m, held))
        rank = len(s) if s.is_meta else products.rank_for(s, self.energy)
        return vt[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()
