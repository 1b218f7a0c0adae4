"""Small worlds for tests: real trainer, real server, real packets; only the problem is small.

`quadratic` is a federation of quadratic functions in float64, in which the papers' identities are exact; `language` is
a tiny random language model with a few rows of tokens for each client.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hocket.client import Setting
from hocket.clock import Device
from hocket.codecs import codec
from hocket.executors import Inline
from hocket.methods import Client, Job, Local, Method, method
from hocket.models.views import View, make
from hocket.schedules import schedule
from hocket.sections import Training
from hocket.server import Server
from hocket.simulate import Simulation
from hocket.training import TorchTrainer
from hocket.tree import Tree, generator

AT_SITES = """[model]
source = "tiny:llama"
[data]
source = "at the sites"
template = "plain"
max_length = 16
[method]
name = "fedavg"
[clients]
count = 2
[deployment]
sites = ["a", "b"]
"""
"""What recipes of a deployment have in common."""


class Layer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))


class Quadratics(nn.Module):
    """f_i(x) = (x - c_i)' H_i (x - c_i) / 2 for clients i, x cut into layers."""

    def __init__(self, clients: int, layers: int, size: int, common: bool) -> None:
        super().__init__()
        d = layers * size
        self.layers = nn.ModuleList(Layer(size) for _ in range(layers))
        draw = lambda *key: torch.randn(d, d, dtype=torch.float64, generator=generator(*key))
        roots = [draw("H", 0 if common else i) for i in range(clients)]
        self.H = torch.stack([r @ r.T / d + 0.5 * torch.eye(d, dtype=torch.float64) for r in roots])
        self.c = torch.stack([draw("c", i)[0] for i in range(clients)])

    def forward(self, client: int) -> torch.Tensor:
        x = torch.cat([layer.w for layer in self.layers]) - self.c[client]
        return x @ self.H[client] @ x / 2

    def gap(self, params: Tree, weights: list[float]) -> float:
        """Mean objective above its minimum."""
        x = torch.cat([params[f"layers.{i}.w"] for i in range(len(self.layers))])
        p = torch.tensor(weights, dtype=torch.float64)
        p = p / p.sum()
        H = (p[:, None, None] * self.H).sum(0)
        best = torch.linalg.solve(H, (p[:, None, None] * self.H @ self.c[:, :, None]).sum(0)[:, 0])
        return float((x - best) @ H @ (x - best) / 2)


@dataclass
class World:
    simulation: Simulation
    trainer: Any
    starts: dict[tuple[int, int], Tree] = field(default_factory=dict)  # (client, turn) -> where it started
    deltas: dict[tuple[int, int], Tree] = field(default_factory=dict)
    iterates: list[Tree] = field(default_factory=list)  # the server's view at every version

    def run(self) -> World:
        """Run to the end, noting every start, delta and iterate."""
        server, fit = self.simulation.server, self.trainer.fit

        def noting(local: Local, start: Tree, only: Any, prox: float, *more: Any) -> Tree:
            self.starts[local.client, local.turn] = {k: v.clone() for k, v in start.items()}
            delta = fit(local, start, only, prox, *more)
            self.deltas[local.client, local.turn] = {k: v.clone() for k, v in delta.items()}
            return delta

        def stepping() -> Any:
            record = step()
            if record:
                self.iterates.append(server.state["params"])
            return record

        step, self.trainer.fit = server.step, noting
        server.step = stepping  # type: ignore[method-assign]
        self.iterates = [server.state["params"]]
        self.simulation.run()
        return self

    @property
    def final(self) -> Tree:
        return self.simulation.server.method.export(self.simulation.server.state)


DEVICES = [
    Device(step_seconds=1.0 + 0.5 * i, down_mb_s=2e-3, up_mb_s=1e-3 / (1 + i % 3), latency=0.05) for i in range(8)
]  # slow links, so that communication matters even for tiny trees


def assemble(
    view: View, trainer: TorchTrainer, rows: list[int], m: Method, sched: Any, turns: int, up: Any, down: Any,
    loss: float = 0.0, devices: list[Device] | None = None, weighting: str = "rows", preloaded: bool = True,
    ranks: list[int] | None = None, **more: Any,
) -> World:  # fmt: skip
    """A simulation of clients with that many rows each, and with adapters of these ranks, where they have their own."""
    s, n = schedule.build(sched), len(rows)
    m = s.adapt(m)
    clients = [Client(i, r, {"rank": ranks[i]} if ranks else {}) for i, r in enumerate(rows)]
    server = Server(m, s, view.start(), clients, turns, 7, preloaded)
    setting = Setting(m, codec.build(up), s.ahead, turns, 7, weighting, trainer, s.carries)  # type: ignore[arg-type]
    base = devices or DEVICES[:n]
    lossy = [Device(**{**{k: getattr(d, k) for k in Device.__dataclass_fields__}, "loss": loss}) for d in base]
    steps = [trainer.config.steps(r) for r in rows]
    sim = Simulation(server, lossy, steps, codec.build(down), codec.build(up), Inline(setting), **more)
    return World(sim, trainer)


def quadratic(
    clients: int = 3, layers: int = 4, size: int = 3, common: bool = False, turns: int = 8, sched: Any = "sync",
    meth: Any = None, lr: float = 0.1, steps: int = 3, weights: list[int] | None = None, up: Any = "raw",
    down: Any = "raw", loss: float = 0.0, training: dict[str, Any] | None = None, **more: Any,
) -> World:  # fmt: skip
    """A federation of quadratics; `weights` are the clients' rows."""
    model = Quadratics(clients, layers, size, common)
    m = method.build(meth or {"name": "fedbcd", "layers_per_block": 1})
    view = View(model, dict(model.named_parameters()))
    config = Training.model_validate(
        {"optimizer": "sgd", "lr": lr, "local_steps": steps, "clip": None, "batch_size": 1, **(training or {})}
    )
    rows = weights or [1] * clients
    data = [[i] * n for i, n in enumerate(rows)]
    trainer = TorchTrainer(
        view, data, lambda b: {"labels": torch.tensor(b)}, config, loss=lambda mod, b: (mod(int(b["labels"][0])), 1)
    )  # fmt: skip
    return assemble(view, trainer, rows, m, sched, turns, up, down, loss, **more)


def tokens(client: int, rows: int, vocab: int = 32, length: int = 12) -> list[torch.Tensor]:
    """Rows of token ids whose mix depends on the client, so that clients differ."""
    g = generator("tokens", client)
    return [(torch.randint(vocab // 2, (length,), generator=g) + client * 3) % vocab for _ in range(rows)]


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def language(
    arch: str = "llama", clients: int = 3, turns: int = 4, sched: Any = "sync", meth: Any = "fedavg", steps: int = 2,
    up: Any = "raw", down: Any = "raw", loss: float = 0.0, training: dict[str, Any] | None = None, width: int = 8,
    layers: int = 4, **more: Any,
) -> World:  # fmt: skip
    """A tiny random language model, three rows a client, AdamW."""
    torch.set_num_threads(1)
    m = method.build(meth)
    view = fresh(arch, layers, width, m)
    config = Training.model_validate({"lr": 1e-2, "local_steps": steps, "batch_size": 2, **(training or {})})
    rows = [3 + i for i in range(clients)]
    data = [tokens(i, n) for i, n in enumerate(rows)]
    trainer = TorchTrainer(view, data, collate, config)
    return assemble(view, trainer, rows, m, sched, turns, up, down, loss, weighting="examples", **more)


MADE: dict[str, View] = {}


def fresh(arch: str, layers: int, width: int, m: Method) -> View:
    """A tiny model as the method sees it. Copied: making one anew, with its adapters, takes five times as long."""
    from hocket.models.tiny import tiny

    key = repr((arch, layers, width, m))
    if key not in MADE:
        MADE[key] = make(tiny(arch, vocab=64, layers=layers, width=width)[0], m, "causal", 7)
    return copy.deepcopy(MADE[key])


def job(**values: Any) -> Job:
    """A job with defaults."""
    return Job(**{"id": 0, "client": 0, "version": 0, "turn": 0, **values})


def run_folder(path: Any, sched: str, name: str | None = None) -> Any:
    """A run folder made by a real simulation of a tiny language model: recipe, manifest, ledger."""
    import json

    from hocket.ledger import Ledger

    path.mkdir(parents=True)
    w = language(sched=sched, meth="fedbcd", layers=4, turns=5)
    sim, view = w.simulation, w.trainer.view
    sim.ledger = Ledger(path / "ledger.jsonl")

    def evaluate(params: Tree) -> dict[str, Any]:
        view.place(params)
        rows = [t for c in range(3) for t in tokens(c + 20, 4)]
        total, count = w.trainer._loss(view.model, collate(rows))
        return {"loss": float(total.detach()) / count, "perplexity": 2.0}

    sim.evaluations.measure, sim.evaluations.ledger, sim.evaluations.due = evaluate, sim.ledger, True
    sim.run()
    sim.ledger.close()
    (path / "recipe.toml").write_text(f'name = "{sched}"\n')
    clients = [
        {"id": i, "name": f"site {i}", "rows": 3 + i, "step_seconds": d.step_seconds, "down_mb_s": d.down_mb_s, "up_mb_s": d.up_mb_s}
        for i, d in enumerate(sim.devices)
    ]
    manifest = {"name": name or sched, "method": "fedbcd", "schedule": sched, "codec": "raw", "model": "tiny:llama", "clients": clients}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path
