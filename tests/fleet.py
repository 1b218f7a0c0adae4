"""A server and its sites as real processes, made by `hocket deploy init`: TLS, keys, gate, SuperLink, SuperNodes, workers.

Every process carries a mark of its fleet in its environment, so that single ones can be found and killed, and all of
them are gone in the end, whatever happened. Tests wait for what the ledger or a log says, never for a time to pass.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hocket.deploy.launch import flower
from hocket.tree import digest

WORDS = ("sun", "moon", "star", "sky", "sea", "sand")
RECIPE = """name = "fleet"
turns = {turns}
[model]
source = "tiny:llama"
[data]
{data}
template = "plain"
max_length = 32
[method]
name = "fedavg"
[training]
lr = 1e-3
batch_size = 4
local_steps = 2
[schedule]
{schedule}
[clients]
count = {count}
weighting = "rows"
[engine]
threads = 1
[evaluation]
start = false
[deployment]
sites = [{sites}]
patience = 60.0
"""


class Fleet:
    """Processes under a folder of their own with a short path (a socket's may have 100 characters).

    Args:
        sites: their names.
        turns, schedule: of the recipe.
    """

    def __init__(self, sites: Sequence[str], turns: int, schedule: str) -> None:
        self.mark = secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(prefix="hk", dir="/tmp"))
        self.sites, (self.port, self.inner, *self.spare) = list(sites), ports(5)
        self.env = os.environ | {
            "HOCKET_FLEET": self.mark, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "FLWR_HOME": str(self.folder / "nobody"), "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip
        made = self.folder / "f"
        self.hocket("deploy", "init", made, "--sites", ",".join(sites), "--host", "127.0.0.1", "--port", self.port, "--inner", self.inner)
        self.server, self.run = made / "server", made / "server" / "run"
        together, named = [], ", ".join(f'"{s}"' for s in sites)
        for i, name in enumerate(sites):
            rows = [{"text": " ".join(WORDS[(i + j * k) % 6] for k in range(9)), "site": name} for j in range(8 + 4 * i)]
            together += rows
            write(self.at(name) / "rows.jsonl", rows)
        write(self.folder / "all.jsonl", together)
        write(self.folder / "held.jsonl", [{"text": "sun moon star sky"}])
        common = {"turns": turns, "schedule": schedule, "count": len(sites), "sites": named}
        held = f'heldout_source = "{self.folder / "held.jsonl"}"'
        (self.server / "recipe.toml").write_text(RECIPE.format(data=f'source = "at the sites"\n{held}', **common))
        whole = f'source = "{self.folder / "all.jsonl"}"\npartition = "natural"\ncolumn = "site"\n{held}'
        (self.folder / "simulated.toml").write_text(RECIPE.format(data=whole, **common))

    def at(self, site: str) -> Path:
        """A site's folder, as it was handed out."""
        return self.server.parent / "sites" / site

    def own(self, site: str) -> Path:
        """Where its processes keep what is theirs."""
        return self.at(site) / f"{site}-site"

    # --- processes ----------------------------------------------------------------------------------------------
    def hocket(self, *words: object) -> str:
        """What a command prints once it has ended well."""
        done = subprocess.run(
            [sys.executable, "-m", "hocket", *map(str, words)], env=self.env, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, *command: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process that writes to NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as out:
            return subprocess.Popen(
                list(map(str, command)), env=self.env | dict(env or {}), stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.folder,
            )  # fmt: skip

    def serve(self) -> subprocess.Popen[bytes]:
        more = ["--server", self.server, "--out", self.run, "--port", self.port, "--inner", self.inner, "--host", "127.0.0.1"]
        return self.start("serve", sys.executable, "-m", "hocket", "serve", self.server / "recipe.toml", *more)

    def join(self, site: str) -> subprocess.Popen[bytes]:
        return self.start(site, sys.executable, "-m", "hocket", "join", self.at(site) / "site.toml")

    def join_all(self) -> None:
        """Let all sites join as soon as their keys are registered: earlier, a SuperNode would be refused and wait."""
        log = self.run / "hub" / "superlink.log"
        known = lambda: log.exists() and log.read_text(errors="replace").count("Created node_id") >= len(self.sites)
        self.until(known, "registered keys")
        for site in self.sites:
            self.join(site)

    def pids(self, word: str, site: str | None = None) -> list[int]:
        """Living processes of this fleet with a word in their command, those of a site or all."""
        found = []
        for p in Path("/proc").iterdir():
            if not p.name.isdigit():
                continue
            try:
                environ, command = (p / "environ").read_bytes().split(b"\0"), (p / "cmdline").read_bytes()
            except OSError:
                continue
            named = f"HOCKET_SITE={self.own(site)}".encode() in environ or str(self.own(site)).encode() in command if site else True
            if f"HOCKET_FLEET={self.mark}".encode() in environ and word.encode() in command.replace(b"\0", b" ") and named:
                found.append(int(p.name))
        return sorted(found)

    def kill(self, word: str, site: str | None = None) -> int:
        """SIGKILL to one process, as soon as there is one; its id."""
        self.until(lambda: self.pids(word, site), f"a process '{word}'", every=0.02)
        for pid in self.pids(word, site):
            try:
                os.kill(pid, signal.SIGKILL)
                return pid
            except ProcessLookupError:
                continue
        return self.kill(word, site)

    def close(self) -> None:
        """End every process and remove the folder."""
        for _ in range(50):  # what is supervised may be started again in between
            left = self.pids("")
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if not left:
                break
            time.sleep(0.1)
        if not os.environ.get("HOCKET_KEEP_FLEET"):
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- what happens -------------------------------------------------------------------------------------------
    def until(self, what: Callable[[], Any], name: str, patience: float = 280.0, every: float = 0.2) -> Any:
        """Wait for a condition; what it gave."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(every)
        logs = [*self.folder.glob("*.log"), *self.folder.glob("f/*/*/*/*.log"), *self.run.glob("hub/*.log")]
        tails = [f"--- {p}\n{p.read_text(errors='replace')[-1500:]}" for p in logs]
        raise AssertionError(f"no {name} after {patience:.0f} s\n{self.rows()[-8:]}\n" + "\n".join(tails))

    def rows(self, *what: str) -> list[dict[str, Any]]:
        """The ledger's lines so far, those of some kinds or all."""
        path = self.run / "ledger.jsonl"
        text = path.read_text() if path.exists() else ""
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [r for r in found if r["what"] in what or not what]

    def version(self) -> int:
        return max((r["version"] for r in self.rows("step")), default=0)

    def reach(self, version: int) -> bool:
        """Whether an aggregation came, and no job was lost on the way; waits for it."""
        self.until(lambda: self.version() >= version, f"version {version}")
        return not self.rows("lost")

    def need(self, version: int) -> None:
        """Fail at once where the stage before did not get there."""
        assert self.version() >= version, f"the stage before ended at version {self.version()}, not {version}"

    def listening(self, port: int) -> set[str]:
        """Addresses on which somebody listens on a port."""
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                address, state = line.split()[1], line.split()[3]
                host, _, number = address.partition(":")
                if int(number, 16) == port and state == "0A":
                    found.add(".".join(str(b) for b in bytes.fromhex(host)[::-1]) if table == "tcp" else host)
        return found

    def end(self) -> None:
        """Wait for the run's end."""
        self.until(lambda: self.rows("end"), "end")

    def model(self) -> str:
        """Digest of the run's final model."""
        return parameters(self.run)

    def simulated(self) -> str:
        """That of `hocket run` of the same recipe."""
        out = self.folder / "simulated"
        self.hocket("run", self.folder / "simulated.toml", "--out", out)
        (run,) = [p.parent for p in out.rglob("ledger.jsonl")] or [out]
        return parameters(run)

    def resubmitted(self) -> int:
        """How often the run was submitted again."""
        return (self.folder / "serve.log").read_text().count('"resubmitted"')

    def flwr(self, home: Path, *words: object) -> str:
        """What Flower's own command prints, however it ends."""
        done = subprocess.run(
            [flower("flwr"), *map(str, words)], env=self.env | {"FLWR_HOME": str(home)}, capture_output=True, text=True, timeout=120
        )
        return re.sub(r"\s+", " ", done.stdout + done.stderr)


def parameters(run: Path) -> str:
    """Digest of the model in a run's newest checkpoint."""
    from hocket import recipe, store

    saved, _ = store.load(run / "checkpoint", recipe.load(run / "recipe.toml").hash)
    params: dict[str, torch.Tensor] = saved["engine"]["server"]["state"]["params"]
    return digest(params)


def ports(count: int) -> list[int]:
    """Free ports below those that systems give to outgoing connections, so that a restarted server finds its own."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(21000, 22000), 400):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free port from 21000 on")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
