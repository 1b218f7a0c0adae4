"""What block methods share: how a model is cut into blocks.

Blocks are runs of consecutive layers, lowest first. A partial layer is its attention or its MLP half (each with the
norm that feeds it). Embeddings, final norm and head are in no block, as in BAdam (Luo et al. 2024,
https://arxiv.org/abs/2404.02827), unless `extras` is set: then each of these modules is one, embeddings first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.errors import RecipeError
from hocket.methods.base import PLAIN, Local, Method, State
from hocket.tree import Tree

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# post_attention_layernorm is not in it: that norm feeds the MLP
ATTENTION = re.compile(r"(?:attn|attention)\.|input_layernorm|self_attn_layer_norm|\.(?:ln|norm)_1\.")
EMBEDDING = re.compile(r"embed|wte|wpe")


@dataclass(frozen=True, config=PLAIN)
class BlockMethod(Method):
    """A method that moves one block of the model at a time."""

    layers_per_block: int = Field(default=2, ge=1, description="consecutive layers in one block")
    blocks: Annotated[
        int | None, Field(ge=1, description="number of blocks, as equal as can be; replaces layers_per_block")
    ] = None
    partial: bool = Field(default=False, description="split each block into its attention and its MLP half")
    extras: bool = Field(default=False, description="also make blocks of the embeddings, the final norm and the head")

    view: ClassVar[Literal["full", "blocks", "lora", "biases", "adapter"]] = "blocks"

    def init(self, params: Tree, seed: int) -> State:
        self.cut(params)  # a model that cannot be cut is an error now, not in somebody's job
        return super().init(params, seed)

    def trains(self, local: Local) -> Callable[[str], bool]:
        blocks = self.cut(local.cache)
        chosen = set(blocks[self.block(local, len(blocks))])
        return lambda name: name in chosen

    def block(self, local: Local, blocks: int) -> int:
        """Which of `blocks` blocks this job trains."""
        return self.block_of(local.turn, blocks, local.seed)

    def block_of(self, turn: int, blocks: int, seed: int) -> int:
        """Which block turn `turn` trains."""
        raise TypeError(f"{type(self).__name__} must define block_of()")

    def cut(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """The tensors of each block, lowest layers first. Raises `RecipeError` if there are no or too few layers."""
        return _cut(tuple(sorted(names)), self.layers_per_block, self.blocks, self.partial, self.extras)


@lru_cache(maxsize=16)
def _cut(
    names: tuple[str, ...], per_block: int, blocks: int | None, partial: bool, extras: bool
) -> tuple[tuple[str, ...], ...]:
    """Group tensor names into blocks; pure, so the cache only saves time."""
    layers = sorted({int(match[1]) for name in names if (match := LAYER.search(name))})
    if not layers:
        raise RecipeError(f"method: no layers among {len(names)} tensors (first: {names[:1]}); use 'fedavg'")
    if blocks is not None and blocks > len(layers):
        raise RecipeError(f"method.blocks: {blocks} blocks for {len(layers)} layers; use at most {len(layers)}")
    block = {n: i // per_block if blocks is None else i * blocks // len(layers) for i, n in enumerate(layers)}
    found: dict[tuple[int, int], list[str]] = {}
    other: dict[str, list[str]] = {}  # by module
    for name in names:
        if match := LAYER.search(name):
            half = 0 if not partial or ATTENTION.search(name) else 1
            found.setdefault((block[int(match[1])], half), []).append(name)
        else:
            other.setdefault(name.rpartition(".")[0], []).append(name)
    layered = [tuple(found[key]) for key in sorted(found)]
    if not extras:
        return tuple(layered)
    below = [tuple(ks) for module, ks in other.items() if EMBEDDING.search(module)]
    above = [tuple(ks) for module, ks in other.items() if not EMBEDDING.search(module)]
    return (*below, *layered, *above)
