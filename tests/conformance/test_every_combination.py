"""What every method x schedule x codec must hold. A new registered name is tested here without a new test."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from worlds import World, language

from hocket import store
from hocket.codecs import codec
from hocket.methods import Local, Update, method
from hocket.methods.nouns import Point
from hocket.methods.splits import blocks
from hocket.registry import fields
from hocket.schedules import schedule
from hocket.tree import Tree, digest, nbytes

METHODS: dict[str, Any] = {name: {"name": name} for name in method.names()}
for name, spec in METHODS.items():
    if "rank" in {f[0] for f in fields(method.get(name))}:
        spec["rank"] = 2
METHODS["fedcybgd"] |= {"layers_per_block": 1}
METHODS["ferret"] |= {"k": 64}
METHODS["slora"] |= {"sparse_turns": 1}
METHODS["fedkseed"] |= {"directions": 64}
METHODS["fedkseed-pro"] |= {"directions": 64}
ARCH = {"fedpeft-bias": "gpt2"}  # where llama, which has no biases, will not do
METHODS |= {
    "fedbcd+gradient": {"name": "fedbcd", "layers_per_block": 1, "order": "gradient"},
    "fedcybgd+half": {"name": "fedcybgd", "layers_per_block": 1, "download": 0.5},
}
METHODS |= {
    f"fedavg+{o}": {"name": "fedavg", "server_optimizer": o, "server_lr": 0.01}
    for o in ("momentum", "adagrad", "adam", "yogi")
}
METHODS |= {
    "ferret+fixed": {"name": "ferret", "k": 64, "seeds": "fixed", "split": "size"},
    "hetlora+plain": {"name": "hetlora", "rank": 2, "gamma": 1, "decay": 0, "norm": "none"},
    "gradualdiff+top": {"name": "gradualdiff", "difference": "float", "precision": "half", "share": 0.1},
    "hlora-delta+ranks": {"name": "hlora-delta", "rank": 4},
}
RANKS = {"hlora-delta+ranks": [1, 2, 4]}  # of the clients' adapters, where they differ
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
    exactly = bool(method.build(METHODS[meth]).verbatim) and not codec.build(CODECS[up]).lossless
    down = "raw" if up in ("raw", "feedback") or exactly else CODECS[up]
    return language(
        ARCH.get(meth, "llama"), meth=METHODS[meth], sched=SCHEDULES[sched], up=CODECS[up], down=down, loss=loss,
        layers=2, steps=1,
        ranks=RANKS.get(meth),
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
def test_with_lost_clients_runs_end_and_resume_after_every_event_is_bit_identical(meth: str, sched: str, up: str) -> None:
    """By induction: from the state saved after event k, one more event gives the state saved after event k + 1."""
    keep = {"optimizer_state": "keep"} if meth == "fedbcd" else {}
    make = lambda: world(meth, sched, up, loss=0.3, training=keep)
    original, saved = make(), []
    original.simulation.on_event = lambda: saved.append(frozen(original))
    original.simulation.run()
    saved.append(frozen(original))
    assert len(saved) > 10
    end = original.simulation
    assert end.server.version == end.server.turns
    assert all(torch.isfinite(v).all() for v in original.final.values())
    assert not end.flights or end.finished
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


def still(local: Any, start: Tree, only: Any, prox: float, penalty: Any = None, masks: Any = None, *_: Any) -> Tree:
    """A client that does not move."""
    return {k: v.new_zeros((masks or {}).get(k, v).shape) for k, v in start.items() if only(k)}


def flat(local: Any, start: Tree, only: Any, beside: int) -> Any:
    """A client whose losses do not depend on the model."""
    yield Point({k: v.clone() for k, v in start.items() if only(k)}, lambda: 1.0, lambda stacks: [1.0, 1.0], 0.1)


@pytest.mark.parametrize("meth", METHODS)
def test_a_zero_step_client_changes_nothing(meth: str) -> None:
    w = world(meth, "sync")
    w.trainer.fit, w.trainer.walk = still, flat
    before = digest(w.final)
    w.simulation.run()
    assert digest(w.final) == before


@pytest.mark.parametrize("meth", [m for m in METHODS if "+" not in m])
def test_one_client_is_local_training(meth: str) -> None:
    """One client, three turns, against the trainer called by hand on the same values."""
    w = world(meth, "sync", clients=1)
    by_hand = world(meth, "sync", clients=1)
    w.simulation.run()
    server = by_hand.simulation.server
    m, state = server.method, server.state
    memory: Tree = {}
    for turn in range(3):
        values = m.send(state, server.clients[0], turn)
        sent = m.train(Local(0, values, memory, turn, 3, turn, 7, by_hand.trainer, server.clients[0].traits), values)
        read = m.accept(state["params"], sent) if m.anchored else sent
        state = m.step(state, [Update(turn, 0, turn, turn, read)], [1.0])
    assert digest(m.export(state)) == digest(w.final)


@pytest.mark.parametrize(("meth", "sched"), PAIRS)
def test_arrival_order_does_not_matter(meth: str, sched: str) -> None:
    """Updates of one step, received in any order, give the same bits."""
    one, other = (world(meth, "sync" if "deadline" in sched else sched, turns=9).simulation for _ in range(2))
    jobs: list[Any] = []
    for _ in range(2):  # an asynchronous server's second instant meets its first one's windows and caches
        asked = one.server.poll()
        assert asked == other.server.poll()
        for j in asked:
            one._send(j)
            jobs.append(j)
        now = [j for j in jobs if j.turn <= one.server.version]  # those who start ahead are heard in the next instant
        jobs = [j for j in jobs if j.turn > one.server.version]
        updates = []
        for j in now:
            result = one.executor.result(j.id)
            one._next(j.client)
            payload = one.up.decode(result.blob)
            updates.append(Update(j.id, j.client, j.version, j.turn, payload, result.weight, result.metrics))
        for server, order in ((one.server, updates), (other.server, updates[::-1])):
            for u in order:
                assert server.receive(u) is None
            assert server.step() is not None
            while server.step():
                pass
        assert len({digest(store.flatten(s.server.state_dict())[0]) for s in (one, other)}) == 1


def of(*parts: str) -> Any:
    """Bytes of the tensors whose names hold one of these."""
    return lambda v, turn: nbytes({k: x for k, x in v.items() if any(p in k for p in parts)})


A, B = ".lora_A.", ".lora_B."
FORMULA = {  # bytes of the payload a round and client, up, from each method's file, given the view and the turn; fp32
    **{name: of("") for name in ("fedavg", "fedpeft", "fedpeft-bias", "gradualdiff")},
    **{name: of(A, B) for name in ("fedit", "flora", "florist", "fedex-lora", "flexlora", "raflora", "hetlora")},
    **{name: of(A, B) for name in ("hlora", "hlora-delta")},
    **{name: of(B) for name in ("ffa-lora", "fedsvd")},
    "fedsa-lora": of(A),
    "rolora": lambda v, turn: of(A if turn % 2 else B)(v, turn),
    "slora": of(A, B),  # in both stages
    "fedbcd": of(""),  # two layers, two layers per block: the one block is the whole view
    "fedcybgd": lambda v, turn: nbytes(v) // 2,
    "spafl": of(".threshold"),
    **{name: lambda v, turn: 6 * 1 + 4 for name in ("fedkseed", "fedkseed-pro")},  # one step, and the rate
    "ferret": lambda v, turn: 4 * 64 + 4 * len(blocks(v)) + 8,
    "fedkrso": of(B),  # one interval, one subspace
    "fedkrso-feedback": lambda v, turn: of(A if turn % 2 else B)(v, turn),
}


@pytest.mark.parametrize("meth", [m for m in METHODS if "+" not in m])
def test_bytes_are_packets_and_packets_are_the_formula(meth: str) -> None:
    blobs: list[bytes] = []
    w = world(meth, "sync")
    w.simulation.spool.put = lambda key, blob, put=w.simulation.spool.put: (  # type: ignore[method-assign]
        blobs.append(blob) if key.startswith("up/") else None, put(key, blob)
    )[1]  # fmt: skip
    view = w.final
    w.simulation.run()
    assert len(blobs) == 3 * w.simulation.server.turns
    assert sum(map(len, blobs)) == w.simulation.ledger.bytes["up"]
    for i, blob in enumerate(blobs):
        expected = FORMULA[meth](view, i // 3)
        assert nbytes(dict(w.simulation.up.decode(blob))) == expected
        assert expected <= len(blob) <= expected + 200 + 200 * len(view)


@pytest.mark.parametrize("sched", SCHEDULES)
def test_clients_that_change_nothing_leave_the_model(sched: str) -> None:
    w = world("fedavg", sched)
    w.trainer.fit = still
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
