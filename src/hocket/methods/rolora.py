"""RoLoRA: the clients train and average B in one round and A in the next.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (RoLoRA), 2025,
https://arxiv.org/abs/2502.01755.

    even turns (from 0):  B <- sum_i p_i B_i, A frozen        odd turns:  A <- sum_i p_i A_i, B frozen

Bytes a round and client, each way: s_c sum_m r out_m or s_c sum_m r in_m, half of FedIT's on average. Exact: the mean,
as all clients share the factor that is frozen. B is first, because with B = 0 there is no gradient for A. Under a
schedule that mixes updates of different turns the mean is exact only for those that froze the same factor.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, Local, method
from hocket.methods.lora import A, B, LoRA


@method("rolora")
@dataclass(frozen=True, config=PLAIN)
class RoLoRA(LoRA):
    """LoRA with A and B trained in alternate rounds: half the bytes and an exact mean."""

    def trains(self, local: Local) -> Callable[[str], bool]:
        return lambda name: not name.endswith(A if local.turn % 2 == 0 else B)
