"""FedKSeed-Pro: directions along which losses differed more are drawn more often.

Qin et al., ICML 2024, https://arxiv.org/abs/2312.06353 (its section on non-uniform sampling).

    p = softmax(minmax(a)),   a_k = mean of |clip(g, +-c)| over all g that were sent for k, and one 0

All else is FedKSeed's. Bytes a round and client: another 4 K down, for p; nothing more up, because the server reads the
history off the uploads. (The published simulator appends to the server's history directly, at no cost.) The largest p
is e times the smallest. Uploads that a schedule turns into dense differences (those that mix models or keep windows of
them) say nothing to the history: there all p stay 1/K, and this is FedKSeed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, State, Update, method
from hocket.methods.fedkseed import CHANCES, FedKSeed, Walked
from hocket.tree import Tree


@method("fedkseed-pro")
@dataclass(frozen=True, config=PLAIN)
class FedKSeedPro(FedKSeed):
    """FedKSeed with directions drawn by how much they mattered."""

    history_clip: float = Field(default=1000.0, gt=0, description="c, the most that one |g| counts")

    @model_validator(mode="after")
    def _drawable(self) -> FedKSeedPro:
        if self.directions > 1 << 24:  # torch.multinomial takes no more
            raise ValueError(f"directions: probabilities of {self.directions} cannot be drawn from; use at most 2^24")
        return self

    def init(self, params: Tree, seed: int) -> State:
        n = self.directions
        state = super().init(params | {CHANCES: torch.full((n,), 1 / n)}, seed)
        return state | {"history": torch.zeros(2, n, dtype=torch.float64)}  # sum of |g|, and how many

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        after, history = super().step(state, updates, weights, shares), state["history"].clone()
        for u in updates:
            if isinstance(walk := self._as_walked(state["params"], u.payload), Walked):
                size = walk.g.double().abs().clamp(max=self.history_clip)
                history.index_add_(1, walk.k, torch.stack([size, torch.ones_like(size)]))
        mean = history[0] / (history[1] + 1)
        spread = mean.max() - mean.min()
        chances = torch.softmax((mean - mean.min()) / spread if spread > 0 else torch.zeros_like(mean), 0)
        return after | {"params": after["params"] | {CHANCES: chances.float()}, "history": history}

    def _pick(self, view: Tree, draw: torch.Generator) -> int:
        chances = view[CHANCES].clamp_min(0)  # a lossy download may leave less than nothing
        if not chances.sum() > 0:
            return super()._pick(view, draw)
        return int(torch.multinomial(chances, 1, generator=draw))
