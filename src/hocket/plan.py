"""Before spending anything: bytes, virtual hours and memory of a recipe, from shapes alone.

The same server, schedule, codecs and virtual clock run as in a real run; only training, evaluation and the arithmetic
of the server's step are left out, and tensors have shapes but no memory of their own. So packet sizes are exact for
codecs whose size does not depend on values (all but those that drop small ones).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hocket import wire
from hocket.client import Result, Setting
from hocket.executors import Task
from hocket.ledger import Ledger
from hocket.methods import Client, Local, Method, State, Update
from hocket.methods.fedbcd import LAYER
from hocket.models import memory, views
from hocket.models.skeleton import skeleton
from hocket.recipe import Recipe
from hocket.server import Server
from hocket.simulate import Simulation
from hocket.tree import Tree


class ShapeTrainer:
    """Stands in for training: differences of the right shape, all zero, without memory."""

    def fit(self, local: Local, start: Tree, only: Callable[[str], bool], prox: float) -> Tree:
        """Zero deltas of the selected tensors."""
        return {k: _hollow(v) for k, v in start.items() if only(k)}

    def loss(self, params: Tree, batch: Any) -> Tensor:
        """There is nothing to evaluate in a plan."""
        raise TypeError("a plan evaluates nothing")


class ShapeMethod:
    """A method whose step only notes which tensors changed."""

    def __init__(self, inner: Method) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def check(self, state: State, update: Update) -> str | None:
        """Every update of a plan is in order."""
        return None

    def own(self, world: Tree, sent: Any) -> Tree:
        """Shapes do not change when an update is added."""
        return world

    def step(self, state: State, updates: Sequence[Update], weights: Sequence[float]) -> State:
        """New objects for the tensors that the updates carry."""
        touched = {k for u in updates for k in u.payload}
        return state | {"params": {k: v.view_as(v) if k in touched else v for k, v in state["params"].items()}}


@dataclass(frozen=True)
class Sized(Result):
    """A result whose packet holds names only, and the size that the real one would have."""

    bytes: int = 0

    @property
    def size(self) -> int:
        return self.bytes


class ShapeExecutor:
    """Gives every job's packet size without training."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tasks: dict[int, Task] = {}
        self.sizes: dict[tuple[str, ...], int] = {}

    def submit(self, task: Task) -> None:
        self.tasks[task.job.id] = task

    def result(self, job: int) -> Result:
        task = self.tasks.pop(job)
        s = self.setting
        local = Local(
            task.job.client, task.view, {}, task.job.turn, s.turns, task.job.visit, s.seed, s.trainer, task.traits
        )  # fmt: skip
        update = s.method.train(local, task.view)
        names = tuple(update)
        if names not in self.sizes:
            self.sizes[names] = s.codec.size(update)
        blob = wire.pack({k: torch.empty(0) for k in names}, {"codec": str(s.codec), "tensors": {}})
        return Sized(blob, {}, 1.0, {}, self.sizes[names])

    def forget(self, job: int) -> None:
        self.tasks.pop(job, None)

    def close(self) -> None:
        self.tasks.clear()


def plan(recipe: Recipe, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """Bytes, virtual seconds and memory of a recipe.

    Args:
        rows: rows of each client; needed only if `training.local_epochs` decides the number of steps.

    Returns:
        `seconds` (virtual), `down`, `up` (bytes in all), `turns`, `trainable`, `total` (elements), and `clients`: for
        each its bytes, jobs, busy share of the run and `memory` (see `hocket.models.memory.Memory`).
    """
    method, schedule = recipe.build_method(), recipe.build_schedule()
    up, down = recipe.build_codec("up"), recipe.build_codec("down")
    model = skeleton(recipe.model.source, task=recipe.model.task, num_labels=recipe.model.num_labels)
    view = views.make(model, method, recipe.model.task, recipe.seed)
    start = {k: _hollow(view.params[k]) for k in sorted(view.params)}
    shapes: Any = ShapeMethod(method)
    n = recipe.clients.count
    steps = [recipe.training.steps(rows[c] if rows else 1) for c in range(n)]
    server = Server(
        shapes, schedule, start, [Client(c) for c in range(n)], recipe.turns, recipe.seed, recipe.clients.preloaded
    )
    lanes: dict[str, dict[int, list[float]]] = {k: {c: [0, 0, 0] for c in range(n)} for k in ("down", "compute", "up")}

    def note(row: dict[str, Any]) -> None:
        if row["what"] in lanes:
            cell = lanes[row["what"]][row["client"]]
            cell[0] += 1
            cell[1] += row["bytes"]
            cell[2] += row["end"] - row["start"]

    setting = Setting(shapes, up, schedule.ahead, recipe.turns, recipe.seed, "uniform", ShapeTrainer())
    ledger = Ledger(listener=note)
    simulation = Simulation(server, recipe.devices(), steps, down, up, ShapeExecutor(setting), ledger)
    simulation.run()
    seconds = simulation.clock.now
    need = _memory(recipe, method, view, schedule.ahead, "feedback" in str(up))
    clients = [
        {
            "client": c,
            "jobs": int(lanes["compute"][c][0]),
            "down": int(lanes["down"][c][1]),
            "up": int(lanes["up"][c][1]),
            "busy": lanes["compute"][c][2] / seconds if seconds else 0.0,
            "memory": need,
            "fits": None if (gb := recipe.devices()[c].memory_gb) is None else need.total <= gb * 1e9,
        }
        for c in range(n)
    ]
    return {
        "seconds": seconds, "turns": recipe.turns, **ledger.bytes, "trainable": view.trainable, "total": view.total,
        "clients": clients,
    }  # fmt: skip


def _memory(recipe: Recipe, method: Method, view: views.View, ahead: int, feedback: bool) -> memory.Memory:
    """Of the job that trains most."""
    sizes = {k: p.numel() for k, p in view.params.items()}
    tokens = recipe.training.batch_size * recipe.data.max_length
    config = getattr(view.model, "config", None)
    layers = max(getattr(config, "num_hidden_layers", 1), 1)
    worst: memory.Memory | None = None
    for turn in range(recipe.turns):
        cache = {k: torch.empty(0) for k in sizes}
        local = Local(0, cache, {}, turn, recipe.turns, turn, recipe.seed, ShapeTrainer())
        only = method.trains(local)
        trained = {k: n for k, n in sizes.items() if only(k)}
        found = [int(m[1]) for k in trained if (m := LAYER.search(k))]
        lowest = min(found) / layers if len(found) == len(trained) else 0.0
        need = memory.estimate(view.total, trained, recipe.training.slots, config, tokens, ahead, feedback, lowest)
        worst = need if worst is None or need.total > worst.total else worst
    assert worst is not None  # a recipe has at least one turn
    return worst


def _hollow(like: Tensor) -> Tensor:
    """A tensor of that shape and dtype that takes no memory."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape)
