"""10,000 virtual clients, 100,000 updates of a tiny method: events a second, and memory against clients."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

UPDATES = 100_000


def resident() -> float:
    """Megabytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def run(clients: int) -> dict[str, Any]:
    """One federation in this process; peak memory is that of the process."""
    import torch

    from hocket.client import Setting
    from hocket.clock import Device
    from hocket.codecs import codec
    from hocket.executors import Inline
    from hocket.methods import Client, method
    from hocket.schedules import schedule
    from hocket.server import Server
    from hocket.simulate import Simulation
    from hocket.tree import generator

    class Tiny:
        """A method's local work, reduced to one draw: what is measured is everything around it."""

        def fit(self, local: Any, start: Any, only: Any, prox: float) -> Any:
            g = generator(local.seed, local.client, local.visit)
            local.metrics.update(loss=1.0, steps=1, skipped=0, examples=1, tokens=1)
            return {k: torch.randn(v.shape, generator=g) * 1e-3 for k, v in start.items()}

        def loss(self, params: Any, batch: Any) -> Any:
            raise TypeError("not used")

    cohort = 100
    turns = UPDATES // cohort
    m, s = method.build("fedavg"), schedule.build({"name": "sync", "cohort": cohort})
    params = {f"layers.{i}.w": torch.zeros(16) for i in range(4)}
    server = Server(m, s, params, [Client(c) for c in range(clients)], turns, 0)
    setting = Setting(m, codec.build("raw"), 0, turns, 0, "examples", Tiny())
    devices = [Device(step_seconds=1 + c % 7) for c in range(clients)]
    before = resident()
    sim = Simulation(server, devices, [1] * clients, codec.build("raw"), codec.build("raw"), Inline(setting))
    began = time.perf_counter()
    sim.run()
    wall = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "clients": clients, "updates": sim.ledger.updates, "events": sim.events,
        "events_per_second": round(sim.events / wall), "updates_per_second": round(sim.ledger.updates / wall),
        "peak_mb": round(peak, 1), "growth_mb": round(resident() - before, 1),
    }  # fmt: skip


def main() -> None:
    from common import save

    found = []
    for clients in (100, 1_000, 10_000):
        out = subprocess.run([sys.executable, __file__, str(clients)], capture_output=True, text=True, check=True)
        found.append(json.loads(out.stdout))
    save("scale", {"runs": found, "peak_ratio_10000_to_100": round(found[-1]["peak_mb"] / found[0]["peak_mb"], 3)})


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1])))) if len(sys.argv) > 1 else main()
