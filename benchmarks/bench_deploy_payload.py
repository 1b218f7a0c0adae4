"""A gigabyte each way through Flower's real processes: seconds, and the most memory that each process ever had.

    python benchmarks/bench_deploy_payload.py [--gigabytes 1.0] [--only NAME]

`hocket`: the server's engine, link, courier and worker move a bf16 model down and an update of its size up, in parts
(`deployment.part_mb`). Training is one addition, and there is no language model beside the payload, so what is left is
what moving costs: the server holds the old model and the new one, the site the model it was sent and its update.
`plain`: a server app and a client app as Flower's examples write them, one message down and one up, with as many bytes
of fp32 in numpy arrays of the same shapes (`Array` refuses bf16, which is tried, too). Both with the SuperLink's two
stores.

A process's peak is VmHWM of /proc/PID/status; of files, what is mapped counts and what is read does not. Peaks of
different processes need not be at the same time; `together` is the most that all had at once, sampled each half second.
Nothing else should use much memory meanwhile: a run is ended when its processes have more than 10 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
PORTS = {"link": 23100, "node": 23101}
LIMIT = 10 << 30
TENSOR = 8 << 20  # numbers in a tensor
APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "payload"
version = "1.0.0"
description = "A benchmark"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "hocket"
[tool.flwr.app.components]
serverapp = "payload_app.server:app"
clientapp = "{client}"
[tool.flwr.app.config]
folder = ""
bytes = 0
part = 0
"""


# --- both ways: what travels ---------------------------------------------------------------------------------------
def tensors(size: int, width: int) -> int:
    """How many tensors of `TENSOR` numbers of `width` bytes make up `size` bytes."""
    return max(1, round(size / (TENSOR * width)))


# --- hocket's way --------------------------------------------------------------------------------------------------
def worker(folder: Path, count: int) -> None:
    """A site's worker whose training adds 0.01, so that an update is as large as the model."""
    import torch

    from hocket import codecs, methods
    from hocket.client import Setting
    from hocket.deploy.site import Site
    from hocket.deploy.worker import Worker
    from hocket.methods import Client, Local

    class Shift:
        """A trainer in the place of one that learns."""

        def fit(self, local: Local, start: dict[str, torch.Tensor], *_: Any) -> dict[str, torch.Tensor]:
            local.metrics |= {"loss": 0.0, "steps": 1.0, "examples": 1.0}
            return {k: torch.full_like(v, 0.01) for k, v in start.items()}

    def opens(recipe: str, client: int, where: Path) -> Site:
        raw = codecs.build("raw")
        trainer: Any = Shift()
        setting = Setting(methods.method.build("fedavg"), raw, 0, 1, 0, "examples", trainer)
        blank = torch.zeros(1, dtype=torch.bfloat16).expand(TENSOR)  # no start model: what is sent is all there is
        start = {f"layer.{i:03d}": blank for i in range(count)}
        return Site(setting, start, raw, Client(client, 1), where, preloaded=False)

    w = Worker(folder, opens)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    w.serve()


def hub() -> Any:
    """The server app: hocket's server, engine and link, one turn with one site."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        import torch

        from hocket import codecs, methods, schedules, store
        from hocket.deploy.engine import Deployment
        from hocket.deploy.flower import FlowerLink
        from hocket.evaluations import Evaluations
        from hocket.ledger import Ledger
        from hocket.methods import Client
        from hocket.server import Server

        folder, size = Path(str(context.run_config["folder"])), int(context.run_config["bytes"])
        params = {f"layer.{i:03d}": torch.rand(TENSOR).bfloat16() for i in range(tensors(size, 2))}
        method, schedule = methods.method.build("fedavg"), schedules.schedule.build("sync")
        server = Server(method, schedule, params, [Client(0, 1)], 1, 0, preloaded=False)
        was = float(params["layer.000"][0])
        del params
        ledger, raw = Ledger(folder / "ledger.jsonl"), codecs.build("raw")
        part = int(context.run_config["part"])
        link = FlowerLink(grid, "payload", "", ["site"], folder / "arriving", part=part, patience=3000.0)
        deployment = Deployment(server, link, raw, raw, folder / "packets", ledger, Evaluations(None, server, ledger))
        deployment.run()
        store.save(folder / "checkpoint", 1, deployment.state_dict(), "payload")
        link.close()
        moved = float(server.state["params"]["layer.000"][0]) - was
        (folder / "done.json").write_text(json.dumps({"right": abs(moved - 0.01) < 0.005}))

    return app


# --- the plain way -------------------------------------------------------------------------------------------------
PLAIN = '''
import time
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["model"].to_numpy_ndarrays()
    return Message(RecordDict({"model": ArrayRecord([a + 0.01 for a in arrays])}), reply_to=message)
'''


def plain() -> Any:
    """A server app as in Flower's examples: one message with the whole model, one reply with another."""
    from flwr.app import ArrayRecord, Context, Message, RecordDict
    from flwr.serverapp import Grid, ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        folder, size = Path(str(context.run_config["folder"])), int(context.run_config["bytes"])
        draw = np.random.default_rng(0)
        model = [draw.random(TENSOR, dtype=np.float32) for _ in range(tensors(size, 4))]
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.5)
        message = Message(RecordDict({"model": ArrayRecord(model)}), dst_node_id=nodes[0], message_type="train")
        (reply,) = grid.send_and_receive([message])
        if reply.has_error():
            raise RuntimeError(reply.error)
        new = reply.content["model"].to_numpy_ndarrays()
        right = bool(abs(float(new[0][0] - model[0][0]) - 0.01) < 0.005)
        (folder / "done.json").write_text(json.dumps({"right": right}))

    return app


def refusal() -> str:
    """What Flower says to a bf16 tensor."""
    import torch
    from flwr.app import ArrayRecord

    try:
        ArrayRecord({"w": torch.ones(2, dtype=torch.bfloat16)})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing: it is taken"


# --- measuring -----------------------------------------------------------------------------------------------------
KINDS = {
    "flwr-serverapp": "server app", "flwr-clientapp": "client app", "flower-superlink": "SuperLink",
    "bench_deploy_payload": "worker", "flower-supernode": "SuperNode", "flower-superexec": "SuperExec",
}  # fmt: skip


class Watch(threading.Thread):
    """Samples the memory of every process that carries a mark in its environment."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.together = mark.encode(), 0
        self.over, self.ended = threading.Event(), threading.Event()
        self.peaks: dict[str, int] = {}
        self.last = 0.0  # when there was a server app, if there ever was

    def run(self) -> None:
        while not self.ended.wait(0.5):
            now = 0
            for kind, high, resident in self.look():
                self.peaks[kind] = max(high, self.peaks.get(kind, 0))
                now += resident
                self.last = time.monotonic() if kind == "server app" else self.last
            self.together = max(self.together, now)
            if now > LIMIT:
                self.over.set()

    def look(self) -> Iterator[tuple[str, int, int]]:
        for pid in self.living():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                status = dict(x.split(":", 1) for x in Path(f"/proc/{pid}/status").read_text().splitlines())
                high, resident = (int(status[k].split()[0]) << 10 for k in ("VmHWM", "VmRSS"))
            except (OSError, KeyError, ValueError):
                continue
            kind = next((v for k, v in KINDS.items() if k in command), None)
            if kind:
                yield kind, high, resident

    def living(self) -> list[int]:
        found = []
        for p in Path("/proc").iterdir():
            try:
                if p.name.isdigit() and self.mark in (p / "environ").read_bytes().split(b"\0"):
                    found.append(int(p.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        self.ended.set()
        self.join()
        for _ in range(20):
            for pid in self.living():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
            if not self.living():
                break


class TooMuch(Exception):
    """A run cannot be brought to its end here."""


def measure(way: str, store: str, size: int, part: int) -> dict[str, Any]:
    """One run: seconds from its submission to the model's being there and changed, and peaks."""
    from hocket.deploy.launch import flower, listening, quiet

    folder = Path(tempfile.mkdtemp(prefix="payload", dir="/tmp"))
    mark = f"HOCKET_PAYLOAD={folder.name}"
    (folder / "site").mkdir()
    env = os.environ | quiet(folder / "flower", OMP_NUM_THREADS="1", HOCKET_SITE=str(folder / "site"))
    env |= dict([mark.split("=")]) | {"FLWR_HOME": str(folder / "flower")}
    (folder / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "hub"\n[superlink.hub]\naddress = "127.0.0.1:{PORTS["link"]}"\ninsecure = true\n'
    )
    app = folder / "app" / "payload_app"
    app.mkdir(parents=True)
    client = "hocket.deploy.client_app:app" if way == "hocket" else "payload_app.client:app"
    (app.parent / "pyproject.toml").write_text(APP.format(client=client))
    (app / "__init__.py").write_text("")
    make = "hub" if way == "hocket" else "plain"
    code = f"import sys\n\nsys.path.insert(0, {str(HERE.parent)!r})\nfrom bench_deploy_payload import {make}\n"
    code += f"\napp = {make}()\n"
    (app / "server.py").write_text(code)
    (app / "client.py").write_text(PLAIN)

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("wb") as out:
            return subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)

    watch, failed = Watch(mark), dict[str, str]()
    watch.start()
    try:
        database = str(folder / "superlink.db") if store == "sqlite" else ":flwr-in-memory:"
        address = ["--insecure", "--host", "127.0.0.1"]
        start("superlink", flower("flower-superlink"), *address, "--port", str(PORTS["link"]), "--database", database)
        listening(PORTS["link"], 120)
        if way == "hocket":
            start("worker", sys.executable, str(HERE), "--worker", str(folder / "site"), str(tensors(size, 2)))
        node = [flower("flower-supernode"), *address, "--superlink", f"127.0.0.1:{PORTS['link']}"]
        start("node", *node, "--port", str(PORTS["node"]), "--node-config", 'site="site"')
        config = f'folder="{folder}" bytes={size} part={part}'
        submit = [flower("flwr"), "run", str(app.parent), "hub", "-c", config, "--format", "json"]
        for _ in range(10):  # a SuperLink listens before it answers
            began = time.monotonic()
            told = subprocess.run(submit, env=env, capture_output=True, text=True)
            if '"run-id"' in told.stdout:
                break
            time.sleep(5)
        else:
            raise RuntimeError(told.stdout + told.stderr)
        done, stored = folder / "done.json", 0
        while not done.exists():
            if watch.over.is_set():
                raise TooMuch("more than 10 GB")
            if watch.last and time.monotonic() - watch.last > 30:
                said = [line for line in (folder / "superlink.log").read_text().splitlines() if "rror" in line]
                raise TooMuch(f"the server app ended: {said[-1][-200:] if said else 'no reason in the log'}")
            if time.monotonic() - began > 1800:
                tails = [f"--- {p}\n{p.read_text()[-1500:]}" for p in folder.glob("*.log")]
                raise RuntimeError("no end\n" + "\n".join(tails))
            stored = max(stored, sum(p.stat().st_size for p in folder.glob("superlink.db*")))
            time.sleep(0.5)
        seconds = time.monotonic() - began
        if not json.loads(done.read_text())["right"]:
            raise RuntimeError("what came back is not what was computed")
    except TooMuch as error:  # peaks are of what it had by then
        seconds, failed = None, {"failed": str(error)}
    finally:
        watch.close()
        if not os.environ.get("HOCKET_KEEP"):
            shutil.rmtree(folder, ignore_errors=True)
    peaks = {k: round(v / 1e6) for k, v in sorted(watch.peaks.items())}
    most = {"together_mb": round(watch.together / 1e6), "database_mb": round(stored / 1e6)}
    return {"seconds": None if seconds is None else round(seconds, 1), "peak_mb": peaks, **most, **failed}


def main() -> None:
    from common import save

    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--part-mb", type=float, default=64.0)
    parser.add_argument("--only")
    parser.add_argument("--worker", nargs=2)
    a = parser.parse_args()
    if a.worker:
        worker(Path(a.worker[0]), int(a.worker[1]))
        return
    size, found = int(a.gigabytes * 1e9), dict[str, dict[str, Any]]()
    kept = HERE.parents[1] / "runs" / "payload" / f"{size}-{a.part_mb:g}"  # what was measured before a stop
    kept.mkdir(parents=True, exist_ok=True)
    part = int(a.part_mb * 1e6)
    plan = [("idle", "hocket", "memory", 1)]
    plan += [(f"{way}-{store}", way, store, size) for way in ("hocket", "plain") for store in ("memory", "sqlite")]
    for name, way, store, much in plan:
        if a.only not in (None, name):
            continue
        if not (kept / name).exists():
            (kept / name).write_text(json.dumps(measure(way, store, much, part)))
        found[name] = json.loads((kept / name).read_text())
        print(name, json.dumps(found[name]), flush=True)
    if a.only:
        return
    idle = found.pop("idle")["peak_mb"]
    exact = {w: tensors(size, b) * TENSOR * b for w, b in (("hocket", 2), ("plain", 4))}
    over = {k: {p: round(mb * 1e6 / size, 2) for p, mb in r["peak_mb"].items()} for k, r in found.items()}
    result = {"bytes": exact, "part_mb": a.part_mb, "flower_on_bf16": refusal(), "idle_peak_mb": idle}
    save("deploy_payload", {**result, "runs": found, "peak_over_payload": over})


if __name__ == "__main__":
    main()
