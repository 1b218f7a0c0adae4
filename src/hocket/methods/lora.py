"""LoRA baselines: FedIT averages both factors, FFA-LoRA trains and averages B alone.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), ICASSP 2024,
https://arxiv.org/abs/2305.05644; Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA),
ICLR 2024, https://arxiv.org/abs/2403.12313. LoRA: Hu et al. 2022, https://arxiv.org/abs/2106.09685.

    W = W_0 + s B A,   A in R^{r x in} (random), B in R^{out x r} (zero),   s = alpha / r
    FedIT:  A <- sum_i p_i A_i,  B <- sum_i p_i B_i          FFA-LoRA:  B <- sum_i p_i B_i,  A frozen and common

Bytes a round and client, each way: FedIT s_c sum_m r (in_m + out_m); FFA-LoRA s_c sum_m r out_m.
Exact: FFA-LoRA's mean (mean of B_i A is mean(B_i) A). Approximate: FedIT's, by s sum_i p_i (B_i - B)(A_i - A), which
is zero when all A_i agree. The ParaBlock paper describes FFA-LoRA as freezing B; with B = 0 nothing would train, so
this follows the FFA paper and freezes A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, Local, Method, method

T = TypeVar("T")


@dataclass(frozen=True, config=PLAIN)
class LoRA(Method):
    """A method that moves low-rank adapters (and a new head) beside frozen weights."""

    rank: int = Field(default=8, ge=1, description="adapter rank r")
    alpha: float = Field(default=16.0, gt=0, description="LoRA alpha; the update is scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: tuple[str, ...] = Field(
        default=(), description="module names to adapt; empty: query and value, per architecture"
    )
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="module name pattern = its own rank")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="module name pattern = its own alpha")

    view: ClassVar[Literal["full", "blocks", "lora"]] = "lora"
    merges: ClassVar[bool] = False
    """Whether the server writes into the adapted weights, so that they belong to the view."""

    def scale(self, module: str) -> float:
        """s = alpha / r of a module, patterns matched as peft matches them."""
        return _of(module, self.alpha_pattern, self.alpha) / _of(module, self.rank_pattern, self.rank)


def _of(module: str, patterns: Mapping[str, T], default: T) -> T:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


@method("fedit")
@dataclass(frozen=True, config=PLAIN)
class FedIT(LoRA):
    """Federated averaging of LoRA's A and B, each for itself."""


@method("ffa-lora")
@dataclass(frozen=True, config=PLAIN)
class FFALoRA(LoRA):
    """LoRA with A frozen and common to all clients: half the bytes and an exact mean."""

    def trains(self, local: Local) -> Callable[[str], bool]:
        return lambda name: ".lora_A." not in name
