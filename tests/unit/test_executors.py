"""A process pool gives the bits of the inline executor, for any number of workers."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hocket.client import Setting
from hocket.codecs import codec
from hocket.errors import Interrupted, RunError
from hocket.executors import Pool, Task
from hocket.methods import Job, method
from hocket.tree import Tree, digest

MORE = {
    "sched": {"name": "overlap", "staleness": 1},
    "meth": "fedbcd",
    "up": {"name": "feedback", "codec": "int8"},
    "loss": 0.2,
}


def world() -> Any:
    from worlds import language  # here: what it imports takes a worker seconds

    return language(clients=4, turns=4, **MORE)  # type: ignore[arg-type]


def factory() -> Setting:
    """Module level, so that a worker can import it."""
    setting: Setting = world().simulation.executor.setting
    return setting


@pytest.fixture(scope="module")
def inline() -> str:
    w = world()
    w.simulation.run()
    return digest(w.final)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_inline_bits(workers: int, inline: str) -> None:
    w = world()
    w.simulation.executor = pool = Pool(workers, factory, (), threads=torch.get_num_threads())
    try:
        w.simulation.run()
    finally:
        pool.close()
    assert digest(w.final) == inline


def light(fit: Any) -> Setting:
    trainer: Any = SimpleNamespace(fit=fit)
    return Setting(method.build("fedavg"), codec.build("raw"), 0, 1, 7, "rows", trainer)


def task(number: int = 0) -> Task:
    return Task(Job(number, 0, 0, 0), {"w": torch.zeros(2)}, None, 3)


def broken() -> Setting:
    os._exit(3)


def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    pool = Pool(1, broken, (), threads=1)
    try:
        pool.submit(task())
        with pytest.raises(RunError, match="worker process died"):
            pool.result(0)
    finally:
        pool.close()


def late(*args: Any) -> Any:
    raise TimeoutError("from the job itself")


def impatient() -> Setting:
    return light(late)


def still(local: Any, start: Tree, *_: Any) -> Tree:
    return start


def idle() -> Setting:
    return light(still)


@pytest.mark.timeout(120)
def test_a_job_that_times_out_by_itself_is_not_waited_for_for_ever() -> None:
    pool = Pool(1, impatient, (), threads=1)
    try:
        pool.submit(task())
        with pytest.raises(TimeoutError, match="from the job itself"):
            pool.result(0)
    finally:
        pool.close()


@pytest.mark.parametrize(("asked", "error"), [(False, RunError), (True, Interrupted)])
def test_work_given_to_dead_workers_fails_when_its_result_is_asked_for(asked: bool, error: type[Exception]) -> None:
    """Not when it is given: half an event would be done, and a run that is stopped saves its state."""
    stop = False
    pool = Pool(1, idle, (), 1, lambda: stop)
    try:
        pool.submit(task())
        pool.result(0)
        for pid in list(pool._pool._processes):
            os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 30
        while not pool._pool._broken and time.monotonic() < until:
            time.sleep(0.01)
        pool.submit(task(1))
        stop = asked
        with pytest.raises(error):
            pool.result(1)
    finally:
        pool.close()
