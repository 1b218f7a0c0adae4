"""A local step of FedKRSO against one of LoRA (fedit) of the same rank: same model, targets, rows, optimizer.

Jobs are timed whole: FedKRSO's copy of the adapted weights, its draws, and what goes into the weights at an interval's
end are in its time. Jobs are interleaved; ratios are medians over pairs, of wall time and of processor time, which
other work on the machine disturbs less. Memory is planned from shapes; bytes are those of packets.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from common import save

from hocket import models
from hocket.codecs import codec
from hocket.methods import Local, method
from hocket.models import memory, views
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import generator

MODEL, LENGTH, PAIRS, STEPS, RANK = "minilm-l6-v2", 64, 11, 20, 4
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]  # as in the published variant
CONFIG = Training.model_validate({"batch_size": 4, "local_steps": STEPS, "lr": 2e-4})
SPECS: dict[str, dict[str, Any]] = {
    "fedit": {"name": "fedit", "rank": RANK, "targets": TARGETS},
    "fedkrso": {"name": "fedkrso", "rank": RANK, "targets": TARGETS, "subspaces": 10, "interval": 10},
    "fedavg": {"name": "fedavg"},
}


def rows(n: int, vocab: int) -> list[dict[str, Any]]:
    """Keyed random rows: what they say does not matter to time and memory."""
    g = generator("bench")
    return [{"ids": torch.randint(1000, vocab, (LENGTH,), generator=g), "label": i % 2} for i in range(n)]


def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one length to a batch."""
    ids = torch.stack([r["ids"] for r in chosen])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([r["label"] for r in chosen])
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    sides: dict[str, tuple[Any, TorchTrainer, Any]] = {}
    result: dict[str, Any] = {
        "model": MODEL, "rows": CONFIG.batch_size, "tokens": LENGTH, "steps": STEPS, "rank": RANK, "subspaces": 10,
        "interval": 10, "target": 1.3,
    }  # fmt: skip
    for name, spec in SPECS.items():
        loaded = models.load(MODEL, task="classification", num_labels=2)
        m = method.build(spec)
        view = views.make(loaded.model, m, "classification", 0)
        trainer = TorchTrainer(view, [rows(64, loaded.model.config.vocab_size)], collate, CONFIG)
        sides[name] = m, trainer, m.init(trainer.start(), 0)["params"]
        noted = memory.Noted(trainer)
        sent = m.train(Local(0, sides[name][2], {}, 0, 1, 0, 0, noted), sides[name][2])  # the first job warms up
        need = memory.needs(view, noted.jobs, memory.Step(CONFIG.batch_size, LENGTH, CONFIG.slots))[0]
        result[name] = {
            "up_bytes": codec.build("raw").size(sent),
            "memory": need.total,
            "memory_beside_weights_and_activations": need.trained + need.gradients + need.optimizer,
        }
    times: dict[str, list[tuple[float, float]]] = {"fedit": [], "fedkrso": []}
    for pair in range(PAIRS):
        for name in sorted(times, reverse=pair % 2 == 1):
            m, trainer, start = sides[name]
            wall, processor = time.perf_counter(), time.process_time()
            m.train(Local(0, start, {}, 0, 1, pair, 0, trainer), start)
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    for name, seen in times.items():
        result[name]["step_ms"] = round(1e3 * statistics.median(x for x, _ in seen) / STEPS, 2)
        result[name]["processor_ms"] = round(1e3 * statistics.median(x for _, x in seen) / STEPS, 2)
    for i, key in enumerate(("ratio", "processor_ratio")):
        ratios = [a[i] / b[i] for a, b in zip(times["fedkrso"], times["fedit"], strict=True)]
        result[key] = round(statistics.median(ratios), 4)
        result[f"{key}s"] = [round(x, 4) for x in ratios]
    save("krso", result)


if __name__ == "__main__":
    main()
