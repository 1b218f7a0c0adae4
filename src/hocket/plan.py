"""Before spending anything: bytes, virtual hours and memory of a recipe, from shapes alone.

The same server, method, schedule, codecs and virtual clock run as in a real run, but the model is on torch's meta
device, where arithmetic on shapes costs nothing; training, checks of values and evaluation are left out. So packet
sizes are exact for codecs whose size does not depend on values (all but those that drop small ones).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hocket import wire
from hocket.client import Result, Setting, work
from hocket.codecs.base import Codec, Feedback, sent_raw
from hocket.executors import Task
from hocket.ledger import Ledger
from hocket.methods import Local, Method, State, Update
from hocket.methods.base import Between, Masks, Penalty
from hocket.methods.nouns import Point
from hocket.models import memory, views
from hocket.models.forward import DTYPES
from hocket.models.skeleton import skeleton
from hocket.recipe import Recipe
from hocket.server import Server
from hocket.simulate import Simulation
from hocket.tree import Tree


class ShapeTrainer:
    """Stands in for training: differences of the right shapes, and gradients that prefer no tensor.

    Args:
        count: optimizer steps of each client's jobs.
    """

    def __init__(self, count: Sequence[int]) -> None:
        self.count = count

    def fit(
        self, local: Local, start: Tree, only: Callable[[str], bool], prox: float,
        penalty: Penalty | None = None, masks: Masks | None = None, between: Between | None = None,
    ) -> Tree:  # fmt: skip
        """Deltas of the selected tensors: without values a tensor can stand for its own difference."""
        masks = masks or {}
        return {k: v.new_empty(masks[k].shape) if k in masks else v for k, v in start.items() if only(k)}

    def steps(self, local: Local) -> int:
        """As the recipe has them."""
        return self.count[local.client]

    def walk(self, local: Local, start: Tree, only: Callable[[str], bool], beside: int = 0) -> Iterator[Point]:
        """As many points as there are steps, all alike."""
        flat = Point({k: v for k, v in start.items() if only(k)}, lambda: 0.0, lambda stacks: [0.0, 0.0], 1.0)
        return itertools.repeat(flat, self.steps(local))

    def loss(self, params: Tree, batch: Any) -> Tensor:
        """There is nothing to evaluate in a plan."""
        raise TypeError("a plan evaluates nothing")

    def gradient_norms(self, local: Local, start: Tree) -> dict[str, float]:
        """1 for every tensor."""
        return dict.fromkeys(start, 1.0)


class ShapeMethod:
    """A method that takes every update: whether numbers are finite cannot be asked of shapes."""

    def __init__(self, inner: Method) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def check(self, state: State, update: Update) -> str | None:
        """Every update of a plan is in order."""
        return None

    def at(self, rate: float) -> ShapeMethod:
        """The same with another server rate."""
        return ShapeMethod(self.inner.at(rate))

    def layers(self, *_: Any) -> dict[str, dict[str, float]]:
        """Nothing can be measured of shapes."""
        return {}


class ShapeCodec:
    """Sizes of a codec's packets, whose trees are handed over as they are: nothing is encoded or decoded."""

    lossless = True  # in the sense that what arrives is what was sent

    def __init__(self, inner: Codec) -> None:
        self.inner = inner
        self._trees: list[Mapping[str, Tensor]] = []
        self._at: dict[Any, int] = {}  # equal shapes are one tree, however many clients send it
        self._sizes: dict[Any, tuple[int, int]] = {}

    @property
    def differences(self) -> bool:
        """Whether the codec is for differences only."""
        return self.inner.differences

    def __str__(self) -> str:
        return str(self.inner)

    def encode(self, tree: Mapping[str, Tensor], memory: Tree | None = None) -> bytes:
        """A packet that only says where the tree is."""
        key = _key(tree) if all(t.is_meta for t in tree.values()) else object()  # small things may have values
        at = self._at.setdefault(key, len(self._trees))
        if at == len(self._trees):
            self._trees.append(tree)
        return wire.pack({}, {"tree": at})

    def decode(self, packet: bytes | wire.Packet) -> Mapping[str, Tensor]:
        """The tree that was encoded."""
        packet = packet if isinstance(packet, wire.Packet) else wire.Packet(packet)
        return self._trees[packet.meta["tree"]]

    def work(self, tree: Mapping[str, Tensor]) -> float:
        """Operations that encoding `tree` takes."""
        return self.inner.work(tree)

    def size(self, tree: Mapping[str, Tensor]) -> int:
        """Bytes of the packet that the codec would make of `tree`."""
        return self.measure(tree)[0]

    def measure(self, tree: Mapping[str, Tensor]) -> tuple[int, int]:
        """Bytes of that packet, and how many of its tensors the codec cannot make smaller."""
        key = _key(tree)
        if key not in self._sizes:
            try:
                self._sizes[key] = self._measure(tree)
            except RuntimeError:  # this codec looks at values: zeros then, which take no memory until it does
                self._sizes[key] = self._measure({k: _hollow(t) for k, t in tree.items()})
        return self._sizes[key]

    def _measure(self, tree: Mapping[str, Tensor]) -> tuple[int, int]:
        # error feedback looks at values, but its packets are those of the codec within, under its name
        inner = self.inner.codec if isinstance(self.inner, Feedback) else self.inner
        parts, meta = inner._packed(tree, None)
        return wire.size(parts, meta | {"codec": str(self.inner)}), sent_raw(meta)


@dataclass(frozen=True)
class Sized(Result):
    """A result with the size that its packet would have."""

    bytes: int = 0

    @property
    def size(self) -> int:
        return self.bytes


class ShapeExecutor:
    """Does every job but its training. Clients' memories stay here, because shapes cannot be put into packets."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tasks: dict[int, Task] = {}
        self.memory: dict[int, Tree] = {}

    def submit(self, task: Task) -> None:
        self.tasks[task.job.id] = task

    def result(self, job: int) -> Result:
        t, codec = self.tasks.pop(job), cast(ShapeCodec, self.setting.codec)
        done = work(self.setting, t.job, t.view, self.memory.get(t.job.client, {}), t.rows, t.traits)
        self.memory[t.job.client] = done.memory
        size, raw = codec.measure(codec.decode(done.blob))
        return Sized(done.blob, {}, done.weight, {}, done.flops, raw, done.beside, size)

    def forget(self, job: int) -> None:
        self.tasks.pop(job, None)

    def close(self) -> None:
        self.tasks.clear()


def plan(recipe: Recipe, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """Bytes, virtual seconds and memory of a recipe.

    Args:
        rows: rows of each client; needed only if `training.local_epochs` decides the number of steps.

    Returns:
        What `clock` gives, and for each client `memory` (see `hocket.models.memory.Memory`) and whether it `fits`.
    """
    out, view, noted = _clock(recipe, rows)
    need = _memory(recipe, view, noted, recipe.build_schedule().ahead)
    for c, device in zip(out["clients"], recipe.devices(), strict=True):
        m, gb = need[c["client"]], device.memory_gb
        c |= {"memory": m, "memory_gb": gb, "fits": None if gb is None else m.total <= gb * 1e9}
    return out


def clock(recipe: Recipe, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """`plan` without memory, which takes most of the time that planning a large model takes.

    Returns:
        `seconds` (virtual), `down`, `up`, `catch_up`, `beside` (bytes in all), `turns`, `trainable`, `total`
        (elements), and `clients`: for each its bytes, jobs and busy share of the run.
    """
    return _clock(recipe, rows)[0]


def _clock(recipe: Recipe, rows: Sequence[int] | None) -> tuple[dict[str, Any], views.View, memory.Noted]:
    method, schedule = recipe.build_method(), recipe.build_schedule()
    up: Any = ShapeCodec(recipe.build_codec("up"))
    down: Any = ShapeCodec(recipe.build_codec("down"))
    m = recipe.model
    model = skeleton(m.source, task=m.task, num_labels=m.num_labels, dtype=DTYPES[m.dtype])
    view = views.make(model, method, recipe.model.task, recipe.seed, recipe.model.freeze)
    blank = lambda p: torch.empty_like(p, device="meta", dtype=torch.float32)  # noqa: E731
    start = {k: view.turned(k, blank(view.params[k])) for k in sorted(view.params)}
    shapes: Any = ShapeMethod(method)
    n = recipe.clients.count
    steps = [recipe.training.steps(rows[c] if rows else 1) for c in range(n)]
    server = Server(
        shapes, schedule, start, recipe.server_clients([1] * n), recipe.turns, recipe.seed, recipe.clients.preloaded
    )
    lanes: dict[str, dict[int, list[float]]] = {k: {c: [0, 0, 0] for c in range(n)} for k in ("down", "compute", "up")}

    def note(row: dict[str, Any]) -> None:
        if row["what"] in lanes:
            cell = lanes[row["what"]][row["client"]]
            cell[0] += 1
            cell[1] += row["bytes"]
            cell[2] += row["end"] - row["start"]

    noted = memory.Noted(ShapeTrainer(steps))
    setting = Setting(shapes, up, schedule.ahead, recipe.turns, recipe.seed, "uniform", noted, schedule.carries)
    ledger = Ledger(listener=note)
    charged = recipe.clients.catch_up == "charged"
    simulation = Simulation(
        server, recipe.devices(), steps, down, up, ShapeExecutor(setting), ledger, catch_up=charged,
        seconds=recipe.seconds,
    )  # fmt: skip
    simulation.run()
    seconds = simulation.clock.now
    clients = [
        {
            "client": c,
            "jobs": int(lanes["compute"][c][0]),
            "down": int(lanes["down"][c][1]),
            "up": int(lanes["up"][c][1]),
            "busy": lanes["compute"][c][2] / seconds if seconds else 0.0,
        }
        for c in range(n)
    ]
    out = {
        "seconds": seconds, "turns": recipe.turns, **ledger.bytes, "trainable": view.trainable, "total": view.total,
        "clients": clients,
    }  # fmt: skip
    return out, view, noted


def _memory(recipe: Recipe, view: views.View, noted: memory.Noted, ahead: int) -> dict[int, memory.Memory]:
    """For each client, of the job that needs most; a client without a job holds the model."""
    t, device = recipe.training, recipe.model.device
    step = memory.Step(
        t.batch_size, recipe.data.max_length, t.slots, t.precision, recipe.model.gradient_checkpointing,
        device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()),
    )  # fmt: skip
    jobs = {c: noted.jobs.get(c, []) for c in range(recipe.clients.count)}
    keeps = recipe.build_codec("up").remembers or recipe.build_schedule().carries
    return memory.needs(view, jobs, step, ahead, keeps, t.optimizer_state == "keep")


def _hollow(like: Tensor) -> Tensor:
    """A tensor of that shape and dtype that takes no memory."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def _key(tree: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Names, shapes and dtypes."""
    return tuple((k, t.shape, t.dtype) for k, t in tree.items())
