"""A fifth of the clients a turn: what a client that comes back must fetch, and two ways to count it."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import quadratic

from hocket.clock import Device
from hocket.errors import RecipeError
from hocket.schedules import schedule

BLOCK = 8 * 50  # bytes of one block of 50 float64


def run(catch_up: bool = True, **more: Any) -> tuple[Any, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    w = quadratic(
        clients=10, layers=4, size=50, turns=12, meth={"name": "fedbcd", "layers_per_block": 1, "order": "sequential"},
        devices=[Device(step_seconds=0.01, down_mb_s=1e-4, up_mb_s=1e-4, duplex=False)] * 10, steps=1, catch_up=catch_up, **more,
    )  # fmt: skip
    w.simulation.ledger.listener = rows.append
    w.run()
    return w, rows


@pytest.mark.parametrize("sched", [{"name": "sync", "cohort": 0.2}, {"name": "overlap", "staleness": 1, "cohort": 0.2}])
def test_a_client_that_comes_back_fetches_exactly_the_blocks_that_changed(sched: Any) -> None:
    w, rows = run(sched=sched)
    held = dict.fromkeys(range(10), 0)
    caught = 0
    for r in (r for r in rows if r["what"] == "down"):
        missed = {(v - 1) % 4 for v in range(held[r["client"]] + 1, r["version"] + 1)}  # block of the turn that made v
        assert len(missed) * BLOCK <= r["bytes"] < len(missed) * (BLOCK + 150) + 120
        late = len(missed) - (1 if r["version"] > held[r["client"]] else 0)
        assert late * BLOCK <= r.get("catch_up", 0) <= late * (BLOCK + 150)
        caught += r.get("catch_up", 0)
        held[r["client"]] = r["version"]
    assert caught == w.simulation.ledger.bytes["catch_up"] > 0


def test_the_papers_accounting_charges_no_catching_up_but_lists_it() -> None:
    sched = {"name": "sync", "cohort": 0.2}
    (charged, rows), (free, listed) = run(True, sched=sched), run(False, sched=sched)
    assert free.simulation.ledger.bytes["catch_up"] == charged.simulation.ledger.bytes["catch_up"]
    difference = charged.simulation.ledger.bytes["down"] - free.simulation.ledger.bytes["down"]
    assert difference == charged.simulation.ledger.bytes["catch_up"]
    assert free.simulation.clock.now < charged.simulation.clock.now
    assert max(r["bytes"] for r in listed if r["what"] == "down") < BLOCK + 300 < max(r["bytes"] for r in rows if r["what"] == "down")
    for k, v in charged.final.items():
        assert v.equal(free.final[k])  # only the accounting differs


def test_with_everybody_every_turn_there_is_nothing_to_catch_up() -> None:
    for sched in ("sync", {"name": "overlap", "staleness": 3}):
        w, _ = run(sched=sched)
        assert w.simulation.ledger.bytes["catch_up"] == 0


def test_jobs_past_their_deadline_that_were_not_begun_are_dropped() -> None:
    """A client a hundred times slower must not gather a queue of jobs, each with a version's tensors."""
    devices = [Device(step_seconds=1.0), Device(step_seconds=1.0), Device(step_seconds=100.0)]
    w = quadratic(clients=3, sched={"name": "sync", "deadline": 10.0}, devices=devices, turns=60, steps=1)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, len(w.simulation.queues.get(2, [])))

    w.simulation.on_event = look
    rows: list[dict[str, Any]] = []
    w.simulation.ledger.listener = rows.append
    w.run()
    assert most <= 3
    done = [r for r in rows if r["what"] == "compute" and r["client"] == 2 and r["end"] - r["start"] > 99]
    assert len(done) >= 4  # it goes on working, one job after the other
    assert all(a["end"] <= b["start"] for a, b in zip(done, done[1:], strict=False))


def test_clients_still_busy_with_an_old_turn_are_asked_last() -> None:
    devices = [Device(step_seconds=s) for s in (1.0, 1.0, 1.0, 500.0)]
    sched = {"name": "sync", "cohort": 3, "over_selection": 1.3}
    w = quadratic(clients=4, sched=sched, devices=devices, turns=20, steps=1)
    w.run()
    assert w.simulation.server.version == 20
    assert w.simulation.server.visits[3] == 1  # and since it is busy, never again
    assert w.simulation.clock.now < 200


def test_a_turn_is_not_opened_for_fewer_than_the_minimum() -> None:
    devices = [Device(step_seconds=1.0), Device(step_seconds=1.0, online=((50.0, 1000.0),))]
    w = quadratic(clients=2, sched={"name": "sync", "minimum": 2}, devices=devices, turns=3)
    w.run()
    assert all((c, t) in w.starts for c in (0, 1) for t in range(3))
    assert w.simulation.clock.now > 50


@pytest.mark.parametrize("deadline", [10.0, 14.0])
@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_dropping_a_job_moves_only_those_that_waited_for_it(staleness: int, deadline: float) -> None:
    """A job behind a dropped one that waits for its own download keeps its time, and is computed once."""
    fast = Device(step_seconds=6, down_mb_s=1, up_mb_s=1)
    devices = [Device(step_seconds=6, down_mb_s=1e-4, up_mb_s=1), fast, fast]
    sched = {"name": "overlap", "staleness": staleness, "deadline": deadline}
    for size in (100, 200, 400):
        w = quadratic(
            clients=3, layers=4, size=size, turns=12, steps=1, meth={"name": "fedbcd", "layers_per_block": 1}, sched=sched, devices=devices
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        w.simulation.ledger.listener = rows.append
        w.run()
        assert w.simulation.server.version == 12
        computed = [r["job"] for r in rows if r["what"] == "compute"]
        assert len(computed) == len(set(computed))


@pytest.mark.parametrize(("name", "cohort"), [("sync", 1.5), ("sync", 5.0), ("overlap", 2.0), ("cyclic", 1.5)])
def test_a_share_above_one_is_no_share(name: str, cohort: float) -> None:
    with pytest.raises(RecipeError, match="cohort"):
        schedule.build({"name": name, "cohort": cohort})


def test_a_client_that_never_held_anything_pays_for_the_model() -> None:
    w, rows = run(sched={"name": "sync", "cohort": 0.2}, preloaded=False)
    first = {}
    for r in (r for r in rows if r["what"] == "down"):
        first.setdefault(r["client"], r)
    assert all(r["bytes"] >= 4 * BLOCK and "catch_up" not in r for r in first.values())
    assert len(first) > 5
