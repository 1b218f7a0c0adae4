"""What methods share whose server merges products of factors into the adapted weights: W <- W + B A."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.methods.base import PLAIN, Local, State, Update
from hocket.methods.lora import BASE, A, B, LoRA
from hocket.methods.replay import Replay
from hocket.tree import Tree


@dataclass(frozen=True, config=PLAIN)
class Merging(Replay, LoRA):
    """LoRA whose server merges products into the adapted weights and sends their factors."""

    merges: ClassVar[bool] = True

    def covers(self, name: str) -> bool:
        return name.endswith(BASE)

    def trains(self, local: Local) -> Callable[[str], bool]:
        return lambda name: not name.endswith(BASE)

    def check(self, state: State, update: Update) -> str | None:
        for k in update.payload:
            if k.endswith(BASE):
                return f"'{k}' is not a client's to change"
        return super().check(state, update)

    def apply(self, held: Tree, news: Mapping[str, Tensor]) -> Tree:
        out = dict(held)
        for k in sorted(k for k in news if k.endswith(A)):
            base = k.removesuffix(A) + BASE
            out[base] = add(out[base], news[k], news[k.removesuffix(A) + B])
        return out


def add(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + B A, as a new tensor. Factors in half precision are multiplied in fp32."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return torch.addmm(w.to(wide), b.to(wide), a.to(wide)).to(w.dtype)
