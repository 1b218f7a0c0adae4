"""Where simulated clients really compute: in this process, or in several. Results do not depend on the choice.

A job is a pure function of its task, so it may run any time between being asked and being needed. The inline executor
waits until it is needed (one model alive for thousands of clients); the pool starts as soon as the task is known.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.multiprocessing  # teaches the pool's queues to hand tensors over in shared memory

from hocket import wire
from hocket.client import Result, Setting, work
from hocket.errors import Interrupted, RunError
from hocket.methods import Job
from hocket.tree import Tree

DIED = "a worker process died; use fewer workers or a smaller batch, then resume"


@dataclass(frozen=True)
class Task:
    """All that a job's result depends on."""

    job: Job
    view: Tree
    memory: wire.Packet | None  # read when the job runs, so that waiting jobs hold none of it
    rows: int
    traits: Mapping[str, Any] = field(default_factory=dict)
    due: float = 0.0  # when it is needed: what an executor may do first; no result depends on it


def perform(setting: Setting, task: Task) -> Result:
    """Do the task's job."""
    return work(setting, task.job, task.view, dict(task.memory or {}), task.rows, task.traits)


class Executor(Protocol):
    """Takes tasks early, gives results late."""

    def submit(self, task: Task) -> None:
        """The task is known; it may start now."""

    def result(self, job: int) -> Result:
        """Wait for the job and forget it."""

    def forget(self, job: int) -> None:
        """The job's result is not needed."""

    def close(self) -> None:
        """Stop all work."""


class Inline:
    """Everything in this process, each job when its result is needed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._tasks: dict[int, Task] = {}

    def submit(self, task: Task) -> None:
        self._tasks[task.job.id] = task

    def result(self, job: int) -> Result:
        done = perform(self.setting, self._tasks[job])  # an interruption leaves the task in place
        del self._tasks[job]
        return done

    def forget(self, job: int) -> None:
        self._tasks.pop(job, None)

    def close(self) -> None:
        self._tasks.clear()


_setting: Setting | None = None  # of a worker process; set once by its initializer


def _enter(factory: Callable[..., Setting], args: tuple[Any, ...], threads: int) -> None:
    global _setting
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    torch.set_num_threads(threads)
    torch.multiprocessing.set_sharing_strategy("file_system")
    _setting = factory(*args)


def _perform(task: Task) -> Result:
    assert _setting is not None  # the initializer ran
    return perform(_setting, task)


class Pool:
    """Worker processes that each build the setting once, like a client machine that keeps its model warm.

    Args:
        workers: number of processes.
        factory, args: a module-level function that makes the setting in the worker, and its picklable arguments.
        threads: torch threads of each worker; the same number gives the same bits for any number of workers.
        interrupted: asked while waiting for a result; when it says yes, waiting ends with `Interrupted`.

    Raises:
        RunError: a worker died (out of memory, killed); nothing done before is lost.
    """

    def __init__(
        self,
        workers: int,
        factory: Callable[..., Setting],
        args: tuple[Any, ...],
        threads: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        # one file per tensor in shared memory rather than one descriptor: trees hold more tensors than a process may
        torch.multiprocessing.set_sharing_strategy("file_system")
        context = torch.multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _enter, (factory, args, threads))
        self._futures: dict[int, Future[Result]] = {}
        self._interrupted = interrupted

    def submit(self, task: Task) -> None:
        try:
            future = self._pool.submit(_perform, task)
        except BrokenProcessPool as error:  # said when the result is asked for: an event that asks is half done here
            future = Future()
            future.set_exception(error)
        self._futures[task.job.id] = future

    def result(self, job: int) -> Result:
        while not wait([self._futures[job]], timeout=0.2).done:
            if self._interrupted():
                raise Interrupted
        try:
            done = self._futures[job].result()
        except BrokenProcessPool as error:
            if self._interrupted():  # the signal that stops the run reached the workers too
                raise Interrupted from None
            raise RunError(DIED) from error
        del self._futures[job]
        return done

    def forget(self, job: int) -> None:
        if (future := self._futures.pop(job, None)) is not None:
            future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
