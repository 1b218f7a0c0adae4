"""Speed and memory of methods on one GPU that all simulated clients share: `python benchmarks/bench_gpu.py`.

The model has the shapes of Llama-3.2-3B, random weights in bf16, and fp32 masters of what trains. Measured for each
method: tokens a second of a federated run (server, packets and copies to and from the host included) against a plain
loop that trains the same tensors on the same batches and federates nothing (target: 0.95 of it); seconds that a
client computes in a round; peak memory, planned and measured, and its parts. Plain and federated runs alternate; the
ratio is the median over pairs. Without a GPU the same script runs on the CPU with a tiny shape, which shows that it
works and nothing about GPUs; the result says which of the two it is.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import collate, rows, save
from transformers import AutoConfig, AutoModelForCausalLM

from hocket.client import Setting
from hocket.clock import Device
from hocket.codecs import codec
from hocket.executors import Inline
from hocket.methods import Client, Local, Method, method
from hocket.models import memory, shapes, views
from hocket.models.forward import autocast, loss_sum
from hocket.schedules import schedule
from hocket.sections import Training
from hocket.server import Server
from hocket.simulate import Simulation
from hocket.store import Spool
from hocket.training import TorchTrainer
from hocket.tree import Tree

SHAPE = "llama-3.2-3b"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# rows and tokens of a batch, steps of a job, clients of a round, pairs of runs
ROWS, LENGTH, STEPS, CLIENTS, PAIRS = (4, 512, 16, 4, 3) if GPU else (2, 64, 4, 2, 3)
TINY = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "fedbcd": {"name": "fedbcd", "layers_per_block": 2 if GPU else 1},
    "fedcybgd": {"name": "fedcybgd", "layers_per_block": 2 if GPU else 1},
    "fedit": {"name": "fedit", "rank": 8},
    "ffa-lora": {"name": "ffa-lora", "rank": 8},
    "flora": {"name": "flora", "rank": 8},
}
CONFIG = Training.model_validate({"batch_size": ROWS, "local_steps": STEPS, "lr": 1e-4, "precision": "bf16"})


class Timed(TorchTrainer):
    """Notes the seconds of each job's training."""

    def fit(self, local: Local, *rest: Any) -> Tree:
        began = now()
        delta = super().fit(local, *rest)
        self.seconds.append(now() - began)
        return delta


def now() -> float:
    """Seconds, once the device has done what it was asked."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def build(fields: dict[str, Any], clients: int) -> tuple[Method, Timed]:
    """A method, and a trainer on a fresh model with random weights."""
    values = shapes.SHAPES[SHAPE] | ({} if GPU else TINY)
    config = AutoConfig.for_model(**values, use_cache=False)
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    m = method.build(fields)
    data = [rows(c, ROWS * STEPS, config.vocab_size, LENGTH) for c in range(clients)]
    trainer = Timed(views.make(model, m, "causal", 0), data, collate, CONFIG)
    trainer.seconds = []
    return m, trainer


def federated(m: Method, trainer: Timed, start: Tree, clients: int, spool: Path) -> float:
    """Seconds of one round."""
    s, raw = schedule.build("cyclic" if m.name == "fedcybgd" else "sync"), codec.build("raw")
    server = Server(m, s, dict(start), [Client(c, ROWS * STEPS) for c in range(clients)], 1, 0)
    setting = Setting(m, raw, 0, 1, 0, "examples", trainer)
    devices = [Device() for _ in range(clients)]
    sim = Simulation(
        server, devices, [STEPS] * clients, raw, raw, Inline(setting), spool=Spool(spool, 8 << 30)
    )  # fmt: skip
    began = now()
    sim.run()
    return now() - began


def plain(m: Method, trainer: Timed, start: Tree, jobs: int) -> float:
    """Seconds of the same steps as anybody would write them, on the model as it is."""
    view, model = trainer.view, trainer.view.model
    local = Local(0, start, {}, 0, 1, 0, 0, trainer)
    only = m.trains(local)
    live = [view.params[k] for k in start if only(k) and not (m.name == "flora" and ".base_layer." in k)]
    batches = [micro[0] for c in range(jobs) for micro in trainer._batches(Local(c, start, {}, 0, 1, 0, 0, trainer))]
    model.train()
    began = now()
    for p in live:
        p.data = p.data.float()
        p.requires_grad_(True)
    for i, batch in enumerate(batches):
        if i % STEPS == 0:
            optimizer = torch.optim.AdamW(live, CONFIG.lr, weight_decay=0.0, fused=True)
        with autocast(DEVICE, "bf16"):
            loss, count = loss_sum(model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = now() - began
    for p in live:
        p.requires_grad_(False)
    view._placed.clear()  # the values were changed behind its back; the next job puts its own in place
    trainer._cast.clear()
    return seconds


def measure(m: Method, trainer: Timed, start: Tree) -> dict[str, Any]:
    """Memory of one job: planned, measured, and their ratio without activations."""
    trainer.config = CONFIG.model_copy(update={"local_steps": 2, "measure_memory": True})
    noted = memory.Noted(trainer)
    local = Local(0, start, {}, 0, 1, 0, 0, noted)
    m.train(local, start)
    trainer.config = CONFIG
    plan = memory.needs(trainer.view, noted.jobs, memory.Step(ROWS, LENGTH, CONFIG.slots, "bf16", gpu=GPU))[0].table
    real = {k.removeprefix("memory_"): int(v) for k, v in local.metrics.items() if k.startswith("memory_")}
    static = [sum(of[k] for k in ("parameters", "gradients", "optimizer")) for of in (plan, real)]
    return {
        "planned_to_measured": round(static[0] / static[1], 4),
        "peak_planned_to_measured": round(plan["peak"] / real["peak"], 4),
        "planned_bytes": plan,
        "measured_bytes": real,
    }


def one(fields: dict[str, Any], spool: Path) -> dict[str, Any]:
    """All figures of a method."""
    clients = 2 if GPU and fields["name"] == "fedavg" else CLIENTS  # full updates are 13 GB each
    m, trainer = build(fields, clients)
    start = trainer.start()
    jobs = 1 if m.name == "fedcybgd" else clients  # one client a turn
    tokens = jobs * STEPS * ROWS * LENGTH
    walls: list[tuple[float, float]] = []
    for pair in range(PAIRS + 1):
        trainer.seconds.clear()
        ours = federated(m, trainer, start, clients, spool)
        computing = statistics.mean(trainer.seconds)
        trainer.place(start)
        theirs = plain(m, trainer, start, jobs)
        if pair:  # the first pair warms up
            walls.append((ours, theirs))
    peak = {}
    if GPU:
        trainer.place(start)
        torch.cuda.reset_peak_memory_stats()
        federated(m, trainer, start, clients, spool)
        peak = {"peak_of_a_round_bytes": torch.cuda.max_memory_allocated()}
    ours, theirs = (statistics.median(w[i] for w in walls) for i in (0, 1))
    return {
        "clients": clients,
        "tokens_per_second": {"federated": round(tokens / ours, 1), "plain": round(tokens / theirs, 1)},
        "ratio": round(statistics.median(b / a for a, b in walls), 4),
        "ratios": [round(b / a, 4) for a, b in walls],
        "round_seconds": round(ours, 3),
        "compute_seconds_a_client_and_round": round(computing, 3),
        **peak,
        "memory": measure(m, trainer, start),
    }


def main() -> None:
    where = torch.cuda.get_device_name() if GPU else "the CPU of this machine, no GPU"
    result: dict[str, Any] = {
        "device": where,
        "says_something_about_gpus": GPU,
        "shape": SHAPE if GPU else f"a tiny {SHAPE}: " + ", ".join(f"{k} {v}" for k, v in TINY.items()),
        "weights": "bf16, random; what trains in fp32", "rows": ROWS, "tokens": LENGTH, "steps": STEPS,
        "target_ratio": 0.95, "methods": {},
    }  # fmt: skip
    for name, fields in METHODS.items():
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as spool:
            result["methods"][name] = one(fields, Path(spool))
        if GPU:
            torch.cuda.empty_cache()
    save("gpu", result)


if __name__ == "__main__":
    main()
