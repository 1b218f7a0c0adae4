"""FlexLoRA: average products, decompose, and cut to each client's rank; the server truncates nothing.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources" (FlexLoRA),
NeurIPS 2024, https://arxiv.org/abs/2402.11505; checked against the authors' code.

    D <- sum_i p_i (alpha / r_i) B_i A_i = U S V^T;   client i gets B_i = U_{r_i} S_{r_i} / (alpha / r_i), A_i = V_{r_i}

Bytes a round and client, each way: s_c sum_m r_i (in_m + out_m). Exact: the mean of products; what a client cannot
hold is lost in the next one, so components fade as in HLoRA. The published code divides by 16 / r whatever alpha is,
and its comparison with HetLoRA divides B on the way down but never multiplies it on the way up.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, method
from hocket.methods.effective import Effective
from hocket.methods.lora import A
from hocket.methods.unequal import Model


@method("flexlora")
@dataclass(frozen=True, config=PLAIN)
class FlexLoRA(Effective):
    """LoRA of unequal ranks: the mean of products whole at the server, cut for the clients."""

    split: Literal["even", "A", "B"] = Field(
        default="B", description="where the singular values go when D is decomposed: on both factors, on A, or on B"
    )

    def started(self, m: str, model: Model) -> int:
        return len(model.then[m + A])

    def kept(self, m: str, live: int) -> int:
        return max(live, self.rank_of(m))
