"""A process pool gives the bits of the inline executor, for any number of workers."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worlds import World, job, language

from hocket.client import Setting
from hocket.errors import Interrupted, RunError
from hocket.executors import Pool, Task
from hocket.tree import digest

MORE = {
    "sched": {"name": "overlap", "staleness": 1},
    "meth": "fedbcd",
    "up": {"name": "feedback", "codec": "int8"},
    "loss": 0.2,
}


def world() -> World:
    return language(clients=4, turns=4, **MORE)  # type: ignore[arg-type]


def factory() -> Setting:
    """Module level, so that a worker can import it."""
    return world().simulation.executor.setting  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def inline() -> str:
    w = world()
    w.simulation.run()
    return digest(w.final)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_inline_bits(workers: int, inline: str) -> None:
    w = world()
    w.simulation.executor = pool = Pool(workers, factory, (), threads=torch.get_num_threads())
    try:
        w.simulation.run()
    finally:
        pool.close()
    assert digest(w.final) == inline


def broken() -> Setting:
    os._exit(3)


def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    w = world()
    w.simulation.executor = pool = Pool(1, broken, (), threads=1)
    try:
        with pytest.raises(RunError, match="worker process died"):
            w.simulation.run()
    finally:
        pool.close()


def late(*args: Any) -> Any:
    raise TimeoutError("from the job itself")


def impatient() -> Setting:
    return replace(factory(), trainer=SimpleNamespace(fit=late))  # type: ignore[arg-type]


def task(number: int = 0) -> Task:
    w = world()
    return Task(job(id=number), w.simulation.server.state["params"], None, 3)


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
    pool = Pool(1, factory, (), 1, lambda: stop)
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
