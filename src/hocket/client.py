"""A client's work on one job: the same code in a simulation, in a worker process and on a distant machine.

Law of own updates: a client that starts turn t while its turns before t are still on their way starts from the server's
version plus the sum of those updates. They live in its memory as `own/<turn>/<tensor>`, exactly as the server will
decode them. `Job.own` names those the server still counts on: one that is aggregated, refused or given up is not in it.

Law of sent updates: what the sending side remembers (error feedback, the sum of what was sent) is written as
`sent/<visit>/<name>` and counts once the server has that visit's update; `Job.follows` names the last that does. So
what belonged to a lost or refused update is forgotten with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hocket import store, wire
from hocket.codecs import Codec
from hocket.codecs.base import sent_raw
from hocket.methods import Job, Local, Method
from hocket.methods.base import Trainer
from hocket.tree import Tree

SENT, CARRIED = "sent/", "carried/"  # in a client's memory

Weighting = Literal["examples", "tokens", "rows", "uniform"]


@dataclass(frozen=True)
class Setting:
    """What is the same for every job of every client in a run.

    Attributes:
        method, codec: as in the recipe; `codec` is the uplink's.
        ahead: turns a client may be ahead of the server; 0 keeps no own updates.
        carries: send what changed since the last update that counted (see `ca2fl`).
        turns, seed: of the run.
        weighting: what an update weighs: the examples it was trained on, the label tokens that its losses were means
            over, the rows the client holds, or 1.
        trainer: local optimization.
    """

    method: Method
    codec: Codec
    ahead: int
    turns: int
    seed: int
    weighting: Weighting
    trainer: Trainer
    carries: bool = False


@dataclass(frozen=True)
class Result:
    """What a job leaves behind: the packet to send, the client's memory from now on, how training went, what encoding
    took (floating-point operations), the tensors that the codec could not make smaller, and the bytes of those that are
    beside the method's own (see `Method.beside`)."""

    blob: bytes
    memory: Tree
    weight: float
    metrics: dict[str, float]
    flops: float = 0.0
    raw: int = 0
    beside: int = 0

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
    into: Path | None = None,
) -> Result:
    """Do one job. Pure: the same arguments give the same bytes, wherever and whenever it runs.

    Args:
        view: the client's copy of the server's view at `job.version`; not written into.
        memory: the client's private tensors from before; not written into.
        rows: rows this client holds.
        into: file to write the packet to, so that it is never in memory as a whole; `Result.blob` is empty then.
    """
    turn_of = {k: int(k.split("/")[1]) for k in memory if k.startswith("own/")}
    # the server says which earlier turns it still counts on; later ones matter when a turn is asked for again
    keep: Tree = {k: v for k, v in memory.items() if k not in turn_of or turn_of[k] in job.own or turn_of[k] > job.turn}
    world = view
    for turn in (t for t in job.own if t in turn_of.values()):
        prefix = f"own/{turn}/"
        world = setting.method.own(world, {k.removeprefix(prefix): v for k, v in keep.items() if k.startswith(prefix)})
    keep, past = _past(keep, job.heard, job.follows)
    local = side(setting, job, world, keep, traits)
    update = setting.method.train(local, world)
    known = dict(past)
    if setting.carries:
        update = {k: x - past[CARRIED + k] if CARRIED + k in past else x for k, x in update.items()}
    blob = b""
    if into is None:
        blob = setting.codec.encode(update, known)
    else:
        store.put(into, lambda f: setting.codec.write(f, update, known))
    packet = wire.Packet(into or blob, check=False)
    if setting.ahead or setting.carries:
        sent: Mapping[str, Any] = update if setting.codec.lossless else setting.codec.decode(packet)
        for k in sent:
            if setting.ahead:
                keep[f"own/{job.turn}/{k}"] = sent[k]
            if setting.carries:
                known[CARRIED + k] = past[CARRIED + k] + sent[k] if CARRIED + k in past else sent[k]
    keep |= {f"{SENT}{job.visit}/{k}": v for k, v in known.items() if v is not past.get(k)}
    trained = {k: local.metrics.get(k, 1.0) for k in ("examples", "tokens")}
    weight = {**trained, "rows": float(rows), "uniform": 1.0}[setting.weighting]
    raw = sent_raw(packet.meta)
    beside = beside_bytes(setting.method, setting.codec, update)
    return Result(blob, keep, weight, local.metrics, setting.codec.work(update), raw, beside)


def beside_bytes(method: Method, codec: Codec, tree: Tree) -> int:
    """Bytes of a packet of what is in `tree` beside the method's own tensors; 0 if nothing is."""
    names = method.beside(tree)
    return codec.size({k: tree[k] for k in names}) if names else 0


def _past(memory: Tree, heard: int, follows: int) -> tuple[Tree, Tree]:
    """(memory without what can never count again, what the sending side knew after visit `follows`). Sets of visits
    between `heard` and `follows` stay: any of these may still be lost."""
    counted: dict[str, int] = {}  # by name, the newest visit that is certain
    newest: dict[str, int] = {}
    kept: Tree = {}
    for key in memory:
        visit, _, name = key.removeprefix(SENT).partition("/") if key.startswith(SENT) else ("", "", key)
        if not visit:
            kept[key] = memory[key]
        elif int(visit) <= heard:
            counted[name] = max(int(visit), counted.get(name, -1))
        elif int(visit) <= follows:
            kept[key] = memory[key]
            newest[name] = max(int(visit), newest.get(name, -1))
    newest = counted | newest
    kept |= {f"{SENT}{v}/{name}": memory[f"{SENT}{v}/{name}"] for name, v in counted.items()}
    return kept, {name: memory[f"{SENT}{v}/{name}"] for name, v in newest.items()}
