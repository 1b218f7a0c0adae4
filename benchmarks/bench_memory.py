"""Peak memory of a simulated run of 50 clients against one plain training process of the same method.

Each side runs in its own process; both load the model, train with the same batch and optimizer, and report the peak of
resident memory. The plain side trains the same tensors without any federation.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CLIENTS, LENGTH = 50, 64
METHODS = ("fedbcd", "fedit", "fedavg")


def simulated(name: str) -> None:
    """50 clients, one turn."""
    from common import simulation

    from hocket.sections import Training

    config = Training.model_validate({"batch_size": 2, "local_steps": 1})
    clients = CLIENTS if name != "fedavg" else 12  # full updates go to disk: 12 of them are 6 GB
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as spool:
        sim, _ = simulation(name, clients, 1, config, LENGTH, spool=Path(spool))
        sim.run()


def plain(name: str) -> None:
    """One process that trains the tensors of one job for two steps."""
    import torch
    from common import MODEL, collate, rows

    from hocket import models
    from hocket.methods import Local, method
    from hocket.models import views
    from hocket.models.forward import loss_sum

    loaded = models.load(MODEL)
    m = method.build(name)
    view = views.make(loaded.model, m, "causal", 0)
    local = Local(0, dict(view.params), {}, 0, 1, 0, 0, None)  # type: ignore[arg-type]
    only = m.trains(local)
    params = [p.requires_grad_(True) for k, p in view.params.items() if only(k)]
    optimizer = torch.optim.AdamW(params, 1e-4, fused=True)
    for step in range(2):
        total, count = loss_sum(view.model, collate(rows(step, 2, loaded.model.config.vocab_size, LENGTH)))
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    from common import save

    result: dict = {"clients": CLIENTS, "target": 1.3}
    for name in METHODS:
        peaks = {}
        for side in ("plain", "simulated"):
            out = subprocess.run([sys.executable, __file__, side, name], capture_output=True, text=True, check=True)
            peaks[side] = json.loads(out.stdout.splitlines()[-1])
        ratio = round(peaks["simulated"] / peaks["plain"], 3)
        result[name] = {**{f"{k}_mb": v for k, v in peaks.items()}, "ratio": ratio}
    result["fedavg"]["clients"] = 12
    save("memory", result)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        {"plain": plain, "simulated": simulated}[sys.argv[1]](sys.argv[2])
        print(json.dumps(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)))
    else:
        main()
