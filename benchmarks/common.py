"""What the benchmark scripts share: random rows, a federation without files, and result files with the git hash."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from hocket import models
from hocket.client import Setting
from hocket.clock import Device
from hocket.codecs import codec
from hocket.executors import Inline
from hocket.methods import Client, method
from hocket.models import views
from hocket.provenance import git_hash
from hocket.schedules import schedule
from hocket.sections import Training
from hocket.server import Server
from hocket.simulate import Simulation
from hocket.store import Spool
from hocket.training import TorchTrainer
from hocket.tree import generator

RESULTS = Path(__file__).parent / "results"
MODEL = os.environ.get("HOCKET_BENCH_MODEL", "smollm2-135m-instruct")


def save(name: str, result: dict[str, Any]) -> None:
    """Print and keep a result."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": name,
        "git": git_hash(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        **result,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def rows(client: int, n: int, vocab: int, length: int) -> list[torch.Tensor]:
    """`n` rows of keyed random tokens: timing and memory do not depend on what they say."""
    g = generator("bench", client)
    return [torch.randint(10, vocab, (length,), generator=g) for _ in range(n)]


def collate(chosen: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of one length to a batch, every token a label."""
    ids = torch.stack(chosen)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def simulation(
    meth: dict[str, Any] | str, clients: int, turns: int, config: Training, length: int, source: str = MODEL,
    sched: Any = "sync", spool: Path | None = None, budget: int = 64 << 20,
) -> tuple[Simulation, TorchTrainer]:  # fmt: skip
    """A simulated federation on random rows, evaluation left out."""
    loaded = models.load(source)
    m, s = method.build(meth), schedule.build(sched)
    view = views.make(loaded.model, m, "causal", 0)
    size, vocab = config.batch_size * config.local_steps, loaded.model.config.vocab_size
    data = [rows(c, size, vocab, length) for c in range(clients)]
    trainer = TorchTrainer(view, data, collate, config)
    server = Server(m, s, view.start(), [Client(c, len(d)) for c, d in enumerate(data)], turns, 0)
    setting = Setting(m, codec.build("raw"), s.ahead, turns, 0, "examples", trainer)
    devices = [Device(step_seconds=1.0 + 0.1 * c) for c in range(clients)]
    raw = codec.build("raw")
    return Simulation(
        server, devices, [config.local_steps] * clients, raw, raw, Inline(setting), spool=Spool(spool, budget)
    ), trainer  # fmt: skip
