"""Simulated clients on a Ray cluster: one actor per worker, each with its model kept warm. Same bits as in one process.

Three rules keep thousands of clients cheap:

* A tensor is put into Ray's object store once, however many jobs' views hold it, and stays while a job needs it. Actors
  read it in place (bytes, so that bf16 survives); nothing may write into a view, in one process neither.
* A job is sent when an actor is free for it, the one needed soonest first, and its client's memory is read then. So
  waiting jobs are nothing but entries of a heap here.
* Only the jobs needed soonest, `AHEAD` for each actor, are done ahead; their results stay in the store, which may spill
  them to disk, until they are asked for.

Ray's own transport pickles: a cluster is to be trusted like one machine (docs/deployment.md).
"""

from __future__ import annotations

import heapq
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from hocket.client import Result, Setting
from hocket.errors import HocketError, Interrupted, RunError, need
from hocket.executors import DIED, Task
from hocket.ray_objects import Shared, flat, whole
from hocket.ray_worker import Worker, versions

AHEAD = 4  # jobs for each actor that may be done before their results are needed
PATIENCE = 30.0  # seconds without any actor after which the user is told what the run waits for


def room(nodes: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """Actors that machines as `ray.nodes()` lists them have room for when nothing else runs there."""
    total = 0
    for node in nodes:
        has = node["Resources"] if node["Alive"] else {}
        fit = int(has.get("CPU", 0) // cpus)
        if gpus:
            cards = int(has.get("GPU", 0))  # a share lies on one card
            fit = min(fit, cards * int(1 / gpus + 1e-9) if gpus <= 1 else cards // int(gpus))
        total += fit
    return total


def connect(ray: Any, address: str | None, workers: int, threads: int, gpus: float) -> tuple[str, int]:
    """Join the cluster at `address` or RAY_ADDRESS, or start one for this run on this machine.

    Returns:
        Whether it was "started", "joined", or is the "caller's"; the number of actors, 0 for as many as have room.

    Raises:
        RunError: no cluster answers, or Ray cannot start.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if ray.is_initialized():  # by whoever calls hocket as a library
        return "caller's", workers
    limits: dict[str, Any] = {}
    if address is None:
        cards = torch.cuda.device_count() if gpus else 0
        machine = {"Alive": True, "Resources": {"CPU": os.cpu_count() or 1, "GPU": cards}}
        workers = workers or max(1, room([machine], 1 if gpus else threads, gpus))
        # actors are the work itself: not at the niceness of 15 that Ray would give them
        limits = {"num_cpus": workers, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}
        limits |= {} if gpus else {"num_gpus": 0}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked this run to report to Ray's makers
    elif address.startswith("ray://"):
        raise RunError(
            f"engine.address: '{address}' goes through a proxy that copies every tensor; run hocket on a machine of "
            "the cluster, with engine.address = 'auto'"
        )
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **limits)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        where = f"no Ray cluster can be used at '{address}'" if address else "Ray cannot start on this machine"
        hint = "; does it run, and does it ask for a token (RAY_AUTH_MODE=token)?" if address else ""
        raise RunError(f"engine.address: {where}: {error}{hint}") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray takes SIGTERM; a run stops in its own way
            for n, handler in before.items():
                signal.signal(n, handler if handler is not None else signal.SIG_DFL)
    return "joined" if address else "started", workers


class RayExecutor:
    """Actors that each build the setting once, on whichever machines Ray has.

    Args:
        workers: number of actors; 0: as many as there is room for. Those for which there is no room yet join later.
        factory, args, threads, interrupted: as for `executors.Pool`.
        gpus: GPUs of each actor, a share such as 0.5 allowed; 0: none, even if the machine has some.
        address: of a running cluster; None: RAY_ADDRESS, and without that one started here and stopped by `close`.
        warn: told in one sentence what the run waits for.

    Raises:
        HocketError: Ray is not installed.
        RunError: there is no cluster, or no machine of it has room for an actor; from `result`: a worker died or could
            not be built. Nothing done before is lost.
    """

    def __init__(
        self, workers: int, factory: Callable[..., Setting], args: tuple[Any, ...], threads: int,
        interrupted: Callable[[], bool] = lambda: False, gpus: float = 0.0, address: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._ray = ray = need("ray", "ray")
        self._interrupted, self._warn = interrupted, warn
        self._cluster, workers = connect(ray, address, workers, threads, gpus)
        self._changed = threading.Condition()
        self._shared = Shared(ray.put)
        self._tasks: dict[int, Task] = {}  # not begun
        self._heap: list[tuple[float, int]] = []  # of those, and of some forgotten
        self._begun: dict[int, tuple[float, int]] = {}  # under way, or done and not asked for
        self._done: dict[int, Any] = {}  # where the result is, or why there is none
        self._needed: int | None = None
        self._broken: HocketError | None = None
        self._closed = False
        self.processes: dict[int, tuple[str, int]] = {}  # host and process id of the actors that have been placed
        self._actors: list[Any] = []
        self._threads: list[threading.Thread] = []
        try:
            cpus = 1 if gpus or self._cluster == "started" else threads
            self._employ(workers, gpus, cpus, (factory, args, threads))
        except BaseException:
            self.close()
            raise

    def _employ(self, workers: int, gpus: float, cpus: int, build: tuple[Any, ...]) -> None:
        fit = room(self._ray.nodes(), cpus, gpus)
        share = f"{cpus} CPU{'s' * (cpus > 1)}" + (f" and {gpus:g} GPU{'s' * (gpus > 1)}" if gpus else "")
        if not fit:
            what = "engine.gpus (a share such as 0.5), or add machines with GPUs" if gpus else "engine.threads"
            raise RunError(f"no machine of the Ray cluster has {share} for a worker; lower {what}")
        self._begin, self._share = time.monotonic(), share
        workers = workers or fit
        if fit < workers:
            self._warn(f"the Ray cluster has room for {fit} of {workers} workers; others join when it grows")
        kind = self._ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")(Worker)
        self._actors = [kind.remote(gpus) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(n, a, build), daemon=True) for n, a in enumerate(self._actors)
        ]
        for t in self._threads:
            t.start()

    # --- what a run asks for ------------------------------------------------------------------------------------
    def submit(self, task: Task) -> None:
        self._shared.hold(task.view)
        with self._changed:
            self._tasks[task.job.id] = task
            heapq.heappush(self._heap, (task.due, task.job.id))
            self._changed.notify()

    def result(self, job: int) -> Result:
        with self._changed:
            self._needed = job
            self._changed.notify_all()
            while job not in self._done:
                if self._interrupted():
                    raise Interrupted
                if self._broken:
                    raise self._broken
                if not self.processes and time.monotonic() > self._begin + PATIENCE:
                    self._begin = float("inf")  # once is enough
                    self._warn(f"waiting until a machine of the Ray cluster has {self._share} free")
                self._changed.wait(0.2)
            found = self._done[job]
        if isinstance(found, Exception):
            raise found
        while not self._ray.wait([found], timeout=0.2)[0]:  # on its way from another machine
            if self._interrupted():
                raise Interrupted
        try:
            done, blob, memory = self._ray.get(found)
        except self._ray.exceptions.RayError as error:  # its machine has gone, and the result with it
            raise RunError(DIED) from error
        self._drop(job)
        return replace(done, blob=blob.tobytes(), memory={k: whole(x) for k, x in memory.items()})

    def forget(self, job: int) -> None:
        if (task := self._drop(job)) is not None:
            self._shared.release(task.view)

    def _drop(self, job: int) -> Task | None:
        """Forget the job; one that has not begun is returned."""
        with self._changed:
            self._begun.pop(job, None)
            self._done.pop(job, None)
            self._changed.notify()  # one more may begin
            return self._tasks.pop(job, None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._tasks.clear()
            self._done.clear()
            self._changed.notify_all()
        for actor in self._actors:
            self._ray.kill(actor)
        for t in self._threads:
            t.join(5.0)
        self._shared = Shared(self._ray.put)
        if self._cluster != "caller's":  # one that was joined goes on without us
            self._ray.shutdown()

    # --- one thread for each actor ------------------------------------------------------------------------------
    def _serve(self, number: int, actor: Any, build: tuple[Any, ...]) -> None:
        try:
            self.processes[number] = self._ray.get(actor.placed.remote())
            self._ray.get(actor.build.remote(*build, os.getcwd(), versions()))
            while (task := self._next()) is not None:
                found = self._run(actor, task)
                with self._changed:
                    if task.job.id in self._begun:
                        self._done[task.job.id] = found
                    self._changed.notify_all()
        except Exception as error:
            broken = RunError(self._why(error, "process {1} on '{0}'".format(*self.processes.get(number, ("?", "?")))))
            broken.__cause__ = error
            with self._changed:
                self._broken = self._broken or broken
                self._changed.notify_all()

    def _why(self, error: Exception, where: str) -> str:
        errors = self._ray.exceptions
        if isinstance(error, errors.RayTaskError):
            return f"a worker ({where}) cannot begin: {error.cause}"
        full = isinstance(error, errors.ObjectStoreFullError | errors.OutOfDiskError)
        if isinstance(error, errors.RayError) and not full:
            return f"{DIED} ({where})"
        return f"Ray cannot go on: {error}; mend that, then resume"

    def _next(self) -> Task | None:
        """Wait for the open job needed soonest that may begin; None at the end."""
        with self._changed:
            while not self._closed and not self._broken:
                if (job := self._first()) is not None:
                    task = self._tasks.pop(job)
                    self._begun[job] = task.due, job
                    return task
                self._changed.wait()
            return None

    def _first(self) -> int | None:
        if self._needed in self._tasks:
            return self._needed
        while self._heap and self._heap[0][1] not in self._tasks:
            heapq.heappop(self._heap)
        # counted are only jobs needed before it: others must not keep it waiting
        sooner = sum(b < self._heap[0] for b in self._begun.values()) if self._heap else 0
        return self._heap[0][1] if self._heap and sooner < AHEAD * len(self._actors) else None

    def _run(self, actor: Any, task: Task) -> Any:
        """Where the job's result is, or why there is none."""
        errors = self._ray.exceptions
        try:
            where, bundles = self._shared.place(task.view)
            memory = None if task.memory is None else {k: flat(task.memory[k]) for k in task.memory}
            bare = replace(task, view={}, memory=None)
            note, found = actor.perform.options(num_returns=2).remote(bare, where, memory, *bundles)
            try:
                error = self._ray.get(note)
            except Exception:
                with suppress(Exception):  # or Ray prints that nobody looked at it
                    self._ray.get(found)
                raise
            return error or found
        except errors.RayTaskError as error:  # one that cannot be sent
            return RunError(str(error))
        except errors.RayError:
            raise
        except Exception as error:  # of reading the client's memory
            return error
        finally:
            self._shared.release(task.view)
