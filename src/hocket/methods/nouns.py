"""The nouns on the wire, and a client's side of the world."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hocket.tree import Tree


@dataclass(frozen=True)
class Job:
    """What one client is asked to do.

    Attributes:
        id: unique in a run, increasing in the order of asking.
        client: who.
        version: the server version `payload` was made from.
        turn: the aggregation it is meant for; larger than `version` under overlap.
        visit: how many jobs this client was asked before; keys its random draws, so that a client's n-th job sees the
            same batches whatever the schedule does with the others.
        payload: the tensors that changed since version `since`; all of them if `since` is None or below 0.
        own: this client's earlier turns, beyond `version`, whose updates the server still counts on.
        heard, follows: the visits of this client's last update that the server has, and of the last that it has or
            still counts on; -1 for none. What the client remembers of later ones (error feedback) belongs to updates
            that never counted.
        deadline: seconds after dispatch at which the server stops waiting; None for never.
    """

    id: int
    client: int
    version: int
    turn: int
    visit: int = 0
    payload: Tree = field(default_factory=dict, compare=False)
    since: int | None = None
    deadline: float | None = None
    own: tuple[int, ...] = ()
    heard: int = -1
    follows: int = -1

    @property
    def whole(self) -> bool:
        """Whether the payload builds on nothing that the client holds."""
        return self.since is None or self.since < 0


@dataclass(frozen=True)
class Update:
    """What came back for a job: what the method uploads (a delta, factors, scalars), never a full model; `bytes` are
    those of its packet. `traits` are what the server knows of the client while the method checks the upload."""

    job: int
    client: int
    version: int
    turn: int
    payload: Mapping[str, torch.Tensor] = field(compare=False)
    weight: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    traits: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Client:
    """What the server knows of one client: how much data it says it has, and traits a method may use (its rank)."""

    id: int
    rows: int = 1
    traits: Mapping[str, Any] = field(default_factory=dict)


Penalty = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""A differentiable function of the tensors that train, by name, that is added to the loss."""
Masks = Mapping[str, torch.Tensor]
"""For a tensor, the positions (flat, row-major, int64) of the entries that may move; the others stay bit for bit."""


class Between(Protocol):
    """What a method does between the optimizer steps of a job.

    Attributes:
        rates: of some tensors, factors on the rate where a step is as long as the gradient (SGD; not AdamW).
        held: what it keeps in memory from step to step, on the CPU.
    """

    rates: Mapping[str, float]
    held: Mapping[str, torch.Tensor]

    def __call__(self, step: int, live: Tree) -> Iterable[str]:
        """Called before each step, `step` counting from 0. `live` are all tensors of the start as they are now, out x
        in, in memory of the job's own, to be written into. Returns those whose optimizer state begins anew."""


@dataclass
class Point:
    """Where a walk without gradients is before one of its steps.

    Attributes:
        live: the tensors that move, in the model, in memory of the job's own; the method writes into them.
        loss: mean loss of the step's batches with the model as it is.
        losses: of several models at once, given tensors stacked in a new first dimension.
        rate: the local rate.
        used: what the method makes false if it drops the step, which then counts for nothing.
    """

    live: Tree
    loss: Callable[[], float]
    losses: Callable[[Tree], list[float]]
    rate: float
    used: bool = True


class Trainer(Protocol):
    """Local optimization on one client's data; `hocket.training` has the real one."""

    def fit(
        self, local: Local, start: Tree, only: Callable[[str], bool], prox: float,
        penalty: Penalty | None = None, masks: Masks | None = None, between: Between | None = None,
    ) -> Tree:  # fmt: skip
        """Deltas (end - start) of the tensors in `start` that `only` selects, after this client's local steps."""

    def steps(self, local: Local) -> int:
        """Optimizer steps of one job of this client."""

    def walk(self, local: Local, start: Tree, only: Callable[[str], bool], beside: int = 0) -> Iterator[Point]:
        """This client's local steps without gradients, dropout off. Those tensors of `start` that `only` selects are
        the method's to move, and are `start`'s again at the end. The method keeps `beside` bytes within a step."""

    def loss(self, params: Tree, batch: Any) -> torch.Tensor:
        """Loss of the model with `params` in place; no gradient."""

    def gradient_norms(self, local: Local, start: Tree) -> dict[str, float]:
        """Norm of the gradient of each tensor in `start` at `start`: root mean square over one job's batches."""


@dataclass
class Local:
    """A client's side of the world, handed to `Method.train`.

    Attributes:
        cache: the client's copy of the server's view, its own updates in flight added (a view; do not write into it).
        memory: this client's private tensors; kept between jobs and across restarts by the engine.
        turn, turns: the aggregation this job is meant for, and how many the run has.
        visit: how many jobs this client did before.
        seed: the run's seed; `hocket.tree.generator(seed, ...)` makes keyed generators from it.
        traits: plain facts about this client (its adapter rank, its speed).
        metrics: what the trainer reports: loss, steps, skipped, examples, tokens.
    """

    client: int
    cache: Tree
    memory: Tree
    turn: int
    turns: int
    visit: int
    seed: int
    trainer: Trainer
    traits: Mapping[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def fit(
        self,
        params: Tree,
        only: Callable[[str], bool] = lambda name: True,
        prox: float = 0.0,
        penalty: Penalty | None = None,
        masks: Masks | None = None,
        between: Between | None = None,
    ) -> Tree:
        """Train the tensors of `params` that `only` selects for this client's local steps; returns their deltas.

        Args:
            prox: coefficient of the proximal term mu/2 |w - w_start|^2.
            penalty: added to the loss of every optimizer step.
            masks: of these tensors only some entries move; their delta is the vector of these entries' differences.
            between: called before every optimizer step; may write into all of `params`, of which the job has a copy.
        """
        return self.trainer.fit(self, params, only, prox, penalty, masks, between)

    def walk(self, params: Tree, only: Callable[[str], bool] = lambda name: True, beside: int = 0) -> Iterator[Point]:
        """Go through this client's local steps without gradients, from `params`; see `Point`.

        Args:
            only: which of `params` move.
            beside: bytes that the method keeps on the model's device within a step, for plans.
        """
        return self.trainer.walk(self, params, only, beside)

    def loss(self, params: Tree, batch: Any) -> torch.Tensor:
        """Forward only: the loss of `batch` with `params` in place."""
        return self.trainer.loss(params, batch)
