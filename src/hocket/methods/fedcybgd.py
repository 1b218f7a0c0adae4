"""FedCyBGD: one client at a time trains one block, from a model of which it downloads only a part.

Wang et al., "Save It All: Enabling Full Parameter Tuning for Federated Large Language Models via Cycle Block Gradient
Descent", 2024, https://arxiv.org/abs/2406.11187 (after its published code, L3030/FedCyBGD). Runs under the schedule
`cyclic`; under `sync` every client trains the block of the turn, each from its own draw.

    turn t:  b = t mod B (ascending), B - 1 - (t mod B) (descending), or drawn with replacement (random)
             U = blocks updated so far;  D = ceil(p |U|) of them, drawn for this client
             x = theta_0 with the blocks of D as the server has them;  x_b trained on the client's rows
             [theta]_b <- sum_i p_i [x_i]_b                            (one client a turn: its block as it is)

Blocks that are not drawn stay at their *pretrained* values on that client, its own block included; what is stored
replaces the server's block. The update is a delta all the same: the draw is keyed by (seed, version, client), so the
server knows where its client started (up to what a lossy downlink codec loses).
Bytes a turn and client: up d_b s_c; down at most p |U| d_b s_c, since nothing is kept from turn to turn.
Client memory: weights + 16 d_b (fp32 master, gradient, two moments). With training.optimizer_state = "keep" those
moments are this client's own; the published code hands them on from client to client and does not count the bytes.
Left out, since they are defects there: two optimizer steps for one, a fixed 51 steps, a sample of negative size.
Block numbers count turns, not clients: with one client a turn and N a multiple of B client i has block i mod B in every
cycle, as there; otherwise blocks wander over the clients, and all of them are trained even if N < B.
Not found in that code and not here: layer dropping and pruning of the download.
Exact: one client and one block is local training; p = 1 with exact block solves is Gauss-Seidel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from hocket.combine import mean
from hocket.methods.base import PLAIN, Client, State, Update, method
from hocket.methods.blocks import BlockMethod
from hocket.tree import Tree, generator


@method("fedcybgd")
@dataclass(frozen=True, config=PLAIN)
class FedCyBGD(BlockMethod):
    """Cyclic block descent, one client a turn, on a partly downloaded model; use schedule `cyclic`."""

    download: float = Field(default=1.0, gt=0, le=1, description="share p of the updated blocks that a client fetches")
    order: Literal["ascending", "descending", "random"] = Field(
        default="ascending", description="order of blocks: up, down, drawn with replacement"
    )

    rebuilds: ClassVar[bool] = True

    @model_validator(mode="after")
    def _plain(self) -> FedCyBGD:
        if self.download < 1 and (self.server_optimizer != "sgd" or self.server_lr != 1):
            raise ValueError(
                "server_optimizer, server_lr: with download < 1 fedcybgd stores blocks as they come; leave both out"
            )
        return self

    @property
    def whole(self) -> bool:
        return self.download == 1

    @property
    def additive(self) -> bool:
        """What is stored replaces a block, so a client's own update cannot be added ahead of it."""
        return False

    @property
    def not_additive(self) -> str:
        return "'fedcybgd' replaces blocks and has none; use schedule 'cyclic' or 'sync'"

    def init(self, params: Tree, seed: int) -> State:
        # "updated": block -> first version that holds it updated, so that a draw can be made again later
        return super().init(params, seed) | {"start": dict(params), "seed": seed, "updated": {}, "version": 0}

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        if since < 0:
            return dict(state["start"]) | self._drawn(state, version, client.id)
        return self._drawn(state, version, client.id)

    def block_of(self, turn: int, blocks: int, seed: int) -> int:
        """Which block turn `turn` trains."""
        if self.order == "random":
            return int(torch.randint(blocks, (1,), generator=generator(seed, "block", turn)))
        return turn % blocks if self.order == "ascending" else blocks - 1 - turn % blocks

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        if self.download == 1:  # everybody starts from the server's blocks: what is stored is what is added
            return self._noting(super().step(state, updates, weights, shares), updates)
        params, start = dict(state["params"]), state["start"]
        drawn = [self._drawn(state, u.version, u.client) for u in updates]
        for k, delta in mean([u.payload for u in updates], weights, shares):
            held = [(k in d, w) for u, d, w in zip(updates, drawn, weights, strict=True) if k in u.payload]
            # the share, by weight, of those that started from the server's block and not from the pretrained one
            share = sum(w for has, w in held if has) / sum(w for _, w in held)
            base = params[k] if share == 1 else start[k] if share == 0 else torch.lerp(start[k], params[k], share)
            params[k] = base + delta.to(base.dtype)
        return self._noting(state | {"params": params}, updates)

    def _noting(self, state: State, updates: Sequence[Update]) -> State:
        """`state` at its next version, with the blocks that these updates were the first to change."""
        version, updated = state["version"] + 1, dict(state["updated"])
        for b, names in enumerate(self.cut(state["params"])):
            if any(k in u.payload for u in updates for k in names):
                updated.setdefault(str(b), version)
        return state | {"updated": updated, "version": version}

    def _drawn(self, state: State, version: int, client: int) -> Tree:
        """The updated blocks that `client` fetches at `version`."""
        known = sorted(int(b) for b, first in state["updated"].items() if first <= version)
        count = math.ceil(self.download * len(known) - 1e-9)
        order = torch.randperm(len(known), generator=generator(state["seed"], "download", version, client))
        blocks = self.cut(state["params"])
        return {k: state["params"][k] for i in order[:count].tolist() for k in blocks[known[i]]}
