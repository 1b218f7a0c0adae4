"""Servers under whatever may happen, in any order: arrivals, losses, duplicates, late and bad updates, clients that come
and go, restarts. Hypothesis writes the scripts; they are the same in every run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import World, quadratic

from hocket import store
from hocket.client import Setting, work
from hocket.clock import Device
from hocket.codecs import codec
from hocket.errors import RunError
from hocket.methods import Client, Job, Update, method
from hocket.schedules import schedule
from hocket.server import Server
from hocket.tree import Tree, digest, generator

N, TURNS = 4, 6
SCHEDULES: dict[str, Any] = {
    "fedasync": {"name": "fedasync"},
    "fedbuff": {"name": "fedbuff", "buffer": 3},
    "fedbuff, few": {"name": "fedbuff", "buffer": 2, "concurrency": 2, "selection": "fair", "max_staleness": 1},
    "fadas": {"name": "fadas", "buffer": 2},
    "fedfa": {"name": "fedfa", "window": 3},
    "fedfa, wait": {"name": "fedfa", "window": 3, "start": "wait", "total_weight": "1"},
    "fedfa, models": {"name": "fedfa", "window": 3, "form": "model"},
    "fedfa, models, wait": {"name": "fedfa", "window": 2, "form": "model", "start": "wait"},
    "ca2fl": {"name": "ca2fl", "buffer": 3},
    "ca2fl, caches at clients": {"name": "ca2fl", "buffer": 2, "caches": "clients"},
    "ca2fl, news of clients": {"name": "ca2fl", "buffer": 1, "news": "clients"},
    "port": {"name": "port", "buffer": 2, "bound": 1},
    "safa": {"name": "safa", "quota": 0.5, "max_staleness": 1},
}
METHODS: dict[str, Any] = {
    "fedavg": "fedavg",
    "fedbcd": {"name": "fedbcd", "layers_per_block": 1},
    "fedit": {"name": "fedit", "rank": 2},
    "flora": {"name": "flora", "rank": 2},
}
PROFILE: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def start(meth: str) -> Tree:
    draw = lambda *shape: torch.randn(*shape, generator=generator("start", *shape))
    if meth in ("fedavg", "fedbcd"):
        return {f"layers.{i}.w": draw(3, i + 1) for i in range(3)}
    tree = {f"layers.{i}.q.lora_A.weight": draw(2, 3) for i in range(2)}
    tree |= {f"layers.{i}.q.lora_B.weight": torch.zeros(4, 2) for i in range(2)}
    return tree | ({f"layers.{i}.q.base_layer.weight": draw(4, 3) for i in range(2)} if meth == "flora" else {})


class Moves:
    """Instead of training: differences that depend on client and visit only."""

    def fit(self, local: Any, params: Tree, only: Any, prox: float, *more: Any) -> Tree:
        key = lambda k: generator("move", local.client, local.visit, k)
        return {k: 0.1 * torch.randn(v.shape, generator=key(k)) for k, v in params.items() if only(k)}


def make(meth: str, sched: str) -> Server:
    s = schedule.build(SCHEDULES[sched])
    m = s.adapt(method.build(METHODS[meth]))
    return Server(m, s, start(meth), [Client(i, i + 1) for i in range(N)], TURNS, 3)


def possible(meth: str, sched: str) -> bool:
    s = schedule.build(SCHEDULES[sched])
    return s.refuses(s.adapt(method.build(METHODS[meth]))) is None


def through_a_file(server: Server) -> tuple[dict[str, torch.Tensor], Any]:
    tensors, skeleton = store.flatten(server.state_dict())
    return {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(skeleton))


def values(server: Server) -> str:
    """Of all tensors that the server has computed."""
    return digest(store.flatten([server.state, server.notes])[0])


class Driver:
    """A server, a twin that was restarted somewhere on the way, their clients, and what must always be so."""

    def __init__(self, meth: str, sched: str) -> None:
        self.meth, self.sched = meth, sched
        self.server = make(meth, sched)
        self.twin: Server | None = None
        s = self.server.schedule
        self.setting = Setting(
            self.server.method, codec.build("raw"), s.ahead, TURNS, 3, "rows", Moves(), s.carries  # type: ignore[arg-type]
        )  # fmt: skip
        self.memory: dict[int, Tree] = {}
        self.views = {0: self.server.state["params"]}
        self.open: list[Job] = []
        self.done: dict[int, Update] = {}  # computed, be it sent or not
        self.accepted: set[int] = set()
        self.stepped: set[int] = set()
        self.over: list[Update] = []  # of settled jobs
        self.settle()

    # --- both servers ---
    def both(self, what: str, *args: Any) -> Any:
        result = getattr(self.server, what)(*args)
        if self.twin is not None:
            other = getattr(self.twin, what)(*args)
            assert other == result
        return result

    def settle(self) -> None:
        """Everything of this instant has been heard."""
        server = self.server
        while True:
            before = {u.job: u for u in server.buffer}
            version = server.version
            record = self.both("step")
            if record is None:
                assert server.version == version
                break
            taken = set(before) - {u.job for u in server.buffer}
            assert record["version"] == server.version == version + 1
            assert record["updates"] == len(taken) > 0
            assert not taken & self.stepped
            assert record["stalest"] >= record["staleness"] >= 0
            assert record["stalest"] == max(version - before[j].version for j in taken)
            self.stepped |= taken
            self.views[server.version] = server.state["params"]
        jobs = self.both("poll")
        for j in jobs:
            assert j.version == server.version
            assert j.client in server.online
        self.open += [replace(j, payload={}) for j in jobs]
        assert [j.id for j in self.open] == list(server.outstanding)
        busy = [j.client for j in self.open]
        assert len(busy) == len(set(busy)) <= (getattr(server.schedule, "concurrency", None) or N)
        assert self.accepted == self.stepped | {u.job for u in server.buffer}
        assert all(u.version <= server.version for u in server.buffer)
        if self.twin is not None:
            mine, other = through_a_file(server), through_a_file(self.twin)
            assert mine[1] == other[1]
            assert digest(mine[0]) == digest(other[0])
        if not server.finished and server.online and server.silence < 20:
            resting = server.schedule.resting(server)
            assert self.open or server.online <= resting, "nobody is asked, nobody is at work"

    # --- what happens ---
    def compute(self, job: Job) -> Update:
        if job.id not in self.done:
            result = work(self.setting, job, self.views[job.version], self.memory.get(job.client, {}), job.client + 1)
            self.memory[job.client] = result.memory
            payload = codec.build("raw").decode(result.blob)
            size = len(result.blob)
            self.done[job.id] = Update(
                job.id, job.client, job.version, job.turn, payload, result.weight, {"loss": 1.0}, size
            )
        return self.done[job.id]

    def deliver(self, i: int) -> None:
        if not self.open:
            return
        job = self.open.pop(i % len(self.open))
        update = self.compute(job)
        self.both("computed", job)
        refused = self.both("receive", update)
        if refused is None:
            self.accepted.add(job.id)
            bound = getattr(self.server.schedule, "max_staleness", None)
            assert bound is None or self.server.version - job.version <= bound
        else:
            assert "versions ago; schedule.max_staleness is" in refused
            self.both("lost", job)
        self.over.append(update)

    def lose(self, i: int) -> None:
        if self.open:
            job = self.open.pop(i % len(self.open))
            if i % 2:  # it had been computed: only the update got lost, and may come yet
                self.over.append(self.compute(job))
                self.both("computed", job)
            self.both("lost", job)

    def again(self, i: int) -> None:
        """An update of a job that is settled: a duplicate, or one that was given up."""
        if self.over:
            self.refused(self.over[i % len(self.over)], "late")

    def bad(self, i: int) -> None:
        if not self.open:
            return
        job = self.open[i % len(self.open)]
        good = Update(job.id, job.client, job.version, job.turn, {}, 1.0)
        name, x = next((k, v) for k, v in sorted(self.views[job.version].items()) if "base_layer" not in k)
        lies = [
            replace(good, client=(job.client + 1) % N), replace(good, version=job.version + 1),
            replace(good, turn=job.turn + 1), replace(good, job=10_000),
            replace(good, payload={name: torch.full_like(x, math.nan)}), replace(good, payload={name: torch.ones(7)}),
            replace(good, payload={"other": torch.ones(1)}), replace(good, weight=math.nan), replace(good, weight=-1.0),
        ]  # fmt: skip
        which = i % len(lies)
        self.refused(lies[which], "")
        if which > 3:  # the job is settled with it
            self.open.remove(job)
            self.both("lost", job)

    def refused(self, update: Update, why: str) -> None:
        before, buffered = values(self.server), [u.job for u in self.server.buffer]
        reason = self.both("receive", update)
        assert reason is not None
        assert why in reason
        assert values(self.server) == before
        assert [u.job for u in self.server.buffer] == buffered

    def leave(self, i: int) -> None:
        for job in self.both("left", i % N):
            self.open = [j for j in self.open if j.id != job.id]
            self.both("lost", job)

    def join(self, i: int) -> None:
        self.both("joined", i % N)

    def restart(self, i: int) -> None:
        self.twin = self.copy()

    def copy(self) -> Server:
        again = make(self.meth, self.sched)
        again.load_state_dict(store.unflatten(*through_a_file(self.server)), lambda job: self.done[job].payload)
        return again

    def play(self, script: list[tuple[str, int]]) -> None:
        for what, i in script:
            self.settle() if what == "settle" else getattr(self, what)(i)
        self.settle()

    def drain(self) -> None:
        """From now on all is well."""
        for c in range(N):
            self.join(c)
        self.settle()
        for _ in range(40 * TURNS):
            if self.server.finished:
                break
            self.deliver(0)
            self.settle()
        assert self.server.version == TURNS


EVENTS = st.sampled_from(
    ["deliver"] * 6 + ["settle"] * 3 + ["lose", "again", "bad", "leave", "join", "join", "restart"]
)
SCRIPTS = st.lists(st.tuples(EVENTS, st.integers(0, 99)), min_size=10, max_size=50)
PAIRS = [(m, s) for s in SCHEDULES for m in METHODS if possible(m, s)]


@pytest.mark.parametrize(("meth", "sched"), PAIRS)
def test_whatever_happens(meth: str, sched: str) -> None:
    """Nothing hangs or counts twice, versions are in order, what is refused leaves no trace, and a restarted server
    goes on bit for bit."""

    @settings(max_examples=8, **PROFILE)
    @given(SCRIPTS)
    def check(script: list[tuple[str, int]]) -> None:
        d = Driver(meth, sched)
        d.play(script)
        d.drain()

    check()


@pytest.mark.parametrize(("meth", "sched"), PAIRS)
def test_the_order_within_an_instant_does_not_matter(meth: str, sched: str) -> None:
    @settings(max_examples=5, **PROFILE)
    @given(SCRIPTS, st.permutations(range(N)))
    def check(script: list[tuple[str, int]], order: list[int]) -> None:
        d = Driver(meth, sched)
        d.play(script)
        d.twin = None
        one, two = d.server, d.copy()
        updates = [d.compute(j) for j in d.open]
        for s, us in ((one, updates), (two, [updates[i] for i in order if i < len(updates)])):
            for u in us:
                s.computed(one.outstanding.get(u.job) or next(j for j in d.open if j.id == u.job))
                s.receive(u)
            while s.step():
                pass
        assert values(one) == values(two)
        assert one.version == two.version
        assert {u.job for u in one.buffer} == {u.job for u in two.buffer}
        assert [u.job for u in one.kept] == [u.job for u in two.kept]
        assert one.poll() == two.poll()

    check()


# --- the whole simulation ----------------------------------------------------------------------------------------------
WINDOWS = [
    {}, {"online": ((0.0, 9.0),)}, {"online": ((4.0, 60.0),)}, {"online": ((0.0, 14.0), (16.0, 30.0)), "period": 33.0}
]  # fmt: skip
DEVICES = st.builds(
    lambda speed, loss, duplex, window, detect: Device(
        step_seconds=speed, loss=loss, duplex=duplex, detect=detect, down_mb_s=1e-3, up_mb_s=5e-4, **window
    ),
    st.sampled_from([0.1, 0.5, 0.5, 3.0]),
    st.sampled_from([0.0, 0.0, 0.3, 0.9]),
    st.booleans(),
    st.sampled_from(WINDOWS),
    st.sampled_from([0.0, 1.0]),
)


def outcome(w: World) -> str:
    """Why the run could not go on, or nothing."""
    try:
        w.simulation.run()
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("sched", ["fedasync", "fedbuff", "port", "safa"])
def test_a_client_whose_windows_are_too_short_ends_the_run(sched: str) -> None:
    """Under `sync` this is an error after five attempts; here no window is as long as a job."""
    short = Device(step_seconds=10.0, online=((0.0, 3.0),), period=5.0)
    w = quadratic(clients=1, meth="fedavg", turns=2, steps=1, sched=SCHEDULES[sched], devices=[short])

    def bounded() -> None:
        assert w.simulation.events < 8_000

    w.simulation.on_event = bounded
    assert "stuck at second" in outcome(w)


@pytest.mark.parametrize("sched", SCHEDULES)
def test_simulations_end_or_say_why_and_resume_to_the_same_bits(sched: str) -> None:
    def world(devices: list[Device], meth: str) -> tuple[World, list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []
        w = quadratic(clients=N, meth=METHODS[meth], turns=TURNS, steps=2, sched=SCHEDULES[sched], devices=devices)
        for d, given_ in zip(devices, w.simulation.devices, strict=True):
            object.__setattr__(given_, "loss", d.loss)  # `worlds` sets one loss for all
        w.trainer.fit = lambda local, begin, only, prox, *more: {
            k: torch.randn(v.shape, dtype=v.dtype, generator=generator(local.client, local.visit, k))
            for k, v in begin.items()
            if only(k)
        }
        w.simulation.ledger.listener = rows.append
        return w, rows

    @settings(max_examples=6, **PROFILE)
    @given(st.lists(DEVICES, min_size=N, max_size=N), st.sampled_from(["fedavg", "fedbcd"]), st.integers(1, 60))
    def check(devices: list[Device], meth: str, at: int) -> None:
        w, rows = world(devices, meth)
        sim, saved = w.simulation, []

        def bounded() -> None:
            assert sim.events < 8_000
            if sim.events == at:
                tensors, skeleton = store.flatten(sim.state_dict())
                saved.append(({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(skeleton)), len(rows)))

        def end(one: World) -> str:
            reason = outcome(one)
            assert bool(reason) == (one.simulation.server.version < TURNS)
            assert not reason or ("stuck at second" in reason and "clients online" in reason)
            return reason

        sim.on_event = bounded
        ending = end(w)
        for what in ("down", "up"):
            assert sim.ledger.bytes[what] == sum(r["bytes"] for r in rows if r["what"] == what)
        for what in ("down", "compute", "up"):
            took = sum(r["end"] - r["start"] for r in rows if r["what"] == what)
            assert sim.ledger.seconds[what] == pytest.approx(took, abs=1e-9)
        assert sim.ledger.losses == sum(r["what"] == "lost" for r in rows)
        assert [r["version"] for r in rows if r["what"] == "step"] == list(range(1, sim.server.version + 1))
        if saved:
            again, later = world(devices, meth)
            again.simulation.load_state_dict(store.unflatten(*saved[0][:2]))
            assert end(again) == ending
            assert later == rows[saved[0][2] :]
            assert digest(again.final) == digest(w.final)

    check()
