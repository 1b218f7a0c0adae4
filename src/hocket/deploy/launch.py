"""Starting Flower's processes and ours, and starting them again when they end.

A site: the worker, and a SuperNode that is refused for a minute after it was killed, so it is tried again every 15 s.
The server: SuperLink on the loopback interface, the gate before it, the run's server app. Each runs in a process group
of its own, which is ended when we end in order (if we are killed, they go on), and has a log file of its own.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hocket.deploy.courier import own
from hocket.deploy.guard import commands
from hocket.deploy.logs import say
from hocket.errors import HocketError, RunError

log = logging.getLogger(__name__)


@dataclass
class Process:
    """One that is kept running.

    Attributes:
        wait: seconds between its end and its next start.
    """

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    wait: float = 1.0
    running: subprocess.Popen[bytes] | None = None
    ended: float = 0.0

    def start(self) -> None:
        """Start it, its output appended to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.running = subprocess.Popen(
                list(self.command), env={**os.environ, **self.env}, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        say(log, "started", process=self.name, pid=self.running.pid, log=str(self.log))

    def look(self) -> None:
        """Start it again if it has ended and waited."""
        if self.running is not None and (code := self.running.poll()) is not None:
            more = {"code": code, "again_in": self.wait, "log": str(self.log)}
            say(log, "ended", logging.WARNING, process=self.name, **more)
            self.running, self.ended = None, time.monotonic()
        if self.running is None and time.monotonic() - self.ended >= self.wait:
            self.start()

    def stop(self, patience: float = 10.0) -> None:
        """End it and all that it started."""
        if self.running is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.running.pid, number)
            except ProcessLookupError:
                break
            with suppress(
                subprocess.TimeoutExpired
            ):  # after its own end, too, its group may hold children that did not hear
                self.running.wait(patience)
        self.running = None


def keep(processes: Sequence[Process], stop: Callable[[], bool], every: float = 0.5) -> None:
    """Keep processes running until `stop`; then end them, the last one first."""
    try:
        for p in processes:
            p.ended = -p.wait
        while not stop():
            for p in processes:
                p.look()
            time.sleep(every)
    finally:
        for p in reversed(processes):
            p.stop()


def flower(name: str) -> str:
    """Path of one of Flower's commands. Raises `HocketError` if the extra is missing."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise HocketError(f"'{name}' is not installed; deployment needs Flower: pip install 'hocket[flower]'")
    return found


def quiet(home: Path, **more: str) -> dict[str, str]:
    """Environment of Flower's processes: no telemetry, no update checks, nothing installed at run time."""
    home.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": path,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "PYTHONUNBUFFERED": "1", **more,
    }  # fmt: skip


def site(file: Path, described: Mapping[str, Any], folder: Path) -> list[Process]:
    """The two processes of a site."""
    here = file.resolve().parent
    own(folder)
    node = [
        flower("flower-supernode"), "--superlink", str(described["superlink"]), "--host", "127.0.0.1",
        "--port", str(described.get("port", free_port())), "--node-config", f'site="{described["name"]}"',
    ]  # fmt: skip
    node += (
        ["--root-certificates", str(here / described["certificate"])] if "certificate" in described else ["--insecure"]
    )
    node += ["--auth-supernode-private-key", str(here / described["key"])] if "key" in described else []
    work = [sys.executable, "-m", "hocket.deploy.work", str(file.resolve()), str(folder)]
    env = quiet(folder / "flower", HOCKET_SITE=str(folder)) | {"PATH": str(commands(folder / "guarded"))}
    return [
        Process("worker", work, folder / "worker.log", wait=1.0),
        Process("supernode", node, folder / "supernode.log", env, wait=15.0),
    ]


def free_port() -> int:
    """A port on the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def listening(port: int, patience: float = 60.0) -> None:
    """Wait until somebody listens. Raises `RunError`."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RunError(f"nobody listens on port {port} after {patience:.0f} s; see the logs")


@dataclass
class Hub:
    """The server's side of a deployment.

    Attributes:
        folder: logs, Flower's home, database.
        certificates: folder with ca.crt, server.pem, server.key; none: plain HTTP, for one machine.
        nodes: folder with the public keys of nodes that may connect; none: anybody may.
        port: of the gate, for sites; `inner`: of the SuperLink, on the loopback interface.
        memory: whether the SuperLink keeps what passes through it in memory, instead of a database in `folder`.
    """

    folder: Path
    port: int
    inner: int
    host: str = "0.0.0.0"
    certificates: Path | None = None
    nodes: Path | None = None
    memory: bool = False

    @property
    def env(self) -> dict[str, str]:
        return quiet(self.folder / "flower")

    def processes(self) -> list[Process]:
        """SuperLink and gate."""
        c = self.certificates
        tls = (
            ["--ssl-ca-certfile", c / "ca.crt", "--ssl-certfile", c / "server.pem", "--ssl-keyfile", c / "server.key"]
            if c
            else ["--insecure"]
        )
        link = [flower("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.inner), *map(str, tls)]
        link += [] if self.memory else ["--database", str(self.folder / "superlink.db")]
        link += ["--enable-supernode-auth"] if self.nodes else []
        gate = [sys.executable, "-m", "hocket.deploy.gated", self.host, str(self.port), str(self.inner), str(c or "")]
        return [
            Process("superlink", link, self.folder / "superlink.log", self.env, wait=2.0),
            Process("gate", gate, self.folder / "gate.log", self.env, wait=1.0),
        ]

    def connect(self) -> None:
        """Write where the SuperLink is for Flower's own command, and register the nodes' keys."""
        text = f'[superlink]\ndefault = "hub"\n\n[superlink.hub]\naddress = "127.0.0.1:{self.inner}"\n'
        text += (
            f'root-certificates = "{self.certificates.resolve() / "ca.crt"}"\n'
            if self.certificates
            else "insecure = true\n"
        )
        (self.folder / "flower").mkdir(parents=True, exist_ok=True)
        (self.folder / "flower" / "config.toml").write_text(text)
        listening(self.inner)
        for public in sorted(self.nodes.glob("*.pub")) if self.nodes else ():
            done = self.flwr("supernode", "register", str(public), "hub", "--format", "json")
            if done.returncode and "already" not in (done.stdout + done.stderr).lower():
                raise RunError(f"key '{public}' cannot be registered: {(done.stdout + done.stderr).strip()[-400:]}")

    def submit(self, app: Path, recipe: Path, run: Path) -> str:
        """Start the run's server app; its id."""
        config = f"recipe={json.dumps(str(recipe.resolve()))} folder={json.dumps(str(run.resolve()))}"
        done = self.flwr("run", str(app), "hub", "-c", config, "--format", "json")
        try:
            return str(json.loads(done.stdout[done.stdout.index("{") :])["run-id"])
        except (ValueError, KeyError) as error:
            raise RunError(f"the run was not accepted: {(done.stdout + done.stderr).strip()[-400:]}") from error

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Flower's command. Raises `RunError` if it does not end."""
        try:
            return subprocess.run(
                [flower("flwr"), *arguments], env={**os.environ, **self.env}, capture_output=True, text=True,
                timeout=300,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RunError(f"`flwr {arguments[0]}` did not end within {error.timeout:.0f} s") from error


def ended(run: Path) -> bool:
    """Whether a run has ended and its last checkpoint is written: the ledger's `end` comes before that."""
    try:
        return bool(json.loads((run / "manifest.json").read_text()).get("finished"))
    except (OSError, ValueError):
        return False


def progress(run: Path) -> int:
    """How far a run has come for good: the number of its newest checkpoint; -1 before the first."""
    return max((int(p.stem) for p in (run / "checkpoint").glob("*.hkt") if p.stem.isdigit()), default=-1)


def busy(run: Path) -> bool:
    """Whether a process is at work on a run."""
    lock = FileLock(str(run / "lock"))
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


FINAL = ("RecipeError", "DataError", "ModelError", "Unusable")
"""Failures of a run that would fail again."""


def failure(run: Path, since: str) -> dict[str, Any] | None:
    """How a run's process failed, if that is its log's last word and newer than `since`, in UTC."""
    path = run / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    try:
        last = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return None
    return last if last.get("event") == "run failed" and str(last["time"]) > since else None


def drive(
    hub: Hub, processes: Sequence[Process], app: Path, recipe: Path, run: Path, stop: Callable[[], bool],
    grace: float = 60.0, again: float = 5.0, every: float = 1.0, tries: int = 20,
) -> None:  # fmt: skip
    """Submit the run, and again whenever nobody is at work on it and it has not ended.

    Args:
        processes: the hub's, its SuperLink first.
        grace: seconds that a server app may take to begin; `again`: between the end of one and the next.
        tries: submissions without a new checkpoint after which this gives up.

    Raises:
        RunError: the run cannot begin, would fail again, or always ends at the same place.
    """
    since, left, seen, first = -grace, tries, -2, True
    link, submitted = processes[0].running, ""
    while not stop() and (not ended(run) or busy(run)):
        for p in processes:
            p.look()
        if hub.memory and processes[0].running not in (None, link):
            new = processes[0].running
            try:
                hub.connect()  # it was killed, and knows of no site's key any more
                link = new
            except RunError as error:
                left -= 1
                say(log, "not connected", logging.WARNING, reason=str(error), tries_left=left)
                if left <= 0:
                    raise
                time.sleep(every)
                continue
        if busy(run):
            since = time.monotonic() - grace + again  # it had begun: if it is gone, it is gone
        elif time.monotonic() - since > grace:
            left = tries if (now := progress(run)) > seen else left - 1
            if submitted and (found := failure(run, submitted)):
                if found["kind"] in FINAL:
                    raise RunError(f"the run cannot go on: {found['reason']}")
                say(log, "run failed", logging.WARNING, reason=found["reason"])
            if left <= 0:
                raise RunError(f"the run does not go on; its last words are in the logs in '{hub.folder}'")
            seen, since = max(seen, now), time.monotonic()
            try:
                listening(hub.inner)
                submitted = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                event = "submitted" if first else "resubmitted"
                say(log, event, flower_run=hub.submit(app, recipe, run))
                first = False
            except RunError as error:
                say(log, "not submitted", logging.WARNING, reason=str(error), tries_left=left)
                since = time.monotonic() - grace + again
        time.sleep(every)
