"""FedBCD: one block of layers per round; everyone trains and uploads the same block.

The synchronous baseline of "ParaBlock: Communication-Computation Parallel Block Coordinate Federated Learning for Large
Language Models" (2025; Algorithm 2 there); the local block step follows BAdam, Luo et al. 2024,
https://arxiv.org/abs/2404.02827. **ParaBlock is this method under `overlap(staleness=1)`**: a client starts turn t from
the server's version plus its own updates still in flight, which is that paper's local model with its correction in the
additive form (the assignment printed there loses an update when a block repeats).

    round t:  b = b_t;   Delta_t = sum_i p_i Delta_i,t;   [theta]_b <- [theta]_b + eta Delta_t

Bytes a round and client: d_b * s_c up, and down the blocks that changed since (d_b * s_c at full participation).
Client memory: weights + 16 d_b bytes (fp32 master, gradient, two moments of the block).
Exact: one block = FedAvg on the same parameters; one client = BAdam with its optimizer reset at every switch.
Choices where the paper is silent: blocks are fixed runs of consecutive layers, reshuffled in each pass; embeddings,
head and final norm are in no block unless `extras` is set; a partial layer is its attention or its MLP half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, Local, Method, method
from hocket.tree import generator

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# post_attention_layernorm is not in it: that norm feeds the MLP
ATTENTION = re.compile(r"(?:attn|attention)\.|input_layernorm|\.ln_1\.")


@method("fedbcd")
@dataclass(frozen=True, config=PLAIN)
class FedBCD(Method):
    """Federated block coordinate descent; with `overlap` it is ParaBlock."""

    layers_per_block: int = Field(default=2, ge=1, description="consecutive layers in one block")
    partial: bool = Field(default=False, description="split each block into its attention and its MLP half")
    extras: bool = Field(default=False, description="also make blocks of the embeddings, the final norm and the head")
    order: Literal["shuffled", "replacement", "sequential", "reverse"] = Field(
        default="shuffled", description="order of blocks: a new permutation each pass, drawn with replacement, up, down"
    )

    view: ClassVar[Literal["full", "blocks", "lora"]] = "blocks"

    def trains(self, local: Local) -> Callable[[str], bool]:
        blocks = self.blocks(local.cache)
        chosen = set(blocks[self.block_of(local.turn, len(blocks), local.seed)])
        return lambda name: name in chosen

    def blocks(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """The tensors of each block, lowest layers first."""
        return _blocks(tuple(sorted(names)), self.layers_per_block, self.partial, self.extras)

    def block_of(self, turn: int, blocks: int, seed: int) -> int:
        """Which block turn `turn` trains: fixed by the seed, so that a client knows it before the server speaks."""
        if self.order == "sequential":
            return turn % blocks
        if self.order == "reverse":
            return blocks - 1 - turn % blocks
        if self.order == "replacement":
            return int(torch.randint(blocks, (1,), generator=generator(seed, "block", turn)))
        return int(torch.randperm(blocks, generator=generator(seed, "pass", turn // blocks))[turn % blocks])


@lru_cache(maxsize=16)
def _blocks(names: tuple[str, ...], per_block: int, partial: bool, extras: bool) -> tuple[tuple[str, ...], ...]:
    """Group tensor names into blocks; pure, so the cache only saves time."""
    found: dict[tuple[int, int], list[str]] = {}
    other: list[str] = []
    for name in names:
        if match := LAYER.search(name):
            half = 0 if not partial or ATTENTION.search(name) else 1
            found.setdefault((int(match[1]) // per_block, half), []).append(name)
        else:
            other.append(name)
    groups = [tuple(found[key]) for key in sorted(found)] + ([(name,) for name in other] if extras else [])
    if not groups:
        raise ValueError(f"no layers found among {len(names)} tensors (first: {names[:1]}); use method 'fedavg'")
    return tuple(groups)
