"""Processes that are killed, disks that are full: one run suffers it all and makes the model of `hocket run`."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Fleet

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    made = Fleet(["a", "b"], turns=6, schedule='name = "sync"\nminimum = 2')
    try:
        yield made
    finally:
        made.close()


def work(fleet: Fleet, site: str) -> list[int]:
    return fleet.pids("-m hocket.deploy.work ", site)


def app(fleet: Fleet) -> list[int]:
    return fleet.pids("bin/flwr-serverapp")


def test_a_run_outlives_each_of_its_processes(fleet: Fleet) -> None:
    serving = fleet.serve()
    fleet.join_all()
    fleet.reach(1)
    old = fleet.kill("-m hocket.deploy.work ", "a")
    fleet.until(lambda: work(fleet, "a") not in ([], [old]), "new worker")
    fleet.reach(2)
    # a courier, and the other site's SuperNode, which the SuperLink misses for a minute
    fleet.kill("guard flwr-clientapp", "a")
    node = fleet.kill("bin/flower-supernode", "b")
    fleet.until(lambda: fleet.pids("bin/flower-supernode", "b") not in ([], [node]), "new SuperNode")
    # meanwhile, the server app: first it is gone, then its disk is full
    fleet.kill("bin/flwr-serverapp")
    fleet.until(lambda: fleet.resubmitted() == 1 and app(fleet), "server app again")
    fleet.reach(3)
    for pid in app(fleet):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    fleet.until(lambda: fleet.resubmitted() == 2 and app(fleet), "server app with room on its disk")
    fleet.reach(4)
    fleet.kill("bin/flower-superlink")
    fleet.end()
    assert serving.wait(60) == 0


def test_the_model_is_that_of_the_simulation(fleet: Fleet) -> None:
    assert fleet.rows("end"), "the run before has not ended"
    assert fleet.model() == fleet.simulated()


def test_nothing_was_lost_or_counted_twice(fleet: Fleet) -> None:
    steps = fleet.rows("step")
    assert [s["version"] for s in steps] == list(range(1, 7))
    assert all(s["updates"] == 2 for s in steps)
    ups = Counter(r["job"] for r in fleet.rows("up"))
    assert set(ups.values()) == {1}
    assert len(ups) == 12
    assert fleet.rows("lost") == []
