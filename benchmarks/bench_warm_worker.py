"""From one job to the next at a site: the warm worker against a process that is started for every job, as Flower's.

Both are the worker of `hocket join` with SmolLM2-135M (LoRA, rank 8) and 400 rows, asked over its socket with packets
in files. A job's overhead is the time from asking to having its update, without the seconds in which it was computed
(one step) and encoded. The cold worker is started anew, with the same folder, and loads libraries, model and rows
first. Pairs are interleaved, and the ratio is the median over pairs. Either way Flower starts its own process for a
message, without torch: `courier_seconds` is what that takes to load, `import_seconds` what torch and transformers take.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import MODEL, save

from hocket import store, wire
from hocket.deploy import courier
from hocket.deploy.serving import _held
from hocket.deploy.site import plain
from hocket.experiment import Experiment
from hocket.methods import Update
from hocket.recipe import parse
from hocket.server import Server

PAIRS, ROWS, RUN = 5, 400, "warm"
RECIPE = {
    "name": RUN, "turns": PAIRS + 1, "model": {"source": MODEL}, "method": {"name": "fedit", "rank": 8},
    "data": {"source": "at the sites", "template": "plain", "max_length": 64}, "engine": {"threads": 1},
    "training": {"lr": 1e-3, "batch_size": 2, "local_steps": 1}, "clients": {"count": 1},
    "deployment": {"sites": ["a"]},
}  # fmt: skip


class Site:
    """A worker's process and the folder that it serves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder / "site", folder / "site.toml"
        self.file.write_text('name = "a"\n[data]\nsource = "rows.jsonl"\n')
        text = "the patient was admitted with pain and discharged after some days of rest number"
        (folder / "rows.jsonl").write_text("".join(f'{{"text": "{text} {i}"}}\n' for i in range(ROWS)))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "hocket.deploy.work", str(self.file), str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait()
        self.folder.joinpath(courier.SOCKET).unlink(missing_ok=True)

    def ask(self, op: str, **question: Any) -> dict[str, Any]:
        """The worker's answer, once it is there to give one."""
        while True:
            try:
                found = courier.ask(self.folder, {"op": op, "run": RUN, **question})
            except courier.NoWorker:
                time.sleep(0.02)
                continue
            if "failed" in found:
                raise RuntimeError(found)
            return found

    def do(self, experiment: Experiment, server: Server) -> tuple[float, float]:
        """One turn: (seconds of overhead, seconds computed)."""
        (job,) = server.poll()
        blob = experiment.down.encode(job.payload)
        began = time.perf_counter()
        cold = self.process is None
        if cold:
            self.start()
            self.ask("open", recipe=experiment.recipe.to_toml(), client=0)
        store.put(self.folder / "runs" / RUN / f"down-{job.id}.hkt", blob)
        self.ask("take", asks=[plain(job)], forget=[])
        found = self.ask("answer", job=job.id, timeout=600.0)
        took = time.perf_counter() - began
        told = found["told"]
        payload = experiment.up.decode(wire.Packet(Path(found["packet"])))
        server.computed(job)
        update = Update(job.id, 0, job.version, job.turn, payload, told["weight"], told["metrics"], found["size"])
        assert server.receive(update) is None
        assert server.step() is not None
        self.ask("take", asks=[], forget=[job.id])
        if cold:
            self.stop()
            self.process = None
        return took - told["computed"], told["computed"]


def run(code: str) -> float:
    """Seconds of a Python process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    recipe = parse(RECIPE)
    experiment = Experiment(recipe, prepare=_held)
    kinds = ("warm", "cold", "warm_computed", "cold_computed", "courier", "imports")
    out: dict[str, list[float]] = {k: [] for k in kinds}
    with tempfile.TemporaryDirectory(prefix="warm", dir="/tmp") as top:
        sites, servers = {}, {}
        for way in ("warm", "cold"):
            (Path(top) / way).mkdir()
            sites[way], servers[way] = Site(Path(top) / way), experiment.server()
            servers[way].holds(0, -1)  # each is sent all of it once: a process that was started anew holds nothing
        sites["warm"].start()
        sites["warm"].ask("open", recipe=recipe.to_toml(), client=0)
        for pair in range(PAIRS + 1):
            for way in ("warm", "cold"):
                servers[way].holds(0, -1)
                overhead, computed = sites[way].do(experiment, servers[way])
                if pair:  # the first job of a process allocates what the others use again
                    out[way].append(overhead)
                    out[f"{way}_computed"].append(computed)
            if pair:
                out["courier"].append(run("import hocket.deploy.client_app"))
                out["imports"].append(run("import torch, transformers"))
        sites["warm"].stop()
    median = {k: statistics.median(v) for k, v in out.items()}
    ratios = [c / w for c, w in zip(out["cold"], out["warm"], strict=True)]
    size = len(experiment.down.encode(servers["warm"].state["params"]))
    save(
        "warm_worker",
        {
            "model": MODEL, "rows": ROWS, "pairs": PAIRS, "packet_bytes": size,
            "warm_seconds": round(median["warm"], 3), "cold_seconds": round(median["cold"], 2),
            "ratio": round(statistics.median(ratios), 1), "ratios": [round(r, 1) for r in ratios],
            "computed_seconds": {k: round(median[f"{k}_computed"], 2) for k in ("warm", "cold")},
            "courier_seconds": round(median["courier"], 2), "import_seconds": round(median["imports"], 2),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
