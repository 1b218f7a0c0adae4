"""A step on the last two layers against a step on the first two: autograd must stop below what trains."""

from __future__ import annotations

import statistics
import time

from common import MODEL, collate, rows, save

from hocket import models
from hocket.methods import Local, method
from hocket.models import views
from hocket.sections import Training
from hocket.training import TorchTrainer


def main() -> None:
    loaded = models.load(MODEL)
    depth = loaded.model.config.num_hidden_layers
    m = method.build({"name": "fedbcd", "layers_per_block": 2})
    view = views.make(loaded.model, m, "causal", 0)
    config = Training.model_validate({"batch_size": 2, "local_steps": 1})
    trainer = TorchTrainer(view, [rows(0, 2, loaded.model.config.vocab_size, 64)], collate, config)
    start = view.start()
    blocks = m.cut(start)  # type: ignore[attr-defined]
    walls: dict[str, list[float]] = {"first": [], "last": []}
    for _ in range(9):
        for name, block in (("first", set(blocks[0])), ("last", set(blocks[-1]))):
            local = Local(0, start, {}, 0, 1, 0, 0, trainer)
            began = time.perf_counter()
            trainer.fit(local, start, block.__contains__, 0.0)
            walls[name].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(walls["first"][1:], walls["last"][1:], strict=True)]
    save(
        "depth",
        {
            "model": MODEL, "layers": depth, "rows": 2, "tokens": 64,
            "first_two_seconds": round(statistics.median(walls["first"][1:]), 3),
            "last_two_seconds": round(statistics.median(walls["last"][1:]), 3),
            "last_to_first": round(statistics.median(ratios), 3),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
