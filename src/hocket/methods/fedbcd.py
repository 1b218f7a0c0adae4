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
Choices where the paper is silent: blocks are fixed runs of consecutive layers (see `blocks`), reshuffled in each pass.
Gradient-guided order (a reconstruction of the paper's "full-model backward before fine-tuning"): before the first turn
every client sends n_b = |grad_b f_i| of each block at the start model; blocks are trained in falling order of the mean
over clients, pass after pass. That costs one job's time, and 4 B bytes up and 8 B bytes down for B blocks; gradients
are freed tensor by tensor, so it needs one gradient at a time beside the activations of a pass through all layers.
n_b is the root mean square over a job's batches, so with small ones it holds their noise too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import mean
from hocket.methods.base import PLAIN, Local, State, Update, method
from hocket.methods.blocks import BlockMethod
from hocket.tree import Tree, generator

ORDER = "block_order"  # int64 (B,): the blocks in the order of training, beside the model's tensors in the view


@method("fedbcd")
@dataclass(frozen=True, config=PLAIN)
class FedBCD(BlockMethod):
    """Federated block coordinate descent; with `overlap` it is ParaBlock."""

    order: Literal["shuffled", "replacement", "sequential", "reverse", "gradient", "gradient_scaled"] = Field(
        default="shuffled",
        description="order of blocks: a new permutation each pass, drawn with replacement, up, down, by gradient norm, "
        "or by gradient norm over the root of the block's size",
    )

    @property
    def guided(self) -> bool:
        """Whether gradients decide the order."""
        return self.order in ("gradient", "gradient_scaled")

    @property
    def prelude(self) -> int:
        return int(self.guided)

    def init(self, params: Tree, seed: int) -> State:
        order = {ORDER: torch.arange(len(self.cut(params)))} if self.guided else {}
        return super().init(params | order, seed)

    def export(self, state: State) -> Tree:
        return {k: v for k, v in state["params"].items() if k != ORDER}

    def cut(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        return super().cut(k for k in names if k != ORDER)

    def block(self, local: Local, blocks: int) -> int:
        return int(local.cache[ORDER][local.turn % blocks]) if self.guided else super().block(local, blocks)

    def block_of(self, turn: int, blocks: int, seed: int) -> int:
        """Which block turn `turn` trains: fixed before the first turn, so that clients need not wait to hear it."""
        if self.order == "sequential":
            return turn % blocks
        if self.order == "reverse":
            return blocks - 1 - turn % blocks
        if self.order == "replacement":
            return int(torch.randint(blocks, (1,), generator=generator(seed, "block", turn)))
        return int(torch.randperm(blocks, generator=generator(seed, "pass", turn // blocks))[turn % blocks])

    def train(self, local: Local, start: Tree) -> Tree:
        model = {k: v for k, v in start.items() if k != ORDER}
        return {ORDER: self._norms(local, model)} if local.turn < 0 else super().train(local, model)

    def _norms(self, local: Local, model: Tree) -> Tensor:
        """float32 (B,): the gradient norm of each block, at the start model, on this client's rows."""
        each = local.trainer.gradient_norms(local, model)
        norms = []
        for block in self.cut(model):
            size = sum(model[k].numel() for k in block) if self.order == "gradient_scaled" else 1
            norms.append((sum(each[k] ** 2 for k in block) / size) ** 0.5)
        return torch.tensor(norms)

    def check(self, state: State, update: Update) -> str | None:
        if ORDER in update.payload and (not self.guided or state.get("ordered") or len(update.payload) > 1):
            return f"'{ORDER}' is not for now"
        return super().check(state, update)

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        if not any(ORDER in u.payload for u in updates):
            return super().step(state, updates, weights, shares)
        norms = dict(mean([u.payload for u in updates], weights))[ORDER]
        order = norms.argsort(descending=True, stable=True)
        return state | {"params": state["params"] | {ORDER: order}, "ordered": True}
