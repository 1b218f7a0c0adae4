"""FedCyBGD against its oracles: local training for one client and block, Gauss-Seidel, the pretrained rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from worlds import World, language, quadratic

from hocket.errors import RecipeError
from hocket.methods import Client, Update, method
from hocket.tree import Tree, digest


def cybgd(**more: Any) -> dict[str, Any]:
    return {"name": "fedcybgd", "layers_per_block": 1, **more}


def one_at_a_time(world: World) -> list[tuple[int, float, float]]:
    """(client, first second, last second) of each job, in order of turns."""
    rows: list[dict[str, Any]] = []
    world.simulation.ledger.listener = rows.append
    world.run()
    jobs = sorted({r["job"] for r in rows if "job" in r})
    mine = {j: [r for r in rows if r.get("job") == j] for j in jobs}
    return [(r[0]["client"], min(x["start"] for x in r), max(x["end"] for x in r)) for r in mine.values()]


def test_clients_take_turns_and_nobody_overlaps() -> None:
    uses = one_at_a_time(quadratic(clients=4, sched="cyclic", meth=cybgd(), turns=8))
    assert [c for c, _, _ in uses] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert all(a[2] < b[1] for a, b in zip(uses, uses[1:], strict=False))


def test_aggregated_mode_averages_a_few_clients_on_one_block() -> None:
    w = quadratic(clients=4, sched={"name": "cyclic", "cohort": 2}, meth=cybgd(), turns=4, weights=[1, 3, 2, 2]).run()
    assert sorted(w.starts) == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 1), (2, 3), (3, 1), (3, 3)]
    mean = (w.deltas[0, 0]["layers.0.w"] + 3 * w.deltas[1, 0]["layers.0.w"]) / 4
    assert torch.allclose(w.iterates[1]["layers.0.w"], mean, atol=1e-15)


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_one_client_and_one_block_is_local_training(state: str) -> None:
    training = {"optimizer_state": state}
    a = language(clients=1, sched="cyclic", meth=cybgd(layers_per_block=4), training=training).run()
    b = language(clients=1, sched="sync", meth={"name": "fedbcd", "layers_per_block": 4}, training=training).run()
    assert digest(a.final) == digest(b.final)


def exactly(world: World) -> None:
    """Let every client solve its block for good: x_b = argmin f_i."""
    model = world.trainer.view.model
    n, size = len(model.layers), len(model.layers[0].w)

    def fit(local: Any, start: Tree, only: Any, prox: float, *more: Any) -> Tree:
        x = torch.cat([start[f"layers.{i}.w"] for i in range(n)])
        (b,) = [i for i in range(n) if only(f"layers.{i}.w")]
        H, c = model.H[local.client], model.c[local.client]
        at = slice(b * size, (b + 1) * size)
        gradient = (H @ (x - c))[at]
        return {f"layers.{b}.w": -torch.linalg.solve(H[at, at], gradient)}

    world.trainer.fit = fit


def test_exact_block_solves_are_gauss_seidel_and_monotone() -> None:
    w = quadratic(clients=1, layers=4, sched="cyclic", meth=cybgd(), turns=40)
    exactly(w)
    w.run()
    gaps = [w.trainer.view.model.gap(x, [1.0]) for x in w.iterates]
    assert all(b <= a + 1e-12 for a, b in zip(gaps, gaps[1:], strict=False))
    assert gaps[-1] < 1e-3 * gaps[0]


def test_one_block_a_client_ends_with_every_block_from_its_own_client() -> None:
    w = quadratic(clients=4, layers=4, sched="cyclic", meth=cybgd(), turns=4).run()
    for b in range(4):
        assert torch.equal(w.final[f"layers.{b}.w"], w.starts[b, b][f"layers.{b}.w"] + w.deltas[b, b][f"layers.{b}.w"])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_blocks_not_drawn_stay_pretrained(share: float) -> None:
    w = quadratic(clients=3, layers=4, sched="cyclic", meth=cybgd(download=share), turns=11).run()
    pretrained, stale = w.iterates[0], 0
    for (_, turn), start in w.starts.items():
        server = w.iterates[turn]
        known = [k for k in server if not torch.equal(server[k], pretrained[k])]
        fresh = [k for k in known if torch.equal(start[k], server[k])]
        assert len(fresh) == math.ceil(share * len(known))
        assert all(torch.equal(start[k], pretrained[k]) for k in start if k not in fresh)
        stale += len(known) - len(fresh)
    assert bool(stale) == (share < 1)


def test_a_block_that_was_not_drawn_is_replaced_by_what_came_of_the_pretrained_one() -> None:
    m = method.build(cybgd(download=0.5))
    start = {f"layers.{i}.w": torch.full((2,), float(i)) for i in range(2)}
    state = m.init(start, 3)
    for version in range(2):  # both blocks are updated once
        delta = {f"layers.{version}.w": torch.full((2,), 10.0)}
        state = m.step(state, [Update(version, 0, version, version, delta)], [1.0])
    drawn = m.ship(state, Client(0), 2, 0, {})
    assert len(drawn) == 1
    (got,) = drawn
    (missed,) = set(start) - {got}
    for name, base in ((got, state["params"][got]), (missed, start[missed])):
        after = m.step(state, [Update(2, 0, 2, 2, {name: torch.ones(2)})], [1.0])
        assert torch.equal(after["params"][name], base + 1)


@pytest.mark.parametrize(("order", "blocks"), [("ascending", [0, 1, 2, 0]), ("descending", [2, 1, 0, 2])])
def test_orders(order: str, blocks: list[int]) -> None:
    m = method.build(cybgd(order=order))
    assert [m.block_of(t, 3, 0) for t in range(4)] == blocks  # type: ignore[attr-defined]


def test_bytes_down_are_the_drawn_blocks_only() -> None:
    w = quadratic(clients=2, layers=4, size=100, sched="cyclic", meth=cybgd(download=0.5), turns=9)
    w.run()
    block = 800  # bytes
    known = [min(t, 4) for t in range(9)]
    expected = sum(math.ceil(0.5 * u) for u in known) * block
    assert expected < w.simulation.ledger.bytes["down"] < expected + 9 * 400
    assert 9 * block < w.simulation.ledger.bytes["up"] < 9 * (block + 400)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(RecipeError, match="server_optimizer"):
        method.build(cybgd(server_optimizer="adam", download=0.5))
    with pytest.raises(RecipeError, match="additive.*replaces blocks"):
        quadratic(sched={"name": "overlap", "staleness": 1}, meth=cybgd())
    with pytest.raises(RecipeError, match=r"method\.blocks: 9 blocks for 4 layers"):
        method.build({"name": "fedcybgd", "blocks": 9}).cut([f"layers.{i}.w" for i in range(4)])  # type: ignore[attr-defined]
