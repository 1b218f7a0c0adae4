"""FedKSeed's local step against two plain forward passes of the same batch, and what a rebuild costs, on MiniLM (BERT).

One thread, and the processor's seconds rather than the clock's, so that a busy machine can be measured on. A job has
`STEPS` steps; its very last way back is not needed and not made (one of 3 STEPS draws).

`keep` is how much of z a client keeps within a step; `naive` is three whole draws a step, a pass over memory each, as
one would write it. All of them and the forward passes are interleaved; a ratio is the median over rounds.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from common import rows, save

from hocket import draws, models
from hocket.directions import Directions
from hocket.methods import Local, method
from hocket.methods.fedkseed import SEED
from hocket.models import views
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, key

MODEL, STEPS, TARGET = "minilm-l6-v2", 3, 1.15
SHAPES = ((4, 32), (8, 128), (16, 128))
KEEP = ("none", "largest", "model")


def collate(chosen: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows to classify."""
    ids = torch.stack(chosen)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the processor's."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    made = {k: method.build({"name": "fedkseed", "keep": k}) for k in KEEP}
    model = models.load(MODEL, task="classification", num_labels=2).model
    view = views.make(model, made["none"], "classification", 0)
    start = view.start()
    state: Tree = made["none"].init(start, 0)["params"]
    d = sum(x.numel() for x in start.values())
    table = []
    Directions(1).add({name: torch.zeros_like(x) for name, x in start.items()}, [(0, 1.0)])  # warm
    for size, length in SHAPES:
        data = [rows(0, size * STEPS, model.config.vocab_size, length)]
        config = Training.model_validate({"optimizer": "sgd", "lr": 1e-6, "batch_size": size, "local_steps": STEPS})
        trainer = TorchTrainer(view, data, collate, config)
        local = Local(0, state, {}, 0, 1, 0, 0, trainer)
        batches = [micro[0] for micro in trainer._batches(local)]

        def plain(t: TorchTrainer = trainer, b: list = batches) -> None:
            t.place(start)
            model.eval()
            with torch.no_grad():
                for batch in b:
                    for _ in range(2):
                        float(t._loss(model, batch)[0])

        def naive(t: TorchTrainer = trainer, who: Local = local) -> None:
            for point in t.walk(who, start, lambda name: True):
                for i, c in enumerate((5e-4, -1e-3, 5e-4)):
                    for name, x in point.live.items():
                        x.add_(draws.normal(x.shape, key(int(state[SEED]), 1), name), alpha=c)
                    if i < 2:
                        point.loss()

        ways = {"plain": plain, "naive": naive}
        ways |= {k: (lambda m=m, who=local: m.train(who, state)) for k, m in made.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, work in ways.items():
                found[name].append(seconds(work) / STEPS)
        row = {"rows": size, "length": length, "tokens": size * length}
        row["two_forwards_seconds"] = round(statistics.median(found["plain"]), 4)
        for name in ("naive", *KEEP):
            pairs = zip(found[name], found["plain"], strict=True)
            row[name] = round(statistics.median(a / b for a, b in pairs), 3)
        table.append(row)
        print(row, flush=True)
    held = {name: torch.zeros_like(x) for name, x in start.items()}
    terms = [(k, 1e-6) for k in range(4)]
    each = statistics.median(seconds(lambda: Directions(1).add(held, terms)) / len(terms) for _ in range(3))
    save("kseed", {
        "model": MODEL, "parameters": d, "largest_tensor": max(x.numel() for x in start.values()),
        "threads": torch.get_num_threads(), "rounds": rounds, "target": TARGET, "steps": table,
        "target_holds_from_tokens": {
            k: min((r["tokens"] for r in table if all(q[k] <= TARGET for q in table if q["tokens"] >= r["tokens"])),
                   default=None)
            for k in ("naive", *KEEP)
        },
        "rebuild": {
            "seconds_a_direction": round(each, 4), "nanoseconds_a_number": round(each / d * 1e9, 2),
            "seconds_at_most_K_4096": math.ceil(each * 4096),
            "expected_directions_of_10_clients_200_steps": round(4096 * (1 - (1 - 1 / 4096) ** 2000)),
        },
    })  # fmt: skip


if __name__ == "__main__":
    main()
