"""What each client's model comes to if it never meets the others: the local side of CLLoRA's comparison.

Reads the rates that `hocket compare` chose for the studies small and tiny beside this file, and trains every client of
every cell alone: as many jobs, with the same rows, batches and rate, as it does in the federation, each starting from
what its last one came to. Writes local.json beside this file, which also says what clients hold. A study that is in
it is not done again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hocket import evaluate
from hocket.client import work
from hocket.experiment import Experiment
from hocket.methods import Job
from hocket.provenance import git_hash
from hocket.study import gather
from hocket.tree import Tree

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CELLS = ("neither", "lengths", "quality", "both")


def alone(e: Experiment) -> list[dict[str, Any]]:
    """Each client's model trained alone: its loss on everybody's held-out rows and on the client's own, and the start
    model's on these, which are others in another partition."""
    recipe, setting, start = e.recipe, e.setting(), e.trainer.start()
    clients = []
    for c in range(recipe.clients.count):
        world, memory, began = start, {}, time.process_time()
        for turn in range(recipe.turns):
            done = work(setting, Job(turn, c, 0, 0, visit=turn), world, memory, e.rows[c])
            world, memory = setting.method.own(world, setting.codec.decode(done.blob)), done.memory
        seconds = time.process_time() - began
        before, own, everybody = owned(e, c, start), owned(e, c, world), e.evaluate(world)
        held = {k: e.data.summary[c][k] for k in ("rows", "cut", "lost", "corrupted")}
        found = {"loss": everybody["loss"], "groups": everybody["groups"], "own": own["loss"]}
        found |= {"own_start": before["loss"], "own_tokens": own["tokens"], "seconds": seconds}
        clients.append(found | held | {"tokens": e.data.clients[c].tokens})
    return clients


def owned(e: Experiment, client: int, params: Tree) -> dict[str, Any]:
    """A model on a client's own held-out rows."""
    e.trainer.place(params)
    return evaluate.heldout(e.view.model, e.data.own[client], e.collate, batch_size=e.recipe.evaluation.batch_size)


def main() -> None:
    path = HERE / "local.json"
    done = json.loads(path.read_text()) if path.exists() else {"git": git_hash()}
    for study in gather([HERE / "small.toml", HERE / "tiny.toml"]):
        if study.study in done:
            continue
        chosen = json.loads((RESULTS / f"{study.study}.json").read_text())["variants"]
        base, cells = None, {}
        for variant in (v for v in study.variant if v.name in CELLS):
            cells[variant.name] = []
            for recipe in study.runs(variant, chosen[variant.name]["rate"]).values():
                e = Experiment(recipe)
                base = e.evaluate(e.trainer.start())["loss"] if base is None else base
                cells[variant.name].append(alone(e))
                print(study.study, variant.name, recipe.seed, [c["loss"] for c in cells[variant.name][-1]], flush=True)
        done[study.study] = {"base": base, "cells": cells}
        path.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
