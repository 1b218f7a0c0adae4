"""docs/three-hospitals.md is followed as it is written: its commands, taken from the page, in four processes at once."""

from __future__ import annotations

import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "three-hospitals.md").read_text()
MORE = {
    "hocket models": None,  # the tiny model is made, not fetched
    "hocket deploy": "--port {port} --inner {inner}",
    "hocket serve": "--port {port} --inner {inner} --metrics {metrics}",
    "python recipes/three_hospitals.py": "--model tiny:llama --turns 2 --rows 12",
}
"""What the test adds to commands, so that they take seconds and ports of their own."""
pytest.importorskip("flwr")


def blocks() -> list[tuple[str, list[str]]]:
    """(terminal, commands) of the page's blocks, in order."""
    found = [b.strip().splitlines() for b in re.findall(r"```sh\n(.*?)```", PAGE, re.S)]
    return [(head.removeprefix("# ").partition(":")[0], lines) for head, *lines in found]


def free(count: int) -> list[int]:
    """Ports that nobody listens on, below those that systems give to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(23500, 24000), 500):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if len(found) < count and s.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


class Terminals:
    """A folder in which the page's commands are run, with a mark by which to find whatever they started."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hospitals", dir="/tmp"))  # a socket's path is short
        (self.folder / "recipes").symlink_to(ROOT / "recipes")
        self.mark = f"HOCKET_TUTORIAL={secrets.token_hex(8)}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | {
            "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "140", "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "FLWR_DISABLE_UPDATE_CHECK": "1", **dict([self.mark.split("=")]),
        }  # fmt: skip
        self.ports = dict(zip(("port", "inner", "metrics"), free(3), strict=True))
        self.open: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, line: str) -> list[str] | None:
        """The command to run, with what the test adds; None for one that it leaves out."""
        for start, more in MORE.items():
            if line.startswith(start) and "--seen" not in line:
                return None if more is None else shlex.split(f"{line} {more.format(**self.ports)}")
        return shlex.split(line)

    def run(self, line: str) -> str:
        """What a command prints once it has ended well."""
        words = self.command(line)
        if words is None:
            return ""
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, (line, done.stdout + done.stderr)
        return done.stdout

    def start(self, name: str, line: str) -> None:
        """Leave a command running in a terminal."""
        words = self.command(line)
        assert words is not None
        with (self.folder / f"{name}.log").open("wb") as out:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.open[name] = process

    def until(self, what: Callable[[], bool], name: str, patience: float = 240.0) -> None:
        end = time.monotonic() + patience
        while not what():
            if time.monotonic() > end:
                logs = [*self.folder.glob("*.log"), *self.folder.rglob("clinic/*/*/*/*.log"), *self.folder.rglob("hub/*.log"), *self.folder.rglob("log.jsonl")]
                raise AssertionError(f"no {name}, {self.folder}\n" + "\n".join(f"--- {p}\n{p.read_text()[-1500:]}" for p in logs))
            time.sleep(0.2)

    def living(self) -> list[int]:
        """Processes that were started here and are there still."""
        found = []
        for p in Path("/proc").iterdir():
            try:
                if p.name.isdigit() and self.mark.encode() in (p / "environ").read_bytes().split(b"\0"):
                    found.append(int(p.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        for _ in range(50):
            if not (left := self.living()):
                break
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def terminals() -> Iterator[Terminals]:
    made = Terminals()
    yield made
    made.close()


def test_the_page_has_four_terminals() -> None:
    named = [where for where, _ in blocks()]
    assert {"terminal 1", "terminal 2", "terminal 3", "terminal 4", "any other terminal"} == set(named)
    starts = [line.split()[:2] for _, lines in blocks() for line in lines]
    assert starts.count(["hocket", "join"]) == 3
    assert ["hocket", "serve"] in starts
    for page in ("README.md", "docs/deployment.md"):
        assert "three-hospitals.md" in (ROOT / page).read_text()


@pytest.mark.timeout(600)
def test_the_page_does_what_it_says(terminals: Terminals) -> None:
    t, said = terminals, {}
    run = t.folder / "clinic" / "run"
    for where, lines in blocks():
        for line in lines:
            if line.startswith(("hocket serve", "hocket join")):
                t.start(where, line)
                if line.startswith("hocket serve"):  # as long as a reader takes to open three terminals
                    t.until(lambda: "submitted" in (t.folder / "terminal 1.log").read_text(), "run submitted")
                continue
            if line.startswith("hocket watch"):  # a reader comes here when the run has begun
                t.until((run / "ledger.jsonl").exists, "ledger")
            if line.startswith("hocket report"):  # and here when terminal 1 is free again
                t.until(lambda: t.open["terminal 1"].poll() is not None, "end of the run")
                assert t.open["terminal 1"].returncode == 0, (t.folder / "terminal 1.log").read_text()
            if line.startswith("hocket watch"):
                with urllib.request.urlopen(f"http://127.0.0.1:{t.ports['metrics']}/metrics", timeout=30) as answer:
                    scraped = answer.read().decode()
            said[" ".join(line.split()[:2])] = t.run(line)
    assert "three-hospitals: fedit x sync, tiny:llama" in said["hocket watch"]
    assert "3 sites" in said["hocket watch"]
    assert 'hocket_run_up 1.0' in scraped
    assert 'hocket_site_joined{site="turin"}' in scraped
    assert "wall time" in said["hocket report"]
    assert "held-out loss" in said["hocket report"]
    page = (run / "report.html").read_text()
    assert all(f"<td>{site}</td><td>12</td>" in page for site in ("berlin", "oslo", "turin"))
    assert (t.folder / "clinic" / "adapter" / "adapter_model.safetensors").exists()
    told = said["python recipes/three_hospitals.py"]
    for site in ("berlin", "oslo", "turin"):
        assert f"{site}: 0 of 12 notes are there" in told
    assert "the server's own: 24 of 24 notes are there" in told, "what is there is found"
    log = (run / "log.jsonl").read_text()
    assert log.count('"event": "joined"') >= 3
    assert log.count('"event": "answered"') == 6
    worker = (t.folder / "clinic/sites/oslo/oslo-site/worker.log").read_text()
    assert '"event": "job given"' in worker
    for name in ("terminal 2", "terminal 3", "terminal 4"):
        os.kill(t.open[name].pid, signal.SIGINT)
    for name in ("terminal 2", "terminal 3", "terminal 4"):
        assert t.open[name].wait(60) == 0
    t.until(lambda: not t.living(), "process left behind", 30)
