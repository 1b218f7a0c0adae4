"""What methods share whose server merges products of factors into the adapted weights.

Everybody who holds the weights of a version adds the same factors, so that is what travels: W <- W + B A. A client that
missed rounds gets every missed pair, or the dense W where that is less; the server keeps only pairs that could still be
sent, so at most one dense W of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.methods.base import PLAIN, Client, Local, State, Update
from hocket.methods.lora import BASE, A, B, LoRA
from hocket.tree import Tree


@dataclass(frozen=True, config=PLAIN)
class Merging(LoRA):
    """LoRA whose server merges products into the adapted weights and sends their factors."""

    merges: ClassVar[bool] = True

    def init(self, params: Tree, seed: int) -> State:
        return super().init(params, seed) | {"version": 0, "stacks": {}, "last": {}}

    def trains(self, local: Local) -> Callable[[str], bool]:
        return lambda name: not name.endswith(BASE)

    def check(self, state: State, update: Update) -> str | None:
        for k in update.payload:
            if k.endswith(BASE):
                return f"'{k}' is not a client's to change"
        return super().check(state, update)

    def merged(self, before: State, after: State, stack: Tree) -> State:
        """`after` with `stack` added to the weights, as all that hold `before` will add it."""
        version = before["version"] + 1
        params = self.load(after["params"], {f"{version}/{k}": v for k, v in stack.items()})
        return after | {
            "params": params, "version": version, "last": stack,
            "stacks": _cheap(before["stacks"] | {str(version): stack}, params),
        }  # fmt: skip

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        rest = super().ship(state, client, version, since, changed)
        missed = [str(v) for v in range(max(since, 0) + 1, version + 1)]
        if since < 0 or any(v not in state["stacks"] for v in missed):
            return rest
        stacks = {f"{v}/{k}": x for v in missed for k, x in state["stacks"][v].items()}
        whole = {k: v for k, v in rest.items() if k.endswith(BASE)}
        return rest if _size(whole) <= _size(stacks) else without(rest, whole) | stacks

    def load(self, held: Tree, payload: Mapping[str, Tensor]) -> Tree:
        out = held | {k: payload[k] for k in payload if "/" not in k}
        for k in sorted((k for k in payload if k.endswith(A) and "/" in k), key=lambda k: int(k.partition("/")[0])):
            base = k.partition("/")[2].removesuffix(A) + BASE
            out[base] = add(out[base], payload[k], payload[k.removesuffix(A) + B])
        return out


def add(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + B A, as a new tensor. Factors in half precision are multiplied in fp32."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return torch.addmm(w.to(wide), b.to(wide), a.to(wide)).to(w.dtype)


def without(tree: Mapping[str, Tensor], names: Iterable[str]) -> Tree:
    """What is left of `tree`; only that is decoded."""
    gone = set(names)
    return {k: tree[k] for k in tree if k not in gone}


def _size(tree: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for t in tree.values())


def _cheap(stacks: dict[str, Tree], params: Tree) -> dict[str, Tree]:
    """The newest stacks, as far back as sending all of them costs less than the dense weights."""
    left = sum(v.numel() for k, v in params.items() if k.endswith(BASE))
    keep: dict[str, Tree] = {}
    for version in sorted(stacks, key=int, reverse=True):
        left -= _size(stacks[version])
        if left < 0:
            break
        keep[version] = stacks[version]
    return dict(reversed(keep.items()))
