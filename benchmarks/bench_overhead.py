"""Wall time of a simulated run of 8 clients against a plain PyTorch loop: same model, same batches, same steps.

The plain loop does what anybody would write: forward, backward, clip, fused AdamW, a new optimizer for each client and
round (as the method prescribes), and a weighted mean of parameters in place of a server. Pairs are interleaved; the
ratio is the median over pairs.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import save, simulation

from hocket.methods import Local
from hocket.models.forward import loss_sum
from hocket.sections import Training
from hocket.training import TorchTrainer

CLIENTS, TURNS, LENGTH, PAIRS = 8, 1, 64, 11
CONFIG = Training.model_validate({"batch_size": 2, "local_steps": 1, "lr": 1e-4})


def plain(trainer: TorchTrainer, batches: dict[int, list], names: list[str]) -> float:
    """Seconds of the same steps without hocket: parameters copied in and out by hand."""
    model, params = trainer.view.model, [trainer.view.params[k] for k in names]
    began = time.perf_counter()
    for p in params:
        p.requires_grad_(True)
    model.train()
    for _ in range(TURNS):
        start = [p.detach().clone() for p in params]
        total = [torch.zeros_like(p) for p in start]
        for client in range(CLIENTS):
            for p, s in zip(params, start, strict=True):
                p.data.copy_(s)
            optimizer = torch.optim.AdamW(params, CONFIG.lr, weight_decay=0.0, fused=True)
            for batch in batches[client]:
                loss, count = loss_sum(model, batch)
                (loss / count).backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for t, p in zip(total, params, strict=True):
                t.add_(p.data, alpha=1 / CLIENTS)
        for p, t in zip(params, total, strict=True):
            p.data.copy_(t)
    for p in params:
        p.requires_grad_(False)
    return time.perf_counter() - began


def main() -> None:
    result = {"clients": CLIENTS, "turns": TURNS, "rows": CONFIG.batch_size, "tokens": LENGTH, "target": 1.05}
    for name in ("fedit", "fedbcd"):
        ratios, walls = [], []
        for pair in range(PAIRS + 1):
            sim, trainer = simulation(name, CLIENTS, TURNS, CONFIG, LENGTH)
            start = dict(sim.server.state["params"])
            local = [Local(c, start, {}, 0, TURNS, 0, 0, trainer) for c in range(CLIENTS)]
            only = sim.server.method.trains(local[0])
            names = [k for k in sorted(start) if only(k)]
            batches = {c: [micro[0] for micro in trainer._batches(local[c])] for c in range(CLIENTS)}
            began = time.perf_counter()
            sim.run()
            ours = time.perf_counter() - began
            trainer.view.place({k: v.clone() for k, v in start.items()})
            theirs = plain(trainer, batches, names)
            if pair:  # the first pair warms up
                ratios.append(ours / theirs)
                walls.append(theirs)
        result[name] = {
            "ratio": round(statistics.median(ratios), 4),
            "ratios": [round(r, 4) for r in ratios],
            "plain_seconds": round(statistics.median(walls), 3),
        }
    save("overhead", result)


if __name__ == "__main__":
    main()
