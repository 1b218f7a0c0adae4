"""A client's own updates in flight (the core's law 6) against the identities of ParaBlock, in float64.

The reference below is the paper's additive algorithm written out for itself; it shares no code with the server.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import World, language, quadratic

from hocket.clock import Device
from hocket.errors import RecipeError
from hocket.methods import method
from hocket.methods.fedbcd import FedBCD
from hocket.tree import Tree, digest

ATOL = 1e-12


def overlap(s: int) -> dict:
    return {"name": "overlap", "staleness": s}


def apart(a: Tree, b: Tree) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def parablock(world: World, turns: int, staleness: int, lr: float, steps: int, weights: list[int]) -> list[Tree]:
    """Algorithm 1 of the paper, additive form: every client keeps its own full model; no server version is consulted."""
    model = world.trainer.view.model
    n, p = len(weights), [w / sum(weights) for w in weights]
    names = sorted(world.iterates[0])
    bcd = FedBCD(layers_per_block=1)
    blocks = bcd.cut(names)
    mine = [{k: v.clone() for k, v in world.iterates[0].items()} for _ in range(n)]
    server = [{k: v.clone() for k, v in world.iterates[0].items()}]
    sent: list[list[Tree]] = []
    mean: list[Tree] = []
    for t in range(turns):
        block = blocks[bcd.block_of(t, len(blocks), 7)]
        deltas = []
        for i in range(n):
            x = {k: v.clone().requires_grad_(k in block) for k, v in mine[i].items()}
            for _ in range(steps):
                loss = torch.func.functional_call(model, x, (i,))
                for k, g in zip(block, torch.autograd.grad(loss, [x[k] for k in block]), strict=True):
                    x[k] = (x[k].detach() - lr * g).requires_grad_(True)
            deltas.append({k: (x[k] - mine[i][k]).detach() for k in block})
        sent.append(deltas)
        mean.append({k: sum(pi * d[k] for pi, d in zip(p, deltas, strict=True)) for k in block})
        for i in range(n):
            for k in block:
                mine[i][k] = mine[i][k] + deltas[i][k]
            if t >= staleness:
                for k in mean[t - staleness]:
                    mine[i][k] = mine[i][k] + mean[t - staleness][k] - sent[t - staleness][i][k]
    for d in mean:
        server.append({k: v + d[k] if k in d else v for k, v in server[-1].items()})
    return server


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 4, 2]])
def test_blocks_under_overlap_are_parablock(staleness: int, weights: list[int]) -> None:
    world = quadratic(sched=overlap(staleness), weights=weights, turns=10).run()
    reference = parablock(world, 10, staleness, 0.1, 3, weights)
    assert len(world.iterates) == 11
    for ours, theirs in zip(world.iterates, reference, strict=True):
        assert apart(ours, theirs) < ATOL
    assert (
        apart(world.final, quadratic(weights=weights, turns=10).run().final) > 1e-3
    )  # and it is not the synchronous run


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize("meth", [{"name": "fedbcd", "layers_per_block": 1}, "fedavg"])
def test_mean_of_clients_is_the_server_completed(staleness: int, meth: object) -> None:
    weights = [3, 1, 2]
    world = quadratic(sched=overlap(staleness), weights=weights, meth=meth).run()
    for t in range(8):
        mean = {k: sum(w * world.starts[i, t][k] for i, w in enumerate(weights)) / 6 for k in world.iterates[t]}
        assert apart(mean, world.iterates[t]) < ATOL


def test_mean_of_clients_holds_for_overlapped_lora() -> None:
    world = language(sched=overlap(1), meth={"name": "fedit", "rank": 2}, turns=4).run()
    examples = 4.0  # two steps of two rows each, for everybody
    for t in range(4):
        mean = {k: sum(world.starts[i, t][k] * examples for i in range(3)) / (3 * examples) for k in world.iterates[t]}
        assert apart(mean, world.iterates[t]) < 1e-6
    assert (
        apart(world.starts[0, 2], world.iterates[2]) > 1e-5
    )  # single clients are ahead of the server, each its own way


def test_clients_differ_only_in_blocks_in_flight() -> None:
    world = quadratic(sched=overlap(1)).run()
    for t in range(1, 8):
        moved = set(world.deltas[0, t - 1])
        for i in (1, 2):
            differs = {
                k for k in world.starts[0, t] if not torch.allclose(world.starts[0, t][k], world.starts[i, t][k])
            }
            assert differs == moved


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_one_client_is_bitwise_the_synchronous_run(staleness: int) -> None:
    for meth in ({"name": "fedbcd", "order": "replacement", "layers_per_block": 1}, "fedavg"):
        sync, late = (quadratic(clients=1, sched=s, meth=meth).run() for s in ("sync", overlap(staleness)))
        assert digest(sync.final) == digest(late.final)
        assert late.simulation.clock.now < sync.simulation.clock.now
    for meth in ("fedbcd", {"name": "fedit", "rank": 2}, "ffa-lora", "fedavg"):
        sync, late = (language(clients=1, sched=s, meth=meth).run() for s in ("sync", overlap(staleness)))
        assert digest(sync.final) == digest(late.final)


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 4])
def test_common_hessian_theorem(staleness: int, steps: int) -> None:
    """Quadratics that differ only in their linear term: overlap costs nothing, for any number of clients and steps."""
    sync = quadratic(clients=4, common=True, steps=steps, turns=10).run()
    late = quadratic(clients=4, common=True, steps=steps, turns=10, sched=overlap(staleness)).run()
    for a, b in zip(sync.iterates, late.iterates, strict=True):
        assert apart(a, b) < ATOL
    assert apart(sync.iterates[0], sync.final) > 0.1


def test_one_block_is_delayed_averaging() -> None:
    world = quadratic(layers=1, size=6, sched=overlap(1)).run()
    for t in range(7):
        for i in range(3):
            expected = {k: world.iterates[t][k] + world.deltas[i, t][k] for k in world.iterates[t]}
            assert apart(world.starts[i, t + 1], expected) < ATOL


def test_floor_is_proportional_to_the_squared_rate() -> None:
    """Different Hessians: the synchronous run converges, the overlapped one stalls at a floor ~ lr^2, higher for s = 2."""

    def floor(lr: float, sched: object, turns: float) -> float:
        meth = {"name": "fedbcd", "layers_per_block": 1, "order": "sequential"}
        world = quadratic(layers=2, turns=int(turns), lr=lr, steps=1, sched=sched, meth=meth)
        world.simulation.run()
        return world.trainer.view.model.gap(world.final, [1, 1, 1])

    assert floor(0.4, "sync", 150) < 1e-20
    one = {lr: floor(lr, overlap(1), 25 / lr) / lr**2 for lr in (0.08, 0.04)}
    assert one[0.04] > 1e-3
    assert one[0.08] == pytest.approx(one[0.04], rel=0.15)
    assert 1.1 < floor(0.08, overlap(2), 300) / 0.08**2 / one[0.08] < 4


def test_server_rate_scales_own_updates() -> None:
    world = quadratic(layers=1, size=6, sched=overlap(1), meth={"name": "fedavg", "server_lr": 0.5}).run()
    for t in range(7):
        expected = {k: world.iterates[t][k] + 0.5 * world.deltas[1, t][k] for k in world.iterates[t]}
        assert apart(world.starts[1, t + 1], expected) < ATOL


def test_lossy_uplink_keeps_the_identity() -> None:
    """A client adds its own update as the server will decode it, so the mean identity survives quantization."""
    world = quadratic(sched=overlap(1), up="int8").run()
    for t in range(8):
        mean = {k: sum(world.starts[i, t][k] for i in range(3)) / 3 for k in world.iterates[t]}
        assert apart(mean, world.iterates[t]) < ATOL


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "adam", "yogi"])
def test_overlap_refuses_a_step_that_does_not_add(optimizer: str) -> None:
    with pytest.raises(RecipeError, match="additive"):
        quadratic(sched=overlap(1), meth={"name": "fedavg", "server_optimizer": optimizer})


def test_every_registered_method_is_additive_by_default() -> None:
    assert all(method.get(name)().additive for name in ("fedavg", "fedit", "ffa-lora", "fedbcd"))


def test_a_turn_asked_for_again_starts_without_the_update_that_was_lost() -> None:
    """The server gave the first attempt up, so it must not be in the second one's start; turns before it stay."""
    from worlds import job

    from hocket.client import work

    w = quadratic(sched=overlap(1), meth="fedavg")
    setting, view = w.simulation.executor.setting, w.final  # type: ignore[attr-defined]
    first = work(setting, job(version=3, turn=3, visit=0), view, {})
    assert any(k.startswith("own/3/") for k in first.memory)
    again = work(setting, job(id=1, version=3, turn=3, visit=1), view, first.memory)
    assert again.blob == first.blob
    ahead = work(setting, job(id=2, version=3, turn=4, visit=2, own=(3,)), view, first.memory)
    assert ahead.blob != first.blob
    refused = work(setting, job(id=3, version=3, turn=4, visit=2), view, first.memory)
    assert refused.blob == first.blob  # the server does not count on turn 3 any more
    assert not any(k.startswith("own/3/") for k in refused.memory)
    kept = work(setting, job(id=4, version=3, turn=3, visit=3), view, ahead.memory)
    assert any(k.startswith("own/4/") for k in kept.memory)  # turn 4 is still on its way


@pytest.mark.parametrize("seed", range(4))
def test_every_start_is_the_server_plus_what_it_counts_on(seed: int) -> None:
    """With losses, replacements and unequal clients: recompute every start from the record of deltas."""
    devices = [Device(step_seconds=x, down_mb_s=2e-3, up_mb_s=1e-3) for x in (1.0, 1.3, 3.0)]
    w = quadratic(sched={"name": "overlap", "staleness": 1, "minimum": 3}, turns=30, loss=0.3, devices=devices, meth="fedavg")
    w.simulation.server.seed = seed
    asked, fit, send = {}, w.trainer.fit, w.simulation._send

    def sending(j: Any) -> None:
        asked[j.client, j.visit] = (j, dict(w.simulation.server.state["params"]))
        send(j)

    deltas: dict[tuple[int, int], Tree] = {}
    checked = 0

    def fitting(local: Any, start: Tree, only: Any, prox: float, *more: Any) -> Tree:
        nonlocal checked
        j, view = asked[local.client, local.visit]
        expected = dict(view)
        for t in j.own:
            if (local.client, t) in deltas:
                expected = {k: expected[k] + deltas[local.client, t][k] for k in expected}
        assert apart(start, expected) < ATOL
        checked += 1
        deltas[local.client, local.turn] = delta = fit(local, start, only, prox, *more)
        return delta

    w.simulation._send, w.trainer.fit = sending, fitting  # type: ignore[method-assign]
    w.simulation.run()
    assert checked > 60
