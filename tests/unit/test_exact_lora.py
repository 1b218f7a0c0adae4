"""Adapters whose aggregation is the mean of products: FedEx-LoRA by a residual, RoLoRA by turns, FLoRIST up to what it
cuts off; and what a run writes down of those that are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import collate, language, tokens

from hocket import products
from hocket.methods import Client, Local, Update, method
from hocket.methods.base import State
from hocket.methods.lora import BASE, A, B, modules, pair
from hocket.models.tiny import tiny
from hocket.models.views import View, make
from hocket.tree import Tree, generator, nbytes

M = "layers.0.q"
OUT, INNER, RANK = 20, 18, 3


def draw(*shape: int, key: Any = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("exact", key, *shape))


def build(name: str, **more: Any) -> Any:
    return method.build({"name": name, "rank": RANK, "alpha": 5.0, **more})


def begin(m: Any) -> State:
    tree = {M + A: draw(RANK, INNER), M + B: draw(OUT, RANK)} | ({M + BASE: draw(OUT, INNER)} if m.merges else {})
    state: State = m.init(tree, 0)
    return state


def updates(m: Any, count: int = 3, factors: Sequence[str] = (A, B), turn: int = 0) -> list[Update]:
    shapes = {A: (RANK, INNER), B: (OUT, RANK)}
    return [Update(c, c, turn, turn, {M + x: draw(*shapes[x], key=(c, turn)) for x in factors}) for c in range(count)]


def ideal(m: Any, state: State, sent: Sequence[Update], share: Sequence[float]) -> Tensor:
    """D + sum_i share_i (M_i - D), by dense matrices."""
    a, b = pair(state["params"], M)
    total = b @ a
    for u, p in zip(sent, share, strict=True):
        total = total + p * ((b + u.payload.get(M + B, 0)) @ (a + u.payload.get(M + A, 0)) - b @ a)
    return m.scale(M) * total


def whole(m: Any, state: State) -> Tensor:
    """All that the server's model is made of."""
    a, b = pair(state["params"], M)
    return m.scale(M) * b @ a + state["params"].get(M + BASE, 0)


# --- FedEx-LoRA -----------------------------------------------------------------------------------------------------

TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}


def real(arch: str, name: str = "fedex-lora") -> tuple[Any, View]:
    m = build(name, targets=TARGETS[arch])
    model, _ = tiny(arch, vocab=64, layers=2, width=16)
    return m, make(model.double(), m, "causal", 0)


def logits(view: View, params: Tree) -> Tensor:
    view.place(params)
    with torch.no_grad():
        return view.model(collate(tokens(0, 2, 64))["input_ids"]).logits.clone()


@pytest.mark.parametrize("arch", TARGETS)
def test_fedex_is_the_mean_of_the_products_in_a_real_model(arch: str) -> None:
    """On nn.Linear and Conv1D, square and not; against the dense mean merged into the weights by hand."""
    m, view = real(arch)
    start = {k: v + (0.3 * draw(*v.shape, key=k) if "lora_" in k else 0) for k, v in view.start().items()}
    assert {x.shape[0] == x.shape[1] for k, x in start.items() if k.endswith(BASE)} == {True, False}
    adapters = [k for k in start if "lora_" in k]
    sent = [{k: 0.3 * draw(*start[k].shape, key=(c, k)) for k in adapters} for c in range(3)]
    p = [1 / 8, 5 / 8, 2 / 8]
    dense = dict(start)
    for x in modules(start):
        a, b = pair(start, x)
        dense[x + BASE] = start[x + BASE] + m.scale(x) * sum(w * (b + s[x + B]) @ (a + s[x + A]) for w, s in zip(p, sent, strict=True))
        dense[x + B] = torch.zeros_like(b)
    state = m.init(start, 0)
    after = m.step(state, [Update(c, c, 0, 0, s) for c, s in enumerate(sent)], [1.0, 5.0, 2.0])
    expected, found = logits(view, dense), logits(view, m.export(after))
    assert torch.allclose(found, expected, atol=1e-10)
    fedit = {k: v if k.endswith(BASE) else after["params"][k] for k, v in start.items()}
    assert not torch.allclose(logits(view, fedit), expected, atol=1e-3)


@pytest.mark.parametrize(("count", "rows"), [(1, 0), (2, 1), (5, 4)])
def test_the_residual_travels_in_one_adapter_less_than_there_are_clients(count: int, rows: int) -> None:
    m = build("fedex-lora")
    state = begin(m)
    sent = updates(m, count)
    after = m.step(state, sent, [1.0 + c for c in range(count)])
    assert sum(v.shape[0] for k, v in after["last"].items() if k.endswith(A)) == rows * RANK
    payload = m.ship(after, Client(0), 1, 0, {M + A: 1, M + B: 1, M + BASE: 1 if rows else 0})
    dense = rows * RANK * (OUT + INNER) > OUT * INNER  # then the weight itself is less
    assert set(payload) - {M + A, M + B} == ({M + BASE} if dense else {f"1/{M}{A}", f"1/{M}{B}"} if rows else set())
    residual = whole(m, after) - m.scale(M) * after["params"][M + B] @ after["params"][M + A] - state["params"][M + BASE]
    assert torch.linalg.matrix_rank(residual, atol=1e-9) == rows * RANK


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("rate", "weights"), [(1.0, [1.0, 5.0, 2.0]), (0.5, [1.0, 5.0, 2.0]), (1.0, [0.5, 1.0, 2.0])])
def test_fedex_is_exact_at_any_server_rate_and_discount(rate: float, weights: list[float], count: int) -> None:
    m = build("fedex-lora", server_lr=rate)
    state, sent, shares = begin(m), updates(m, count), [1.0, 5.0, 2.0][:count]
    after = m.step(state, sent, weights[:count], shares)
    share = [rate * w / sum(shares) for w in weights[:count]]
    assert torch.allclose(whole(m, after), state["params"][M + BASE] + ideal(m, state, sent, share), atol=1e-10)
    log = m.layers(state, sent, weights[:count], shares, after)[M]
    assert log["error"] < 1e-7


def test_a_transposed_residual_is_worse_than_none() -> None:
    """As the published aggregation adds it, which is right for Conv1D's in x out alone."""
    m = build("fedex-lora")
    square = {M + A: draw(RANK, OUT), M + B: draw(OUT, RANK), M + BASE: draw(OUT, OUT)}
    state = m.init(square, 0)
    sent = [Update(c, c, 0, 0, {k: draw(*square[k].shape, key=c) for k in (M + A, M + B)}) for c in range(3)]
    after = m.step(state, sent, [1.0] * 3)["params"]
    best = square[M + BASE] + ideal(m, state, sent, [1 / 3] * 3)
    mean = m.scale(M) * after[M + B] @ after[M + A]
    residual = after[M + BASE] - square[M + BASE]

    def error(base: Tensor) -> float:
        return float((base + mean - best).norm() / (best - square[M + BASE]).norm())

    ours, none, transposed = error(after[M + BASE]), error(square[M + BASE]), error(square[M + BASE] + residual.T)
    assert ours < 1e-12 < 0.2 < none < transposed


@pytest.mark.parametrize("sched", ["sync", "overlap", {"name": "sync", "cohort": 2}, {"name": "fedbuff", "buffer": 2}], ids=str)
@pytest.mark.parametrize("name", ["fedex-lora", "florist"])
def test_simulated_clients_hold_what_loading_gives(name: str, sched: Any) -> None:
    """The short cut of the simulation (the server's own view) against a client that loads every packet itself."""
    w = language(meth={"name": name, "rank": 1}, sched=sched, turns=5, layers=2)
    server, downlink = w.simulation.server, w.simulation.downlink
    held = {c: dict(server.state["params"]) for c in server.clients}
    send, stacked = downlink.send, []

    def checking(job: Any, s: Any) -> Any:
        download = send(job, s)
        held[job.client] = s.method.load(held[job.client], job.payload)
        assert all(torch.equal(held[job.client][k], download.view[k]) for k in download.view)
        stacked.append(any("/" in k for k in job.payload))
        return download

    downlink.send = checking  # type: ignore[method-assign]
    w.run()
    assert any(stacked)
    assert not all(stacked)


@pytest.mark.parametrize("name", ["fedex-lora", "flora", "florist"])
def test_who_holds_nothing_gets_the_weights_and_not_their_changes(name: str) -> None:
    m = build(name)
    after = m.step(begin(m), updates(m, 2), [1.0, 1.0])
    payload = m.ship(after, Client(0), 1, -1, dict.fromkeys(after["params"], 1))
    assert set(after["news"]) == {"1"}
    assert set(payload) == set(after["params"])
    assert all(torch.equal(v, after["params"][k]) for k, v in m.load({}, payload).items())


def test_fedex_sends_fedits_bytes_up_and_the_residual_down() -> None:
    w, plain = (language(meth={"name": n, "rank": 1}, turns=3, width=64, layers=2) for n in ("fedex-lora", "fedit"))
    one = nbytes({k: v for k, v in w.final.items() if "lora_" in k})
    w.run(), plain.run()
    up, down = w.simulation.ledger.bytes["up"], w.simulation.ledger.bytes["down"] - plain.simulation.ledger.bytes["down"]
    assert up == plain.simulation.ledger.bytes["up"]
    assert 6 * 2 * one < down < 6 * 2 * one + 6 * 200 * 8  # two turns, three clients, two adapters' residual each


# --- RoLoRA ---------------------------------------------------------------------------------------------------------


def test_rolora_moves_b_in_even_turns_and_a_in_odd_ones() -> None:
    w = language(meth={"name": "rolora", "rank": 2}, turns=4).run()
    for t in range(4):
        for k in w.final:
            moved = k.endswith(B if t % 2 == 0 else A)
            assert torch.equal(w.iterates[t][k], w.iterates[t + 1][k]) is not moved
            assert all((k in w.deltas[c, t]) is moved for c in range(3))


@pytest.mark.parametrize("turn", [0, 1])
def test_rolora_and_ffa_lora_average_products_exactly(turn: int) -> None:
    for m in (build("rolora"), build("ffa-lora")):
        state = begin(m)
        local = Local(0, {}, {}, turn, 2, 0, 0, None)  # type: ignore[arg-type]
        names = [x for x in (A, B) if m.trains(local)(M + x)]
        assert names == ([A] if m.name == "rolora" and turn else [B])
        sent = updates(m, 3, names)
        after = m.step(state, sent, [1.0, 5.0, 2.0])
        assert torch.allclose(whole(m, after), ideal(m, state, sent, [1 / 8, 5 / 8, 2 / 8]), atol=1e-12)
    both = build("fedit").step(state, updates(m), [1.0, 5.0, 2.0])
    assert not torch.allclose(whole(m, both), ideal(m, state, updates(m), [1 / 8, 5 / 8, 2 / 8]), atol=1e-2)


# --- FLoRIST --------------------------------------------------------------------------------------------------------


def stacked(m: Any, weights: Sequence[float] = (1.0, 5.0, 2.0)) -> tuple[State, State, list[Update]]:
    state, sent = begin(m), updates(m)
    return state, m.step(state, sent, list(weights)), sent


def test_florist_that_keeps_all_the_energy_is_flora() -> None:
    flora, florist = (stacked(build(n, **more))[1]["params"] for n, more in (("flora", {}), ("florist", {"energy": 1.0})))
    assert all(torch.allclose(flora[k], florist[k], atol=1e-10) for k in flora)


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.9, 0.99])
def test_florist_keeps_the_fewest_directions_that_hold_its_share(energy: float) -> None:
    m = build("florist", energy=energy)
    state, after, sent = stacked(m)
    exact = sum(p * m.scale(M) * u.payload[M + B] @ u.payload[M + A] for p, u in zip((1 / 8, 5 / 8, 2 / 8), sent, strict=True))
    merged = after["params"][M + BASE] - state["params"][M + BASE]
    s = torch.linalg.svdvals(exact)[: 3 * RANK]
    rank = len(after["last"][M + A])
    assert torch.linalg.matrix_rank(merged) == rank < 3 * RANK
    kept = [float(s[:r].square().sum() / s.square().sum()) for r in range(rank + 1)]
    assert kept[-2] < energy <= kept[-1]
    assert float((merged - exact).norm()) == pytest.approx(float(s[rank:].norm()), rel=1e-9)
    log = m.layers(state, sent, [1.0, 5.0, 2.0], [1.0, 5.0, 2.0], after)[M]
    assert log["error"] == pytest.approx((1 - kept[-1]) ** 0.5, rel=1e-6)
    assert log["rank"] == pytest.approx(products.effective_rank(s[:rank]))


def test_florist_sends_less_down_and_as_much_up() -> None:
    flora, florist = (
        language(meth={"name": n, "rank": 4, **more}, turns=3, width=64, layers=2).run().simulation.ledger.bytes
        for n, more in (("flora", {}), ("florist", {"energy": 0.8}))
    )
    assert florist["up"] == flora["up"]
    assert florist["down"] < 0.6 * flora["down"]


# --- what is written down -------------------------------------------------------------------------------------------


def test_fedits_error_is_the_covariance_of_its_factors() -> None:
    m = build("fedit")
    state, sent, p = begin(m), updates(m), [1 / 8, 5 / 8, 2 / 8]
    after = m.step(state, sent, [1.0, 5.0, 2.0])
    a, b = pair(after["params"], M)
    ends = [(state["params"][M + A] + u.payload[M + A], state["params"][M + B] + u.payload[M + B]) for u in sent]
    lost = m.scale(M) * sum(w * (y - b) @ (x - a) for w, (x, y) in zip(p, ends, strict=True))
    best = ideal(m, state, sent, p)
    assert torch.allclose(best - whole(m, after), lost, atol=1e-10)
    log = m.layers(state, sent, [1.0, 5.0, 2.0], [1.0, 5.0, 2.0], after)[M]
    assert log["error"] == pytest.approx(float(lost.norm() / best.norm()), rel=1e-9)
    assert log["error"] > 0.2
    assert log["rank"] == pytest.approx(products.effective_rank(torch.linalg.svdvals(b @ a)))


@pytest.mark.parametrize("name", ["ffa-lora", "rolora", "fedex-lora", "flora"])
def test_exact_methods_have_no_error(name: str) -> None:
    m = build(name)
    state, sent = begin(m), updates(m, 3, (B,) if name in ("ffa-lora", "rolora") else (A, B))
    weights = [1.0, 5.0, 2.0]
    log = m.layers(state, sent, weights, weights, m.step(state, sent, weights))[M]
    assert log["error"] < 1e-7
    assert 1 < log["rank"] <= 9


@pytest.mark.parametrize("name", ["fedit", "flora", "hetlora", "hlora", "fedex-lora"])
def test_one_client_is_averaged_without_error(name: str) -> None:
    m = build(name)
    state, (sent,) = begin(m), updates(m, 1)
    if m.anchored:
        sent = Update(0, 0, 0, 0, m.accept(state["params"], sent.payload))
    assert m.layers(state, [sent], [2.0], [2.0], m.step(state, [sent], [2.0]))[M]["error"] < 1e-7


@pytest.mark.parametrize("name", ["fedit", "hlora", "flora"])
def test_under_a_server_optimizer_there_is_no_sum_to_compare_with(name: str) -> None:
    m = build(name, server_optimizer="adam")
    state = begin(m)
    sent = [Update(u.job, u.client, 0, 0, m.accept(state["params"], u.payload)) for u in updates(m)]
    assert m.layers(state, sent, [1.0] * 3, [1.0] * 3, m.step(state, sent, [1.0] * 3)) == {}


@pytest.mark.parametrize(("name", "low", "high"), [("fedit", 1e-4, 1), ("ffa-lora", 0, 1e-6), ("fedex-lora", 0, 1e-6), ("florist", 1e-3, 0.33)])
def test_the_ledger_has_error_and_effective_rank_of_every_module(name: str, low: float, high: float) -> None:
    w = language(meth={"name": name, "rank": 2}, turns=2, layers=2)
    rows: list[Any] = []
    w.simulation.ledger.listener = lambda row: rows.append(row["layers"]) if row["what"] == "step" else None
    w.run()
    assert [set(row) for row in rows] == [set(modules(w.final))] * 2
    for row in rows:
        assert all(low <= x["error"] <= high and 1 <= x["rank"] <= 6 for x in row.values())
