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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import products
from hocket.methods.base import PLAIN, Local, Method, State, Update, method
from hocket.products import Product

T = TypeVar("T")
A, B, BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
PREFIX = "base_model.model."
"""What peft puts in front of a model's own names."""


@dataclass(frozen=True, config=PLAIN)
class LoRA(Method):
    """A method that moves low-rank adapters (and a new head) beside frozen weights."""

    rank: int = Field(
        default=8, ge=1, description="adapter rank r; the server's, where clients have ranks of their own"
    )
    alpha: float = Field(default=16.0, gt=0, description="LoRA alpha; the update is scaled by s = alpha / r")
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "constant"] = Field(
        default="alpha/r",
        description="s at a client's rank: one alpha for all, the same as in rsLoRA, or alpha / rank whatever its rank",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: tuple[str, ...] = Field(
        default=(), description="module names to adapt; empty: query and value, per architecture"
    )
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="module name pattern = its own rank")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="module name pattern = its own alpha")

    view: ClassVar[Literal["full", "blocks", "lora", "biases", "adapter"]] = "lora"
    merges: ClassVar[bool] = False
    """Whether the server writes into the adapted weights, so that they belong to the view."""
    unequal: ClassVar[bool] = False
    """Whether clients may have ranks of their own (`clients.ranks`); otherwise all have `rank`."""

    def scale(self, module: str, rank: int | None = None) -> float:
        """s of a module whose factors have `rank`; none: that of the method. Patterns as peft matches them."""
        alpha = _of(module, self.alpha_pattern, self.alpha)
        rank = self.rank_of(module) if rank is None or self.scaling == "constant" else rank
        return alpha / (rank**0.5 if self.scaling == "alpha/sqrt(r)" else rank)

    def rank_of(self, module: str) -> int:
        """Rank of a module's factors at the server."""
        return _of(module, self.rank_pattern, self.rank)

    def beside(self, names: Iterable[str]) -> list[str]:
        return [k for k in names if not k.endswith((A, B, BASE))]

    def stored(self, module: str) -> float:
        """What the state's B A of a module must be multiplied by."""
        return self.scale(module)

    def layers(
        self, before: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float], after: State
    ) -> dict[str, dict[str, float]]:
        """What the aggregation made of each module: `error` = ||ideal - P|| / ||ideal|| in Frobenius norms, with ideal
        = sum_i p_i s_i B_i A_i of the clients' models and P the server's new one, and P's effective `rank`. Nothing
        under a server optimizer, which aims elsewhere."""
        out: dict[str, dict[str, float]] = {}
        if self.server_optimizer != "sgd":
            return out
        for m in modules(before["params"]):
            held = [
                (u, w, s) for u, w, s in zip(updates, weights, shares, strict=True) if {m + A, m + B} & set(u.payload)
            ]
            if held:
                total = sum(s for _, _, s in held)
                share = [self.server_lr * w / total for _, w, _ in held]
                ideal, got = self._sides(m, before, [u.payload for u, _, _ in held], share, after)
                if not got:
                    continue
                out[m] = compared(ideal, got)
        return out

    def _sides(
        self, m: str, before: State, payloads: Sequence[Mapping[str, Tensor]], share: Sequence[float], after: State
    ) -> tuple[list[Product], list[Product]]:
        """(ideal, P) of module `m` as sums of products, or nothing if P is not in factors. A client stands for
        (B + dB)(A + dA)."""
        s, (a, b) = self.stored(m), pair(before["params"], m)
        ideal = [(b * (s * (1 - sum(share))), a)] if abs(1 - sum(share)) > 1e-12 else []
        for sent, p in zip(payloads, share, strict=True):
            da, db = sent.get(m + A), sent.get(m + B)
            ideal.append(((b if db is None else b + db) * (s * p), a if da is None else a + da))
        a, b = pair(after["params"], m)
        return ideal, [(b * s, a)]


def modules(names: Iterable[str]) -> list[str]:
    """The adapted modules among tensor names."""
    return sorted({k.removesuffix(A).removesuffix(B) for k in names if k.endswith((A, B)) and "/" not in k})


def pair(tree: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """A and B of a module."""
    return tree[module + A], tree[module + B]


def compared(ideal: Sequence[Product], got: Sequence[Product]) -> dict[str, float]:
    """||ideal - P|| / ||ideal|| and the effective rank of P, of sums of products."""
    size = products.norm(ideal)
    gap = products.norm([*ideal, *((-b, a) for b, a in got)])
    spectrum = products.svd([(b.double(), a.double()) for b, a in got])[1]  # where a run diverges, too
    return {"error": gap / size if size else 0.0, "rank": products.effective_rank(spectrum)}


def _of(module: str, patterns: Mapping[str, T], default: T) -> T:
    name = module.removeprefix(PREFIX)  # so that a pattern can begin with ^
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


@method("fedit")
@dataclass(frozen=True, config=PLAIN)
class FedIT(LoRA):
    """Federated averaging of LoRA's A and B, each for itself."""


@method("ffa-lora")
@dataclass(frozen=True, config=PLAIN)
class FFALoRA(LoRA):
    """LoRA with A frozen and common to all clients: half the bytes and an exact mean."""

    def trains(self, local: Local) -> Callable[[str], bool]:
        return lambda name: not name.endswith(A)
