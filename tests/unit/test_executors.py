"""A process pool gives the bits of the inline executor, for any number of workers."""

from __future__ import annotations

import pytest
import torch
from worlds import World, language

from hocket.client import Setting
from hocket.executors import Pool
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
    import os

    os._exit(3)


def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    from hocket.errors import RunError

    w = world()
    w.simulation.executor = pool = Pool(1, broken, (), threads=1)
    try:
        with pytest.raises(RunError, match="worker process died"):
            w.simulation.run()
    finally:
        pool.close()
