"""Memory of a client, planned from shapes against measured in a real step, for every registered method.

One job of two steps a method on a real model; the second step is measured (see `hocket.models.meter`). The target, at
most 10 % apart, is for parameters + gradients + optimizer; activations and the peak are shown as they are. Planned
activations are those of a padded batch, whose attention mask is kept too; the peak is planned as the sum of all parts.
"""

from __future__ import annotations

from typing import Any

from common import MODEL, collate, rows, save

from hocket import models
from hocket.methods import Local, method
from hocket.models import memory, views
from hocket.sections import Training
from hocket.training import TorchTrainer

ROWS, LENGTH = 2, 128
STATIC = ("parameters", "gradients", "optimizer")


def cases() -> dict[str, dict[str, Any]]:
    """Every registered method, and the kinds of blocks."""
    named = {name: {"name": name} for name in method.names()}
    return named | {
        "fedbcd, partial": {"name": "fedbcd", "partial": True},
        "fedbcd, embeddings": {"name": "fedbcd", "extras": True, "order": "reverse"},
        "fedbcd, highest layers": {"name": "fedbcd", "order": "reverse"},
        "fedit, rank 64 everywhere": {
            "name": "fedit", "rank": 64, "targets": [f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")],
        },
    }  # fmt: skip


def main() -> None:
    config = Training.model_validate({"batch_size": ROWS, "local_steps": 2, "measure_memory": True})
    result: dict[str, Any] = {"model": MODEL, "rows": ROWS, "tokens": LENGTH, "target": [0.9, 1.1], "methods": {}}
    for name, fields in cases().items():
        loaded = models.load(MODEL)
        m = method.build(fields)
        view = views.make(loaded.model, m, "causal", 0)
        data = [rows(0, 2 * ROWS, loaded.model.config.vocab_size, LENGTH)]
        trainer = TorchTrainer(view, data, collate, config)
        noted = memory.Noted(trainer)
        start = m.init(trainer.start(), 0)["params"]
        local = Local(0, start, {}, 0, 1, 0, 0, noted)
        m.train(local, start)
        plan = memory.needs(view, noted.jobs, memory.Step(ROWS, LENGTH, config.slots))[0].table
        real = {k.removeprefix("memory_"): v for k, v in local.metrics.items() if k.startswith("memory_")}
        both = {k: [plan[k], int(real[k])] for k in sorted(plan.keys() & real.keys())}
        static = [sum(both[k][i] for k in STATIC) for i in (0, 1)]
        result["methods"][name] = {
            "ratio": round(static[0] / static[1], 4),
            "activations_ratio": round(both["activations"][0] / both["activations"][1], 4),
            "peak_ratio": round(both["peak"][0] / both["peak"][1], 4),
            "planned_measured_bytes": both,
        }
        del loaded, view, trainer, noted, start, local
    save("memory_plan", result)


if __name__ == "__main__":
    main()
