"""What every method x schedule x codec must hold. A new registered name is tested here without a new test."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from worlds import World, language

from hocket import store
from hocket.codecs import codec
from hocket.methods import Update, method
from hocket.registry import fields
from hocket.schedules import schedule
from hocket.tree import digest, nbytes

METHODS: dict[str, Any] = {name: {"name": name} for name in method.names()}
for name in ("fedit", "ffa-lora", "flora"):
    METHODS[name] |= {"rank": 2}
METHODS["fedcybgd"] |= {"layers_per_block": 1}
METHODS |= {
    "fedbcd+gradient": {"name": "fedbcd", "layers_per_block": 1, "order": "gradient"},
    "fedcybgd+half": {"name": "fedcybgd", "layers_per_block": 1, "download": 0.5},
}
METHODS |= {
    f"fedavg+{o}": {"name": "fedavg", "server_optimizer": o, "server_lr": 0.01}
    for o in ("momentum", "adagrad", "adam", "yogi")
}
SCHEDULES: dict[str, Any] = {name: {"name": name} for name in schedule.names()}
SCHEDULES |= {
    "overlap(2)": {"name": "overlap", "staleness": 2},
    "sync, a deadline": {"name": "sync", "deadline": 60.0, "over_selection": 1.5, "cohort": 2},
    "fedfa, models, wait": {"name": "fedfa", "form": "model", "start": "wait", "window": 2},
    "ca2fl, caches at clients": {"name": "ca2fl", "caches": "clients"},
    "ca2fl, news of clients": {"name": "ca2fl", "news": "clients"},
    "fedbuff, few": {"name": "fedbuff", "concurrency": 2, "selection": "fair", "max_staleness": 2},
}
for spec in SCHEDULES.values():  # three clients: a buffer that they fill while others are still at work
    if "buffer" in {f[0] for f in fields(schedule.get(spec["name"]))}:
        spec["buffer"] = 2
NEEDS = {
    "chain": {"codecs": ["half", "int8"]},
    "per_tensor": {"rules": {"*norm*": "raw", "*": "int8"}},
    "feedback": {"codec": "int8"},
    "topk": {"share": 0.1},
    **{name: {"rank": 2} for name in ("svd", "pca", "qrcp", "cur")},
}
CODECS: dict[str, Any] = {name: {"name": name, **NEEDS.get(name, {})} for name in codec.names()}


def possible(meth: str, sched: str) -> bool:
    s = schedule.build(SCHEDULES[sched])
    return s.refuses(s.adapt(method.build(METHODS[meth]))) is None


PAIRS = [(m, s) for m in METHODS for s in SCHEDULES if possible(m, s)]


def cover(pairs: list[tuple[str, str]], codecs: list[str]) -> list[tuple[str, str, str]]:
    """Few triples that hold every possible (method, schedule), (schedule, codec) and (method, codec): for each pair of
    the first kind, the codec that brings the most pairs not seen yet; then what is left. Always the same ones."""
    sc = {(s, c) for _, s in pairs for c in codecs}
    mc = {(m, c) for m, _ in pairs for c in codecs}
    triples = []

    def take(m: str, s: str) -> None:
        shift = len(triples) % len(codecs)  # among equals, one after the other
        c = max(codecs[shift:] + codecs[:shift], key=lambda c: ((s, c) in sc) + ((m, c) in mc))
        sc.discard((s, c))
        mc.discard((m, c))
        triples.append((m, s, c))

    for m, s in pairs:
        take(m, s)
    while sc or mc:
        take(*max(pairs, key=lambda p: sum(((p[1], c) in sc) + ((p[0], c) in mc) for c in codecs)))
    return triples


TRIPLES = cover(PAIRS, list(CODECS))


def world(meth: str, sched: str, up: str = "raw", loss: float = 0.0, **more: Any) -> World:
    down = "raw" if up in ("raw", "feedback") else CODECS[up]
    return language(
        meth=METHODS[meth], sched=SCHEDULES[sched], up=CODECS[up], down=down, loss=loss, layers=2, steps=1,
        evaluate=lambda p: {"loss": float(sum(v.abs().sum() for v in p.values()))}, **{"turns": 3, **more},
    )  # fmt: skip


def frozen(w: World) -> tuple[dict[str, torch.Tensor], Any]:
    """The saved state, through JSON as a file would hold it."""
    tensors, skeleton = store.flatten(w.simulation.state_dict())
    return {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(skeleton))


def values(skeleton: Any) -> Any:
    """A saved state with views where they are used: which of them are one and the same dict is no part of it."""
    flights = skeleton["flights"]
    used = [{**f, "view": None if f["view"] is None else flights["views"][f["view"]]} for f in flights["flights"]]
    return {**skeleton, "flights": used}


@pytest.mark.parametrize(("meth", "sched", "up"), TRIPLES)
def test_resume_after_every_event_is_bit_identical(meth: str, sched: str, up: str) -> None:
    """By induction: from the state saved after event k, one more event gives the state saved after event k + 1."""
    keep = {"optimizer_state": "keep"} if meth == "fedbcd" else {}
    make = lambda: world(meth, sched, up, loss=0.3, training=keep)
    original, saved = make(), []
    original.simulation.on_event = lambda: saved.append(frozen(original))
    original.simulation.run()
    saved.append(frozen(original))
    assert len(saved) > 10
    again = make()

    class OneEvent(Exception):
        pass

    def stop() -> None:
        raise OneEvent

    again.simulation.on_event = stop
    for before, after in zip(saved[:-1], saved[1:], strict=True):
        again.simulation.load_state_dict(store.unflatten(*before))
        try:
            again.simulation.run()
        except OneEvent:
            pass
        tensors, skeleton = frozen(again)
        assert values(skeleton) == values(after[1])
        assert digest(tensors) == digest(after[0])


@pytest.mark.parametrize(("meth", "sched"), PAIRS)
def test_lost_clients_neither_hang_nor_stop_the_run(meth: str, sched: str) -> None:
    w = world(meth, sched, loss=0.3)
    w.simulation.run()
    assert w.simulation.server.version == w.simulation.server.turns
    assert all(torch.isfinite(v).all() for v in w.final.values())
    assert not w.simulation.flights or w.simulation.finished


@pytest.mark.parametrize("meth", METHODS)
def test_a_zero_step_client_changes_nothing(meth: str) -> None:
    w = world(meth, "sync")
    w.trainer.fit = lambda local, start, only, prox, *more: {k: torch.zeros_like(v) for k, v in start.items() if only(k)}
    before = digest(w.final)
    w.simulation.run()
    assert digest(w.final) == before


@pytest.mark.parametrize("meth", [m for m in METHODS if "+" not in m])
def test_one_client_is_local_training(meth: str) -> None:
    """One client, three turns, against the trainer called by hand on the same values."""
    w = world(meth, "sync", clients=1)
    by_hand = world(meth, "sync", clients=1)
    w.simulation.run()
    m, state = by_hand.simulation.server.method, by_hand.simulation.server.state
    from hocket.methods import Local, Update

    for turn in range(3):
        values = state["params"]
        local = Local(0, values, {}, turn, 3, turn, 7, by_hand.trainer)
        state = m.step(state, [Update(turn, 0, turn, turn, m.train(local, values))], [1.0])
    values = m.export(state)
    assert digest(values) == digest(w.final)


@pytest.mark.parametrize(("meth", "sched"), PAIRS)
def test_arrival_order_does_not_matter(meth: str, sched: str) -> None:
    """Updates of one step, received in any order, give the same bits."""
    results = set()
    for reverse in (False, True):
        w = world(meth, "sync" if "deadline" in sched else sched, turns=9)
        server, sim = w.simulation.server, w.simulation
        jobs = []
        for _ in range(2):  # an asynchronous server's second instant meets its first one's windows and caches
            for j in server.poll():
                sim._send(j)
                jobs.append(j)
            now = [j for j in jobs if j.turn <= server.version]  # those who start ahead are heard in the next instant
            jobs = [j for j in jobs if j.turn > server.version]
            updates = []
            for j in now:
                result = sim.executor.result(j.id)
                sim._next(j.client)
                payload = sim.up.decode(result.blob)
                updates.append(Update(j.id, j.client, j.version, j.turn, payload, result.weight, result.metrics))
            for u in reversed(updates) if reverse else updates:
                assert server.receive(u) is None
            assert server.step() is not None
            while server.step():
                pass
        results.add(digest(store.flatten(server.state_dict())[0]))
    assert len(results) == 1


FORMULA = {  # bytes of the payload a round and client, up, from each method's file; fp32, packet headers not counted
    "fedavg": lambda v: nbytes(v),
    "fedit": lambda v: nbytes(v),
    "ffa-lora": lambda v: nbytes({k: x for k, x in v.items() if ".lora_B." in k}),
    "flora": lambda v: nbytes({k: x for k, x in v.items() if ".lora_" in k}),
    "fedbcd": lambda v: nbytes(v),  # two layers, two layers per block: the one block is the whole view
    "fedcybgd": lambda v: nbytes(v) // 2,
}


@pytest.mark.parametrize("meth", [m for m in METHODS if "+" not in m])
def test_bytes_are_packets_and_packets_are_the_formula(meth: str) -> None:
    sizes: list[int] = []
    w = world(meth, "sync")
    encode, decode = type(w.simulation.up).encode, w.simulation.up.decode
    w.simulation.spool.put = lambda key, blob, put=w.simulation.spool.put: (  # type: ignore[method-assign]
        sizes.append(len(blob)) if key.startswith("up/") else None, put(key, blob)
    )[1]  # fmt: skip
    expected = FORMULA[meth](w.final)
    names = len(w.final)
    w.simulation.run()
    assert encode and decode
    assert sum(sizes) == w.simulation.ledger.bytes["up"]
    for size in sizes:
        assert expected <= size <= expected + 200 + 200 * names


@pytest.mark.parametrize("sched", SCHEDULES)
def test_clients_that_change_nothing_leave_the_model(sched: str) -> None:
    w = world("fedavg", sched)
    w.trainer.fit = lambda local, start, only, prox, *more: {k: torch.zeros_like(v) for k, v in start.items() if only(k)}
    before = digest(w.final)
    w.simulation.run()
    assert digest(w.final) == before


def test_every_pair_is_resumed() -> None:
    assert {(m, s) for m, s, _ in TRIPLES} == set(PAIRS)
    assert {(s, c) for _, s, c in TRIPLES} == {(s, c) for s in SCHEDULES for c in CODECS}
    assert {(m, c) for m, _, c in TRIPLES} == {(m, c) for m in METHODS for c in CODECS}


def test_every_registered_name_is_covered() -> None:
    assert set(method.names()) <= set(METHODS)
    assert set(FORMULA) == set(method.names())
    assert set(schedule.names()) <= set(SCHEDULES)
    assert set(codec.names()) == set(CODECS)
