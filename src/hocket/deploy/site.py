"""A site's side of a run: jobs in, updates out, with model, data and memory kept warm in between.

A site does its jobs one after the other in a thread of its own, so the next one is computed while an update travels.
What has to outlive the process is in its folder: the client's memory (error feedback, its own model), written before an
update can be asked for. What it holds of the server's model is not: a site that was restarted says so, and is sent it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hocket import store, wire
from hocket.client import Setting, work
from hocket.codecs import Codec
from hocket.deploy.courier import plain as plain_error
from hocket.errors import HocketError, StoreError, WireError
from hocket.methods import Client, Job
from hocket.tree import Tree

log = logging.getLogger(__name__)


class Lost(HocketError):
    """The site has not got what a job builds on; it must be sent the whole model."""


@dataclass
class _Task:
    job: Job
    view: Tree
    came: float
    ended: float | None = None
    failure: str | None = None


class Site:
    """One client of a run.

    Args:
        setting: what the run's jobs share; its trainer has this site's rows under `client`.
        start: the start model's view, as the server has it at version 0.
        down: codec of downloads.
        client: this site's number in the run.
        rows: how many it trains on.
        folder: where memory and updates lie; survives this object.
        preloaded: whether the start model counts as held.
    """

    def __init__(
        self, setting: Setting, start: Tree, down: Codec, client: Client, folder: Path, preloaded: bool = True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.setting, self.down, self.client, self.folder, self._now = setting, down, client, folder, now
        folder.mkdir(parents=True, exist_ok=True)
        state = setting.method.init(start, setting.seed)
        self._start: Tree = dict(state["params"])
        first = dict(setting.method.send(state, client, 0)) if preloaded else {}
        self._held: Tree = self._start | first if preloaded else {}
        self.version = 0 if preloaded else -1
        self._tasks: dict[int, _Task] = {}
        self._queue: list[int] = []
        self._remembers = self._recall()  # the job that left the memory in force
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def take(self, job: Job, packet: Path | bytes) -> None:
        """Queue a job; one that is known already is left as it is.

        Raises:
            Lost: its payload is a difference to a version that is not held.
            WireError: the packet is damaged.
        """
        with self._change:
            done = self.has(job)
            if done and (not packet or (job.version <= self.version and not job.whole)):
                return
            if job.since is not None and (job.since > self.version or (job.since >= 0 and job.version < self.version)):
                raise Lost(f"job {job.id} builds on version {job.since}, and version {self.version} is what is here")
            view = self._load(job, self.down.decode(wire.Packet(packet)))
            if done:  # asked again by a server that went back to a checkpoint: what it brought is news all the same
                return
            self.forget(job.id)  # another job had this id before the server did
            self._tasks[job.id] = _Task(job, view, self._now())
            self._queue.append(job.id)
            self._change.notify_all()

    def adopt(self, other: Site) -> None:
        """Hold what another site of this client held."""
        with self._change:
            self._held, self.version = other._held, other.version

    def has(self, job: Job) -> bool:
        """Whether this very job is queued or done, whatever its payload was a difference to."""
        if job.id in self._tasks:
            return _key(vars(self._tasks[job.id].job)) == _key(vars(job))
        told = json.loads(self._told(job.id).read_text()) if self._told(job.id).exists() else {}
        return bool(told) and _key(told) == _key(vars(job))

    def _load(self, job: Job, payload: Mapping[str, Any]) -> Tree:
        """What is held once the payload has arrived; news of versions that are here already are left out."""
        method = self.setting.method
        if method.rebuilds:
            return method.load(self._start, dict(payload))
        if job.whole:  # all of it: the server may have gone back to an older version
            self.version = -1
        known = {k for k in payload if (v := k.partition("/")[0]).isdigit() and "/" in k and int(v) <= self.version}
        news = {k: payload[k] for k in payload if k not in known}
        self._held = method.load(self._held, news)
        self.version = max(job.version, self.version)
        return self._held

    def answer(self, job: int, timeout: float | None = None) -> tuple[dict[str, Any], Path] | None:
        """A job's update, waiting for it: what to tell beside it, and the packet's file; None after `timeout` seconds.

        Raises:
            Lost: the job is not known here.
            HocketError: the job failed; it would again.
        """
        with self._change:
            if job not in self._tasks and not self._told(job).exists():
                raise Lost(f"job {job} is not known here")
            if not self._change.wait_for(lambda: self._done(job), timeout):
                return None
            if (task := self._tasks.get(job)) is not None and task.failure:
                raise HocketError(task.failure)
            if not self._told(job).exists():
                raise Lost(f"job {job} was not done when its site was closed")
            told = json.loads(self._told(job).read_text())
            if task is not None and task.ended is not None:
                told["kept"] = self._now() - task.ended
            return told, self._packet(job)

    def forget(self, *jobs: int) -> None:
        """These updates have been taken in, or are not wanted: free what they use. A job under way is finished."""
        with self._change:
            for job in jobs:
                self._queue = [j for j in self._queue if j != job]
                self._tasks.pop(job, None)
                self._told(job).unlink(missing_ok=True)
                self._packet(job).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop after the job under way."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _done(self, job: int) -> bool:
        task = self._tasks.get(job)
        return self._closed or self._told(job).exists() or (task is not None and task.failure is not None)

    def _told(self, job: int) -> Path:
        return self.folder / f"update-{job}.json"

    def _packet(self, job: int) -> Path:
        return self.folder / f"update-{job}.hkt"

    def _loop(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._queue) or self._closed)
                if self._closed:
                    return
                task = self._tasks[self._queue[0]]
            self._do(task)
            with self._change:
                self._queue = [j for j in self._queue if j != task.job.id]
                self._change.notify_all()

    def _do(self, task: _Task) -> None:
        job, began = task.job, self._now()
        try:
            me, into = self.client, self._packet(job.id)
            result = work(self.setting, job, task.view, self.memory(), me.rows, me.traits, into=into)
            ended = self._now()
            told: dict[str, Any] = _key(vars(job))
            told |= {k: getattr(result, k) for k in ("weight", "metrics", "raw", "beside")}
            told |= {"waited": began - task.came, "computed": ended - began, "kept": 0.0, "after": self._remembers}
            store.put(self._memory(job.id), lambda f: wire.write(f, result.memory))
            store.put(self._told(job.id), json.dumps(told).encode())  # with it, all of this counts
            before, self._remembers = self._remembers, job.id
            store.put(self.folder / "memory.json", json.dumps(job.id).encode())
            if before is not None and before != job.id:
                self._memory(before).unlink(missing_ok=True)
            task.ended = ended
        except HocketError as error:
            task.failure = str(error)
        except Exception as error:  # whatever it is, the server must hear of it instead of waiting
            log.exception("job %d failed", job.id)
            task.failure = plain_error(error)
        task.view = {}

    def memory(self) -> Mapping[str, Any]:
        """The client's private tensors.

        Raises:
            StoreError: their file is damaged.
        """
        if self._remembers is None:
            return {}
        path = self._memory(self._remembers)
        try:
            return dict(wire.Packet(path))
        except (OSError, WireError) as error:
            log.error("'%s': %s; delete '%s' to go on without what this client remembers", path, error, self.folder)
            raise StoreError(
                f"what this client remembers cannot be read ({type(error).__name__}); its log says where it is"
            ) from error

    def _memory(self, job: int) -> Path:
        return self.folder / f"memory-{job}.hkt"

    def _recall(self) -> int | None:
        """The last job whose update was whole when an earlier process ended: the one that is noted, or the one after,
        if that process ended before it could note it. Numbers of jobs say nothing: a server that went back to a
        checkpoint gives them anew."""
        noted = self.folder / "memory.json"
        last: int | None = json.loads(noted.read_text()) if noted.exists() else None
        since = noted.stat().st_mtime_ns if noted.exists() else 0
        for file in sorted(self.folder.glob("update-*.json"), key=lambda p: p.stat().st_mtime_ns):
            job, after = int(file.stem.removeprefix("update-")), json.loads(file.read_text()).get("after")
            if job != last and after == last and file.stat().st_mtime_ns >= since and self._memory(job).exists():
                store.put(noted, json.dumps(job).encode())
                return job
        return last


def _key(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a job's result depends on, beside what its client remembers."""
    return {k: job[k] for k in ("client", "version", "turn", "visit")}


def plain(job: Job) -> dict[str, Any]:
    """A job as JSON, without its payload."""
    return {k: v for k, v in vars(job).items() if k != "payload"}


def job_of(saved: Mapping[str, Any]) -> Job:
    """The inverse of `plain`."""
    return replace(Job(**{**saved, "own": ()}), own=tuple(saved["own"]))
