"""Overlap against rounds, and FedFa against FedAvg: a real fleet over shaped links, and what `simulate` says of it.

    python benchmarks/deploy/overlap.py [--repeat 3] [--out FOLDER]      (needs root, for network namespaces)

Three sites made by `hocket deploy init`, each joined from a network namespace of its own, whose link to the server is
shaped by `tc` (token bucket, each way); TLS, keys, gate, SuperLink, SuperNodes as in any deployment. Sites wait before
each local step (HOCKET_STEP_SECONDS), so their speeds are unequal and set, and the cores of one machine suffice. Every
repetition first measures, over the bare link, what a message costs that carries next to nothing; then come FedBCD in
rounds and overlapped (ParaBlock), FedAvg and FedFa. The time from the first job asked to the last step counts, without
start-up.

The prediction is a simulation of the same recipe with each site's measured seconds a step, the link's rate, one
direction at a time (Flower answers a message before it takes the next), and half the measured cost for each message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from hocket import run as runs
from hocket.deploy import init as files
from hocket.deploy import launch
from hocket.models.tiny import tiny
from hocket.provenance import git_hash
from hocket.recipe import parse

SITES = ("near", "middle", "far")
STEP = {"near": 1.5, "middle": 2.5, "far": 3.5}  # seconds before each local step
LINK = {"near": 2.0, "middle": 1.0, "far": 0.5}  # megabytes a second, each way
STEPS, PORT, INNER = 4, 22443, 22080
SERVER = "10.222.0.1"
LAYERS, WIDTH = 4, 256
REST = ["*embed*", "*lm_head*", "model.norm.weight", *(f"*layers.{i}.*" for i in range(1, LAYERS))]
"""Frozen where whole models travel: what is left is one layer, as large as a block."""
RUNS: dict[str, dict[str, Any]] = {
    "messages": {"turns": 4, "method": {"name": "fedit", "rank": 1}, "training": {"local_steps": 1}},
    "fedbcd": {"turns": 5, "method": {"name": "fedbcd", "layers_per_block": 1}},
    "parablock": {
        "turns": 5, "method": {"name": "fedbcd", "layers_per_block": 1},
        "schedule": {"name": "overlap", "staleness": 1},
    },
    "fedavg": {"turns": 3, "method": {"name": "fedavg"}, "model": {"freeze": REST}},
    "fedfa": {
        "turns": 9, "method": {"name": "fedavg"}, "model": {"freeze": REST}, "schedule": {"name": "fedfa"},
    },
}  # fmt: skip
"""FedFa makes a version of every update, so nine of them take in as many as three rounds of three."""


# --- links ------------------------------------------------------------------------------------------------------------
def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


@contextlib.contextmanager
def links() -> Iterator[None]:
    """A namespace for each site, with one link to the server's address."""
    drop()
    ip("addr", "add", f"{SERVER}/32", "dev", "lo")
    try:
        for i, site in enumerate(SITES, 1):
            ip("netns", "add", f"hk-{site}")
            ip("link", "add", f"hk{i}", "type", "veth", "peer", "name", f"hk{i}s", "netns", f"hk-{site}")
            ip("addr", "add", f"10.222.{i}.1/24", "dev", f"hk{i}")
            ip("link", "set", f"hk{i}", "up")
            inside = ("-n", f"hk-{site}")
            ip(*inside, "addr", "add", f"10.222.{i}.2/24", "dev", f"hk{i}s")
            ip(*inside, "link", "set", "lo", "up")
            ip(*inside, "link", "set", f"hk{i}s", "up")
            ip(*inside, "route", "add", f"{SERVER}/32", "via", f"10.222.{i}.1")
        yield
    finally:
        drop()


def drop() -> None:
    quiet: dict[str, Any] = {"stderr": subprocess.DEVNULL}
    for i, site in enumerate(SITES, 1):
        subprocess.run(["ip", "link", "del", f"hk{i}"], **quiet)
        subprocess.run(["ip", "netns", "del", f"hk-{site}"], **quiet)
    subprocess.run(["ip", "addr", "del", f"{SERVER}/32", "dev", "lo"], **quiet)


def shape(on: bool) -> None:
    """Limit both directions of every link, or none."""
    for i, site in enumerate(SITES, 1):
        for where in (["tc"], ["ip", "netns", "exec", f"hk-{site}", "tc"]):
            device = f"hk{i}" if where == ["tc"] else f"hk{i}s"
            subprocess.run([*where, "qdisc", "del", "dev", device, "root"], stderr=subprocess.DEVNULL)
            if on:
                rate = ["rate", f"{int(LINK[site] * 8e6)}bit", "burst", "64kb", "latency", "400ms"]
                subprocess.run([*where, "qdisc", "add", "dev", device, "root", "tbf", *rate], check=True)


# --- recipes ----------------------------------------------------------------------------------------------------------
def recipe(name: str, model: Path, **more: Any) -> dict[str, Any]:
    """A recipe as plain data; `more` replaces sections."""
    own = RUNS[name]
    return {
        "name": name, "turns": own["turns"], "model": {"source": str(model)} | own.get("model", {}),
        "data": {"source": "at the sites", "template": "plain", "max_length": 16}, "method": own["method"],
        "schedule": own.get("schedule", {"name": "sync"}),
        "training": {"lr": 1e-3, "batch_size": 1, "local_steps": STEPS} | own.get("training", {}),
        "clients": {"count": len(SITES), "weighting": "rows"}, "engine": {"threads": 1},
        "deployment": {"sites": list(SITES)}, **more,
    }  # fmt: skip


def simulate(name: str, model: Path, rows: Path, step: dict[str, float], message: float, out: Path) -> dict[str, Any]:
    """What the virtual clock says."""
    each = [{"step_seconds": step[s], "down_mb_s": LINK[s], "up_mb_s": LINK[s]} for s in SITES]
    device = {"message_seconds": message, "duplex": False}
    clients = {"count": len(SITES), "weighting": "rows", "device": device, "each": each}
    write(rows.with_name("held.jsonl"), [{"text": "a row that is held out"}])
    held = {"heldout_source": str(rows.with_name("held.jsonl"))}
    data = {"source": str(rows), "template": "plain", "max_length": 16, **held}
    runs.start(parse(recipe(name, model, data=data, clients=clients)), out)
    return timing(out)


# --- reading ------------------------------------------------------------------------------------------------------
def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def timing(run: Path) -> dict[str, Any]:
    """Seconds from the first job asked to the last step, seconds of each step, and bytes both ways."""
    rows = ledger(run)
    first = min((r["t"] for r in rows if r["what"] == "ask"), default=0.0)
    steps = [r["t"] - first for r in rows if r["what"] == "step"]
    moved = sum(r["bytes"] for r in rows if r["what"] in ("down", "up"))
    return {"seconds": steps[-1], "steps": steps, "bytes": moved, "lost": sum(r["what"] == "lost" for r in rows)}


def travels(run: Path, skip: int = 1) -> list[float]:
    """For each job after the first turns, the seconds between its message's leaving and its update's arrival in which
    its site neither computed nor kept it waiting."""
    lanes: dict[int, float] = {}
    for r in ledger(run):
        if r["what"] in ("down", "up") and r["turn"] >= skip:
            lanes[r["job"]] = lanes.get(r["job"], 0.0) + r["end"] - r["start"]
    return sorted(lanes.values())


def paces(folders: Sequence[Path]) -> dict[str, float]:
    """Median seconds of a local step, for each site."""
    found: dict[str, list[float]] = {s: [] for s in SITES}
    for run in folders:
        for r in ledger(run):
            if r["what"] == "compute":
                found[SITES[r["client"]]].append((r["end"] - r["start"]) / r["steps"])
    return {s: statistics.median(v) for s, v in found.items()}


# --- the fleet --------------------------------------------------------------------------------------------------------
class Fleet:
    """Server processes here, one `hocket join` in each namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, folder / "fleet"
        files.init(self.made, list(SITES), SERVER, PORT, INNER)
        words, rows = ("sun", "moon", "star", "sky", "sea", "sand"), []
        for i, site in enumerate(SITES):
            mine = [{"text": " ".join(words[(i + j * k) % 6] for k in range(9))} for j in range(6)]
            write(self.made / "sites" / site / "rows.jsonl", mine)
            rows += mine
        write(folder / "rows.jsonl", rows)
        self.model = folder / "model"
        for part in tiny("llama", layers=LAYERS, width=WIDTH):
            part.save_pretrained(self.model)
        server = self.made / "server"
        self.hub = launch.Hub(folder / "hub", PORT, INNER, "0.0.0.0", server, server / "nodes")
        self.app = files.app(folder / "app")
        self.processes = self.hub.processes()
        self.joined: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Fleet:
        for p in self.processes:
            p.start()
        self.hub.connect()
        launch.listening(PORT)
        for site in SITES:
            file = self.made / "sites" / site / "site.toml"
            with (self.folder / f"{site}.log").open("ab") as out:
                command = ["ip", "netns", "exec", f"hk-{site}", sys.executable, "-m", "hocket", "join", str(file)]
                env = os.environ | {"HOCKET_STEP_SECONDS": str(STEP[site]), "OMP_NUM_THREADS": "1"}
                self.joined.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True))
        return self

    def __exit__(self, *_: object) -> None:
        for p in self.joined:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGTERM)
        for p in self.joined:
            p.wait(60)
        for q in reversed(self.processes):
            q.stop()

    def run(self, name: str, out: Path) -> Path:
        """Have the sites do one recipe to its end."""
        file = self.folder / f"{out.name}.toml"
        file.write_text(tomli_w.dumps(recipe(name, self.model)))
        launch.drive(self.hub, self.processes, self.app, file, out, lambda: False)
        return out


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def compare(fleet: Fleet, k: int) -> dict[str, Any]:
    """One repetition: all runs, and their predictions. FedFa comes last: it ends while sites are at work, and a
    SuperNode that has a message of a run that is over can mistake its reply for the next one's."""
    done = {}
    for name in RUNS:
        shape(on=name != "messages")
        began = time.monotonic()
        done[name] = fleet.run(name, fleet.folder / f"{name}-{k}")
        took, whole = timing(done[name])["seconds"], time.monotonic() - began
        print(f"{k} {name}: {took:.1f} s ({whole:.0f} s with start-up)", flush=True)
    step = paces(list(done.values()))
    trips = travels(done["messages"])
    message = statistics.median(trips) / 2
    out: dict[str, Any] = {"git": git_hash(), "step_seconds": step, "message_seconds": message, "round_trips": trips}
    out["runs"] = {}
    for name in list(RUNS)[1:]:
        real = timing(done[name])
        told = simulate(name, fleet.model, fleet.folder / "rows.jsonl", step, message, fleet.folder / f"sim-{name}-{k}")
        out["runs"][name] = {"real": real, "simulated": told, "real_over_simulated": real["seconds"] / told["seconds"]}
    for pair, (slow, fast) in {"overlap": ("fedbcd", "parablock"), "asynchrony": ("fedavg", "fedfa")}.items():
        ratio = {w: out["runs"][slow][w]["seconds"] / out["runs"][fast][w]["seconds"] for w in ("real", "simulated")}
        out[pair] = ratio | {"apart": ratio["real"] / ratio["simulated"] - 1}
    return out


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions."""
    sides = ("real", "simulated", "apart")
    pairs = {p: {w: statistics.median(f[p][w] for f in found) for w in sides} for p in ("overlap", "asynchrony")}
    each = {n: statistics.median(f["runs"][n]["real_over_simulated"] for f in found) for n in found[0]["runs"]}
    return pairs | {"real_over_simulated": each}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # links and processes are taken down
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--more", action="store_true", help="add to the repetitions that the result has")
    parser.add_argument("--out", type=Path, help="folder for all files of the runs; default: a temporary one")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("network namespaces need root")
    common.RESULTS = Path(__file__).parent / "results"
    kept = common.RESULTS / "overlap.json"
    found = json.loads(kept.read_text())["repetitions"] if chosen.more else []
    with contextlib.ExitStack() as stack:
        out = chosen.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hk")))
        for _ in range(chosen.repeat):
            k = len(found)
            folder = out / str(k)
            folder.mkdir(parents=True)
            with links(), Fleet(folder) as fleet:
                found.append(compare(fleet, k))
            setting = {"link_mb_s": LINK, "step_seconds": STEP, "local_steps": STEPS, "layers": LAYERS, "width": WIDTH}
            common.save("overlap", {"setting": setting, "median": middle(found), "repetitions": found})


if __name__ == "__main__":
    main()
