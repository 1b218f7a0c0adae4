"""What is left of a model that clients of unequal ranks send back exactly as they got it, round after round.

Nobody trains, so any change is the aggregation's own. Printed: the share of the model's norm that is left after each
round, with all clients and with half of them a round.
"""

from __future__ import annotations

from typing import Any

import torch
from common import save

from hocket.methods import Client, Update, method
from hocket.methods.lora import A, B
from hocket.schedules import schedule
from hocket.server import Server

RANKS, SIDES, ROUNDS = (4, 4, 8, 16), (48, 40), 10
METHODS: dict[str, dict[str, Any]] = {
    "zero-padding": {"name": "hetlora", "norm": "none", "decay": 0.0, "gamma": 1.0},
    "HLoRA": {"name": "hlora"},
    "FlexLoRA": {"name": "flexlora"},
    "raFLoRA": {"name": "raflora"},
    "HLoRA-Delta": {"name": "hlora-delta"},
}


def left(spec: dict[str, Any], cohort: float) -> list[float]:
    """||D_t|| / ||D_0|| after each round."""
    m: Any = method.build({**spec, "rank": max(RANKS)})
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, max(RANKS), dtype=torch.float64, generator=g)).Q for n in SIDES)
    s = torch.linspace(2, 1, max(RANKS), dtype=torch.float64).sqrt()
    params = {"m" + A: (v * s).T.contiguous(), "m" + B: u * s / m.scale("m", max(RANKS))}
    clients = [Client(c, 1, {"rank": r}) for c, r in enumerate(RANKS)]
    server = Server(m, schedule.build({"name": "sync", "cohort": cohort}), params, clients, ROUNDS, 0)
    size = lambda: float((server.state["params"]["m" + B] @ server.state["params"]["m" + A]).norm())
    start, out = size(), []
    while not server.finished:
        for job in server.poll():
            got = m.send(server.state, server.clients[job.client], job.version)
            update = Update(job.id, job.client, job.version, job.turn, {k: torch.zeros_like(x) for k, x in got.items()})
            assert server.receive(update) is None
        assert server.step()
        out.append(round(size() / start, 6))
    return out


def main() -> None:
    found = {
        f"{name}, {cohort:.0%} a round": left(spec, cohort) for name, spec in METHODS.items() for cohort in (1.0, 0.5)
    }
    for name, shares in found.items():
        print(f"{name:30} " + " ".join(f"{x:.3f}" for x in shares))
    save("fixed_point", {"ranks": RANKS, "left": found})


if __name__ == "__main__":
    main()
