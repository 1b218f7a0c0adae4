"""The server as a state machine: asking, refusing, deadlines, diffs; and the virtual clock around it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from worlds import DEVICES, quadratic

from hocket import store
from hocket.clock import Clock, Device
from hocket.combine import mean
from hocket.errors import RunError
from hocket.methods import Client, Method, Update, method
from hocket.schedules import schedule
from hocket.server import Server
from hocket.tree import digest


def server(clients: int = 4, turns: int = 5, sched: Any = "sync", meth: Any = "fedavg", **more: Any) -> Server:
    params = {f"layers.{i}.w": torch.full((2,), 10.0 * i) for i in range(3)}
    return Server(
        method.build(meth), schedule.build(sched), params, [Client(i) for i in range(clients)], turns, 0, **more
    )


def answer(s: Server, asked: Any, value: float = 1.0, names: Any = None, **changes: Any) -> str | None:
    payload = {k: torch.full_like(v, value) for k, v in s.state["params"].items() if names is None or k in names}
    s.computed(asked)
    u = Update(asked.id, asked.client, asked.version, asked.turn, payload, 1.0, {"loss": value})
    return s.receive(replace(u, **changes))


def test_a_round_of_the_cohort_and_the_weighted_mean() -> None:
    s = server()
    jobs = s.poll()
    assert [j.client for j in sorted(jobs, key=lambda j: j.client)] == [0, 1, 2, 3]
    assert s.poll() == []
    for n, j in enumerate(jobs):
        assert s.step() is None
        assert answer(s, j, float(n), weight=float(n + 1)) is None
    record = s.step()
    assert record is not None
    assert record["version"] == 1
    assert record["updates"] == 4
    assert float(s.state["params"]["layers.1.w"][0]) == 10 + (0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10
    assert record["loss"] == pytest.approx(2.0)


def test_a_fresh_update_has_weight_one_and_a_delta_is_added() -> None:
    """Two peers turn 10 + (a delta of 1) into 1; here it is 11."""
    s = server(clients=1)
    assert answer(s, s.poll()[0]) is None
    s.step()
    assert float(s.state["params"]["layers.1.w"][0]) == 11.0


def test_downloads_are_diffs() -> None:
    s = server(clients=2, turns=9, meth={"name": "fedbcd", "layers_per_block": 1})
    for turn in range(3):
        for j in s.poll():
            assert j.since == j.version - (turn > 0) or turn == 0
            assert set(j.payload) == ({f"layers.{turn - 1}.w"} if turn else set())
            answer(s, j, names={f"layers.{turn}.w"})
        s.step()


def test_without_preloading_the_first_download_is_everything() -> None:
    s = server(clients=1, preloaded=False)
    (job,) = s.poll()
    assert set(job.payload) == set(s.state["params"])
    answer(s, job, names={"layers.0.w"})
    s.step()
    assert set(s.poll()[0].payload) == {"layers.0.w"}


def test_a_client_that_may_not_have_got_a_download_is_sent_it_again() -> None:
    s = server(clients=2, sched={"name": "sync", "minimum": 1})
    a, b = sorted(s.poll(), key=lambda j: j.client)
    answer(s, a, names={"layers.0.w"})
    answer(s, b, names={"layers.0.w"})
    s.step()
    a, b = sorted(s.poll(), key=lambda j: j.client)
    s.lost(b)
    answer(s, a, names={"layers.1.w"})
    s.step()
    a, b = sorted(s.poll(), key=lambda j: j.client)
    assert set(a.payload) == {"layers.1.w"}
    assert set(b.payload) == {"layers.0.w", "layers.1.w"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": 3}, "another client"),
        ({"turn": 4}, "another client, version or turn"),
        ({"weight": float("nan")}, "weight nan"),
        ({"weight": -1.0}, "weight -1"),
        ({"payload": {"layers.0.w": torch.tensor([1.0, float("inf")])}}, "not finite"),
        ({"payload": {"layers.0.w": torch.ones(3)}}, "shape"),
        ({"payload": {"other": torch.ones(2)}}, "unknown tensor 'other'"),
        ({"job": 99}, "late"),
    ],
)
def test_a_client_that_lies_is_refused_and_the_others_count(changes: dict[str, Any], reason: str) -> None:
    s = server(clients=2, sched={"name": "sync", "minimum": 1})
    liar, honest = sorted(s.poll(), key=lambda j: j.client)
    before = digest(s.state["params"])
    refused = answer(s, liar, **changes)
    assert refused is not None
    assert reason in refused
    assert digest(s.state["params"]) == before
    if set(changes) & {"job", "client", "turn"}:
        s.lost(liar)  # its own update may still come, until the engine gives it up
    assert answer(s, honest) is None
    record = s.step()
    assert record is not None
    assert record["updates"] == 1


def test_an_update_twice_counts_once() -> None:
    s = server(clients=2)
    a, b = s.poll()
    assert answer(s, a) is None
    assert "late" in str(answer(s, a))
    answer(s, b)
    record = s.step()
    assert record is not None
    assert record["updates"] == 2


def test_over_selection_steps_at_the_cohort_and_drops_the_rest() -> None:
    s = server(clients=6, sched={"name": "sync", "cohort": 2, "over_selection": 2.0})
    jobs = s.poll()
    assert len(jobs) == 4
    answer(s, jobs[3])
    assert s.step() is None
    answer(s, jobs[0])
    record = s.step()
    assert record is not None
    assert record["jobs"] == sorted([jobs[0].id, jobs[3].id])
    assert "turn 0 is over" in str(answer(s, jobs[1]))


def test_minimum_asks_others_for_those_lost() -> None:
    s = server(clients=5, sched={"name": "sync", "cohort": 2, "minimum": 2})
    first = s.poll()
    assert len(first) == 2
    s.lost(first[0])
    (other,) = s.poll()
    assert other.client not in {j.client for j in first}
    answer(s, first[1])
    answer(s, other)
    assert s.step() is not None


def test_cohorts_are_keyed_by_seed_and_turn_and_cover_everybody_in_time() -> None:
    s = server(clients=10, turns=60, sched={"name": "sync", "cohort": 0.2})
    seen: list[int] = []
    while not s.finished:
        jobs = s.poll()
        assert len(jobs) == 2
        seen += [j.client for j in jobs]
        for j in jobs:
            answer(s, j)
        s.step()
    counts = [seen.count(c) for c in range(10)]
    assert min(counts) >= 4
    assert max(counts) <= 24


def test_server_state_goes_through_a_file() -> None:
    s = server(sched={"name": "overlap", "staleness": 1}, meth="fedavg")
    jobs = s.poll()
    answer(s, jobs[0])
    saved = store.unflatten(*(lambda t, k: (t, json.loads(json.dumps(k))))(*store.flatten(s.state_dict())))
    again = server(sched={"name": "overlap", "staleness": 1}, meth="fedavg")
    payload = s.buffer[0].payload
    again.load_state_dict(saved, lambda job: payload)
    for x in (s, again):
        for j in sorted(jobs[1:], key=lambda j: j.id):
            answer(x, j)
        assert x.step() is not None
    assert digest(s.state["params"]) == digest(again.state["params"])
    assert json.dumps(store.flatten(s.state_dict())[1]) == json.dumps(store.flatten(again.state_dict())[1])


# --- server optimizers and the mean, by hand ---------------------------------------------------------------------------
def test_mean_is_over_those_who_sent_the_tensor() -> None:
    trees = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([4.0]), "b": torch.tensor([8.0])}]
    out = dict(mean(trees, [1.0, 3.0]))
    assert float(out["a"]) == 3.25
    assert float(out["b"]) == 8.0
    with pytest.raises(ValueError, match="sum to"):
        dict(mean(trees, [0.0, 0.0]))


def test_mean_of_duplicates_is_a_double_weight() -> None:
    a, b = {"w": torch.randn(5, dtype=torch.float64)}, {"w": torch.randn(5, dtype=torch.float64)}
    assert torch.allclose(dict(mean([a, a, b], [1, 1, 1]))["w"], dict(mean([a, b], [2, 1]))["w"], atol=1e-15)


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "adam", "yogi"])
def test_server_optimizers_follow_reddi_et_al(optimizer: str) -> None:
    eta, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3
    m: Method = method.build({"name": "fedavg", "server_optimizer": optimizer, "server_lr": eta})
    deltas = [0.5, -0.25, 1.0]
    state = m.init({"w": torch.tensor([2.0], dtype=torch.float64)}, 0)
    x, mom, v = 2.0, 0.0, tau**2
    for d in deltas:
        state = m.step(state, [Update(0, 0, 0, 0, {"w": torch.tensor([d], dtype=torch.float64)})], [1.0])
        if optimizer == "momentum":
            mom = b1 * mom + d
            x += eta * mom
            continue
        mom = d if optimizer == "adagrad" else b1 * mom + (1 - b1) * d
        if optimizer == "adagrad":
            v += d * d
        elif optimizer == "adam":
            v = b2 * v + (1 - b2) * d * d
        else:
            sign = (v > d * d) - (v < d * d)
            v -= (1 - b2) * d * d * sign
        x += eta * mom / (v**0.5 + tau)
        assert float(state["params"]["w"]) == pytest.approx(x, abs=1e-12)
    assert float(state["params"]["w"]) == pytest.approx(x, abs=1e-12)


def test_proximal_term_pulls_towards_the_start() -> None:
    far = quadratic(meth="fedavg", turns=1, steps=20).run()
    near = quadratic(meth={"name": "fedavg", "mu": 5.0}, turns=1, steps=20).run()
    norm = lambda w: sum(float(d.norm()) for t in w.deltas.values() for d in t.values())
    assert norm(near) < 0.5 * norm(far)
    # one gradient step by hand: the gradient of mu/2 |w - w0|^2 is zero at the start and mu (w1 - w0) after one step
    one = quadratic(meth="fedavg", turns=1, steps=1, clients=1).run().deltas[0, 0]
    two = quadratic(meth={"name": "fedavg", "mu": 5.0}, turns=1, steps=2, clients=1).run().deltas[0, 0]
    plain = quadratic(meth="fedavg", turns=1, steps=2, clients=1).run().deltas[0, 0]
    for k in one:
        assert torch.allclose(plain[k] - two[k], 0.1 * 5.0 * one[k], atol=1e-12)


# --- the virtual clock ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("step_seconds", [0.1, 1.0, 3.0, 30.0])
def test_rounds_take_the_time_of_the_formulas(step_seconds: float, duplex: bool) -> None:
    turns = 30
    device = Device(step_seconds=step_seconds, down_mb_s=1e-4, up_mb_s=2e-4, duplex=duplex)
    for s in (0, 1, 2):
        sched = {"name": "overlap", "staleness": s}
        w = quadratic(clients=1, layers=1, size=40, turns=turns, meth="fedavg", sched=sched, devices=[device])
        rows: list[dict[str, Any]] = []
        w.simulation.ledger.listener = rows.append
        w.simulation.run()
        c = 3 * step_seconds
        d, u = (max(r["end"] - r["start"] for r in rows if r["what"] == lane) for lane in ("down", "up"))
        expected = max(c, d, u, (c + d + u) / (s + 1)) if duplex else max(c, d + u, (c + d + u) / (s + 1))
        arrivals = [r["t"] for r in rows if r["what"] == "step"]
        assert (arrivals[21] - arrivals[9]) / 12 == pytest.approx(expected, rel=0.02)


def test_a_deadline_leaves_stragglers_behind_and_counts_them() -> None:
    fast, slow = Device(step_seconds=0.1), Device(step_seconds=100.0)
    w = quadratic(turns=4, sched={"name": "sync", "deadline": 5.0}, devices=[fast, fast, slow])
    rows: list[dict[str, Any]] = []
    w.simulation.ledger.listener = rows.append
    w.simulation.run()
    assert w.simulation.clock.now == pytest.approx(20.0, abs=1e-3)
    assert [r["reason"] for r in rows if r["what"] == "lost"] == ["deadline"] * 4
    assert {r["updates"] for r in rows if r["what"] == "step"} == {2}


def test_lost_jobs_do_not_bias_the_mean() -> None:
    """With a third of all jobs lost, the average result over seeds is the one without losses."""
    full = quadratic(common=True, meth="fedavg", turns=200, lr=0.05).run().final
    lossy = quadratic(common=True, meth="fedavg", turns=800, lr=0.05, loss=0.33)
    iterates = []
    step = lossy.simulation.server.step

    def noting() -> Any:
        record = step()
        if record:
            iterates.append(lossy.simulation.server.state["params"])
        return record

    lossy.simulation.server.step = noting  # type: ignore[method-assign]
    lossy.simulation.run()
    assert lossy.simulation.ledger.losses > 600
    late = iterates[100:]
    for k in full:
        average = sum(x[k] for x in late) / len(late)
        assert torch.allclose(average, full[k], atol=0.06)


def test_availability_traces_lose_jobs_and_bring_clients_back() -> None:
    comes_and_goes = Device(step_seconds=1.0, online=((0.0, 4.0), (10.0, 14.0)), period=20.0)
    late = Device(step_seconds=1.0, online=((6.0, 1000.0),))
    w = quadratic(turns=12, devices=[Device(step_seconds=1.0), comes_and_goes, late])
    rows: list[dict[str, Any]] = []
    w.simulation.ledger.listener = rows.append
    w.simulation.run()
    assert w.simulation.server.version == 12
    assert any(r["what"] == "leave" and r["client"] == 1 for r in rows)
    assert any(r["what"] == "join" and r["client"] == 2 for r in rows)
    first = next(r for r in rows if r["what"] == "compute" and r["client"] == 2)
    assert first["start"] >= 6.0
    for r in rows:
        if r["what"] == "compute" and r["client"] == 1:
            assert r["start"] % 20 < 4 or 10 <= r["start"] % 20 < 14


def test_everybody_gone_is_an_error_that_says_so() -> None:
    with pytest.raises(RunError, match=r"stuck at second .* turn 0.*15 jobs asked"):
        quadratic(loss=1.0).simulation.run()
    gone = Device(step_seconds=1.0, online=((0.0, 1.0),))
    with pytest.raises(RunError, match="0 of 2 clients online"):
        quadratic(clients=2, devices=[gone, gone]).simulation.run()


def test_lanes_are_serial_and_bytes_are_counted_once() -> None:
    w = quadratic(turns=6, sched={"name": "overlap", "staleness": 2})
    rows: list[dict[str, Any]] = []
    w.simulation.ledger.listener = rows.append
    w.simulation.run()
    for c in range(3):
        for lane in ("down", "compute", "up"):
            used = sorted((r["start"], r["end"]) for r in rows if r["what"] == lane and r["client"] == c)
            assert len(used) == 6
            assert all(a[1] <= b[0] + 1e-9 for a, b in zip(used, used[1:], strict=False))
    for lane in ("down", "up"):
        assert sum(r["bytes"] for r in rows if r["what"] == lane) == w.simulation.ledger.bytes[lane]


def test_ties_go_in_the_order_of_scheduling_and_unpop_undoes_pop() -> None:
    clock = Clock()
    for key in (3, 1, 2):
        clock.schedule(5.0, "x", key)
    assert clock.pop() == ("x", 3)
    clock.unpop("x", 3)
    assert [clock.pop()[1] for _ in range(3)] == [3, 1, 2]


@pytest.mark.parametrize(
    "bad", [{"online": ((3, 2),)}, {"online": ((0, 5), (4, 6))}, {"online": ((0, 5),), "period": 3}, {"period": 3}]
)
def test_impossible_availability_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"online|period"):
        Device(**bad)


def test_devices_of_the_tests_differ() -> None:
    assert len({d.step_seconds for d in DEVICES}) == len(DEVICES)


@pytest.mark.parametrize("seed", range(60))
def test_periodic_clients_come_back_for_ever(seed: int) -> None:
    """Whatever the numbers, joins and leaves alternate and lie where the windows say."""
    g = torch.Generator().manual_seed(seed)
    start, length, rest = (round(float(torch.rand((), generator=g)) * 50 + 0.1, 1) for _ in range(3))
    period = start + length + rest if seed % 2 else round(start + length + rest, 1) + 0.37
    d = Device(online=((start, start + length),), period=period)
    now, expected = 0.0, True
    for i in range(200):
        change = d.next_change(now)
        assert change is not None
        now, joins = change
        assert joins == expected
        assert now == pytest.approx((i // 2) * period + (start if joins else start + length), rel=1e-9)
        expected = not expected


def test_windows_that_touch_are_one() -> None:
    assert Device(online=((0.0, 5.0), (5.0, 9.0))).next_change(0.0) == (9.0, False)
    assert Device(online=((0.0, 5.0), (5.0, 10.0)), period=10.0).next_change(0.0) is None
    assert Device(online=((0.0, 4.0), (6.0, 10.0)), period=10.0).next_change(7.0) == (14.0, False)


def test_an_update_that_names_another_clients_job_leaves_that_job_open() -> None:
    s = server(clients=2)
    a, b = sorted(s.poll(), key=lambda j: j.client)
    assert "another client" in str(answer(s, b, client=a.client))
    assert answer(s, b) is None


def test_long_jobs_outlast_many_joins_and_leaves() -> None:
    busy = [Device(step_seconds=1.0, online=((0.5, 1.0),), period=2.0) for _ in range(3)]
    w = quadratic(clients=4, turns=1, devices=[Device(step_seconds=1500.0), *busy], sched={"name": "sync", "minimum": 1})
    w.simulation.run()
    assert w.simulation.server.version == 1
