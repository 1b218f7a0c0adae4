"""A client's work on one job: the same code in a simulation, in a worker process and on a distant machine.

Law of own updates: a client that starts turn t while its turns before t are still on their way starts from the server's
version plus the sum of those updates. They live in its memory as `own/<turn>/<tensor>`, exactly as the server will
decode them. `Job.own` names those the server still counts on: one that is aggregated, refused or given up is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hocket.codecs import Codec
from hocket.methods import Job, Local, Method
from hocket.methods.base import Trainer
from hocket.tree import Tree

Weighting = Literal["examples", "rows", "uniform"]


@dataclass(frozen=True)
class Setting:
    """What is the same for every job of every client in a run.

    Attributes:
        method, codec: as in the recipe; `codec` is the uplink's.
        ahead: turns a client may be ahead of the server; 0 keeps no own updates.
        turns, seed: of the run.
        weighting: what an update weighs: the examples it was trained on, the rows the client holds, or 1.
        trainer: local optimization.
    """

    method: Method
    codec: Codec
    ahead: int
    turns: int
    seed: int
    weighting: Weighting
    trainer: Trainer


@dataclass(frozen=True)
class Result:
    """What a job leaves behind: the packet to send, the client's memory from now on, and how training went."""

    blob: bytes
    memory: Tree
    weight: float
    metrics: dict[str, float]

    @property
    def size(self) -> int:
        """Bytes that travel."""
        return len(self.blob)


def side(setting: Setting, job: Job, world: Tree, memory: Tree, traits: Mapping[str, Any] | None = None) -> Local:
    """What a method sees of a client's world. Training turns count from 0; what comes before them is negative."""
    turn = job.turn - setting.method.prelude
    return Local(
        job.client, world, memory, turn, setting.turns, job.visit, setting.seed, setting.trainer, traits or {}
    )  # fmt: skip


def work(
    setting: Setting,
    job: Job,
    view: Tree,
    memory: Mapping[str, Any],
    rows: int = 1,
    traits: Mapping[str, Any] | None = None,
) -> Result:
    """Do one job. Pure: the same arguments give the same bytes, wherever and whenever it runs.

    Args:
        view: the client's copy of the server's view at `job.version`; not written into.
        memory: the client's private tensors from before; not written into.
        rows: rows this client holds.
    """
    turn_of = {k: int(k.split("/")[1]) for k in memory if k.startswith("own/")}
    # the server says which earlier turns it still counts on; later ones matter when a turn is asked for again
    keep: Tree = {k: v for k, v in memory.items() if k not in turn_of or turn_of[k] in job.own or turn_of[k] > job.turn}
    world = view
    for turn in (t for t in job.own if t in turn_of.values()):
        prefix = f"own/{turn}/"
        world = setting.method.own(world, {k.removeprefix(prefix): v for k, v in keep.items() if k.startswith(prefix)})
    local = side(setting, job, world, keep, traits)
    update = setting.method.train(local, world)
    blob = setting.codec.encode(update, keep)
    if setting.ahead:
        sent: Mapping[str, Any] = update if setting.codec.lossless else setting.codec.decode(blob)
        keep |= {f"own/{job.turn}/{k}": sent[k] for k in sent}
    weight = {"examples": local.metrics.get("examples", 1.0), "rows": float(rows), "uniform": 1.0}[setting.weighting]
    return Result(blob, keep, weight, local.metrics)
