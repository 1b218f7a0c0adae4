"""FedKSeed: scalars stand for models, exactly; what they cannot do; what is dropped, shipped, kept and refused."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from worlds import language, quadratic

from hocket import draws
from hocket.codecs import codec
from hocket.combine import Lazy
from hocket.directions import PIECE, Directions, pieces
from hocket.errors import RecipeError, RunError
from hocket.methods import Client, Local, Update, method
from hocket.methods.fedkseed import CHANCES, OWN, SCALARS, SEED, STEPS, SUMS, Walked
from hocket.models.inference import inference
from hocket.models.meter import Meter
from hocket.models.views import View
from hocket.recipe import parse
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, digest, key, nbytes

SGD = {"optimizer": "sgd", "clip": None}


def spec(**more: Any) -> dict[str, Any]:
    return {"name": "fedkseed", "directions": 32, "eps": 1e-3, **more}


def theta(params: Any) -> Tree:
    return {k: params[k] for k in params if k not in OWN}


def flat(params: Any) -> torch.Tensor:
    return torch.cat([params[k].reshape(-1).double() for k in sorted(theta(params))])


def noting_ends(trainer: Any) -> dict[tuple[int, int], Tree]:
    """The tensors that each walk leaves in the model once it has taken the last step back: the client's own model."""
    ends: dict[tuple[int, int], Tree] = {}
    walk = trainer.walk

    def noting(local: Local, start: Tree, only: Any, beside: int) -> Any:
        for point in walk(local, start, only, beside):
            ends[local.client, local.turn] = point.live
            yield point

    trainer.walk = noting
    return ends


def update(i: int, payload: Tree, weight: float = 1.0) -> Update:
    return Update(i, i, 0, 0, payload, weight)


def plain_client(m: Any, start: Tree, sent: Tree) -> Tree:
    """The client's model after its steps, by the paper's line theta <- theta - eta g z, one whole vector at a time."""
    walked = Walked(start, sent)
    out = {k: v.clone() for k, v in theta(start).items()}
    for k, move in zip(walked.k.tolist(), walked.moves.tolist(), strict=True):
        for name in sorted(out, reverse=True):
            out[name] -= move * draws.normal(out[name].shape, key(int(start[SEED]), k), name).double()
    return out


# --- directions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 15, 16, 17, PIECE - 1, PIECE + 16, PIECE + 17, 3 * PIECE + 5, 4 * PIECE])
def test_pieces_are_the_whole_draw(n: int) -> None:
    want, out = draws.normal((n,), 3, "w"), torch.full((n,), math.nan)
    for at, z in pieces(n, 3, "w"):
        out[at] = z
    assert torch.equal(out, want)


def test_a_sum_of_directions_is_that_of_whole_draws_whatever_the_order_the_threads_and_what_is_kept() -> None:
    shapes = {"a": (3, PIECE), "b": (5,), "c": (700, 41), "d": (1,)}
    terms = [(2, 0.5), (7, -1.25), (2, 1.0)]
    want = {name: torch.ones(s) for name, s in shapes.items()}
    for name, x in want.items():
        for k, c in terms:
            x.add_(draws.normal(x.shape, key(9, k), name), alpha=c)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for room in (0, 5 + 700 * 41, 10**9):
                for order in (sorted(shapes), sorted(shapes, reverse=True)):
                    got = {name: torch.ones(shapes[name]) for name in order}
                    z = Directions(9, room)
                    for term in terms:
                        z.add(got, [term])
                    assert all(torch.equal(got[name], want[name]) for name in shapes)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_contiguous_gets_the_same_numbers() -> None:
    x, y = torch.zeros(50, 7), torch.zeros(7, 50).T
    Directions(1).add({"w": x}, [(0, 2.0)])
    Directions(1).add({"w": y}, [(0, 2.0)])
    assert torch.equal(x, y)
    assert float(x.std()) == pytest.approx(2, rel=0.2)


# --- the paper's identities, in float64 ---------------------------------------------------------------------------
@pytest.mark.parametrize("keep", ["none", "largest", "model"])
def test_the_rebuild_is_the_weighted_mean_of_the_clients_models(keep: str) -> None:
    """Over five rounds, from the uploads as they are in packets, with two of three clients a round."""
    w = quadratic(
        meth=spec(keep=keep), lr=0.01, steps=4, turns=5, weights=[1, 2, 5], sched={"name": "sync", "cohort": 2}
    )
    server, means = w.simulation.server, []
    step = server.method.step

    def noting(state: Any, updates: Any, weights: Any, shares: Any = None) -> Any:
        ends = [plain_client(server.method, state["params"], u.payload._payload) for u in updates]
        total = sum(weights)
        means.append(sum(flat(e) * (p / total) for e, p in zip(ends, weights, strict=True)))
        return step(state, updates, weights, shares)

    accept = server.method.accept

    def keeping(then: Tree, payload: Any) -> Any:
        out = accept(then, payload)
        out._payload = dict(payload)
        return out

    object.__setattr__(server.method, "step", noting)
    object.__setattr__(server.method, "accept", keeping)
    object.__setattr__(server.method, "at", lambda rate: server.method)
    w.run()
    assert len(means) == 5
    for mean, params in zip(means, w.iterates[1:], strict=True):
        assert float((flat(params) - mean).abs().max()) < 1e-14


def test_the_walk_ends_where_the_scalars_say() -> None:
    """The trainer's own tensors, walked there and back in place, against start - eta sum g z."""
    w = quadratic(meth=spec(), lr=0.01, steps=30, clients=1, turns=1)
    ends = noting_ends(w.trainer)
    m, state = w.simulation.server.method, w.simulation.server.state
    sent = m.train(Local(0, state["params"], {}, 0, 1, 0, 7, w.trainer), state["params"])
    at, k, g = ends[0, 0], int(sent[STEPS][-3]), float(sent[SCALARS][-1])
    eta = float(torch.tensor(0.01))  # as it travels
    Directions(int(state["params"][SEED])).add(at, [(k, m.eps - eta * g)])  # the last step is left where it looked
    assert float((flat(at) - flat(plain_client(m, state["params"], sent))).abs().max()) < 1e-14
    assert len(sent[SCALARS]) == 30


def test_catching_up_with_versions_at_once_is_going_through_them() -> None:
    w = quadratic(meth=spec(), lr=0.01, steps=4, turns=5).run()
    m, versions = w.simulation.server.method, w.iterates
    for since in range(5):
        state = w.simulation.server.state
        sent = m.ship(state, Client(0), 5, since, dict.fromkeys([SUMS, *theta(versions[5])], 5))
        assert sent.keys() == {SUMS}
        held = m.load(versions[since], sent)
        assert float((flat(held) - flat(versions[5])).abs().max()) < 1e-14
    again = m.load(versions[4], {SUMS: versions[5][SUMS]})
    assert digest(again) == digest(versions[5])  # consecutive versions: the same bits


@pytest.mark.parametrize("eps", [1e-3, 1e-1, 1.0])
def test_on_a_quadratic_the_central_difference_is_the_derivative(eps: float) -> None:
    w = quadratic(clients=1, meth=spec(eps=eps), lr=1e-30, steps=20)
    m, params = w.simulation.server.method, w.simulation.server.state["params"]
    sent = m.train(Local(0, params, {}, 0, 1, 0, 7, w.trainer), params)
    model = w.trainer.view.model
    grad = model.H[0] @ (torch.zeros(12, dtype=torch.float64) - model.c[0])
    for k, g in zip(Walked(params, sent).k.tolist(), sent[SCALARS].tolist(), strict=True):
        z = torch.cat([draws.normal((3,), key(int(params[SEED]), k), f"layers.{i}.w") for i in range(4)]).double()
        assert g == pytest.approx(float(grad @ z), rel=1e-9, abs=1e-9)


def test_a_step_is_d_plus_two_times_as_long_as_the_gradient() -> None:
    """E |g z|^2 = (d + 2) |grad f|^2: why the rate must shrink like 1/d."""
    d, n = 200, 20_000
    grad = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = draws.normal((n, d), 5, "z").double()
    mean = float(((z @ grad) ** 2 * (z**2).sum(1)).mean() / (grad @ grad))
    assert mean == pytest.approx(d + 2, rel=0.04)


def test_weights_never_leave_the_span_of_k_vectors() -> None:
    """The limit of the method: with K = 4 of 12 dimensions the model reaches the best point of a plane, and stays."""
    w = quadratic(meth=spec(directions=4), lr=0.02, steps=20, turns=30).run()
    seed = int(w.iterates[0][SEED])
    span = torch.stack(
        [
            torch.cat([draws.normal((3,), key(seed, k), f"layers.{i}.w") for i in range(4)]).double()
            for k in range(4)
        ],
        1,
    )
    basis = torch.linalg.qr(span).Q
    for params in w.iterates:
        moved = flat(params) - flat(w.iterates[0])
        assert float((moved - basis @ (basis.T @ moved)).norm()) < 1e-13 * (1 + float(moved.norm()))
    gap = w.trainer.view.model.gap(theta(w.iterates[-1]), [1, 1, 1])
    wide = quadratic(meth=spec(directions=4096), lr=0.02, steps=20, turns=30).run()
    assert gap > 3 * wide.trainer.view.model.gap(theta(wide.iterates[-1]), [1, 1, 1])


def test_mean_and_rate_are_the_servers() -> None:
    """server_lr w_i / sum s_j of each, as any update's."""
    m = method.build(spec(server_lr=0.5))
    params = {"w": torch.randn(40, dtype=torch.float64)}
    state = m.init(params, 3)
    sent = [upload(m, [1, 5], [2.0, -1.0]), upload(m, [5], [4.0])]
    after = m.step(state, [update(i, s) for i, s in enumerate(sent)], [2.0, -1.0], [3.0, 1.0])
    z = lambda k: draws.normal((40,), key(int(state["params"][SEED]), k), "w").double()
    moved = 0.5 * (2 * (2 * z(1) - z(5)) - 1 * 4 * z(5)) / 4 * float(torch.tensor(0.1))
    assert torch.allclose(after["params"]["w"], params["w"] - moved, atol=1e-15, rtol=0)
    dense = m.step(state, [update(i, dict(m.accept(state["params"], s))) for i, s in enumerate(sent)], [2.0, -1.0], [3.0, 1.0])
    assert torch.allclose(dense["params"]["w"], after["params"]["w"], atol=1e-14, rtol=0)
    assert (dense["dense"], after["dense"]) == (1, 0)


def upload(m: Any, k: list[int], g: list[float], eta: float = 0.1, dtype: Any = torch.float64) -> Tree:
    rate = torch.tensor([eta]).view(torch.int16)
    return {STEPS: torch.cat([torch.tensor(k, dtype=torch.int16), rate]), SCALARS: torch.tensor(g, dtype=dtype)}


# --- dropped steps -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_dropped_steps_are_on_neither_side(bad: float) -> None:
    """A loss that is not finite, or a |g| beyond the clip, leaves no scalar and, but for rounding, no trace."""
    def run(spoil: bool) -> tuple[Tree, Tree, Local]:
        w = quadratic(clients=1, meth=spec(clip=1e5), lr=0.01, steps=6)
        walk, params = w.trainer.walk, w.simulation.server.state["params"]
        ends = noting_ends(w.trainer)

        def spoiled(local: Local, start: Tree, only: Any, beside: int) -> Any:
            for i, point in enumerate(walk(local, start, only, beside)):
                ends[0, 0] = point.live
                real = point.loss
                if spoil and i == 2:
                    point.loss = lambda real=real: bad * real()
                yield point

        w.trainer.walk = spoiled
        local = Local(0, params, {}, 0, 1, 0, 7, w.trainer)
        return w.simulation.server.method.train(local, params), ends[0, 0], local

    clean, _, fine = run(False)
    sent, _, local = run(True)
    assert (local.metrics["skipped"], local.metrics["steps"], fine.metrics["skipped"]) == (1, 5, 0)
    assert math.isfinite(local.metrics["loss"])
    assert local.metrics["examples"] == fine.metrics["examples"]  # it weighs what it would have
    assert len(sent[SCALARS]) == 5
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(sent[STEPS][:-2], clean[STEPS][:-2][kept])
    assert torch.allclose(sent[SCALARS][:2], clean[SCALARS][:2])
    # the client's weights too are as without that step: its later scalars are those of a walk without it
    w = quadratic(clients=1, meth=spec(), lr=0.01, steps=1)
    params, m = w.simulation.server.state["params"], w.simulation.server.method
    at = m._moved(params, Walked(params, clean).k[:2], -Walked(params, clean).moves[:2])
    k = int(sent[STEPS][2])
    probe = []
    for side in (1, -1):
        here = {n: x.clone() for n, x in at.items()}
        Directions(int(params[SEED])).add(here, [(k, side * m.eps)])
        probe.append(float(w.trainer.loss(here, {"labels": torch.tensor([0])})))
    assert float(sent[SCALARS][2]) == pytest.approx((probe[0] - probe[1]) / (2 * m.eps), rel=1e-8)


def test_a_client_that_dropped_every_step_moves_nothing() -> None:
    m = method.build(spec())
    state = m.init({"w": torch.randn(40, dtype=torch.float64)}, 3)
    empty = upload(m, [], [])
    assert m.check(state, update(0, empty)) is None
    for name in codec.names():
        c = codec.build({"name": name, **({"rank": 2} if name in ("svd", "pca", "qrcp", "cur") else {})}) if name not in (
            "chain", "per_tensor", "feedback") else codec.build("raw")
        assert len(c.decode(c.encode(empty))[SCALARS]) == 0
    assert m.step(state, [update(0, empty)], [1.0])["params"]["w"] is state["params"]["w"]


@pytest.mark.parametrize(
    ("eta", "g", "says"), [(0.1, 2.0, "clip = 1 should have dropped"), (3e38, 0.9, "no finite length"), (0.1, 1.0, None)]
)
def test_a_client_cannot_send_what_it_should_have_dropped(eta: float, g: float, says: str | None) -> None:
    m = method.build(spec(clip=1.0))
    state = m.init({"w": torch.randn(40, dtype=torch.float32)}, 3)
    k = torch.tensor([0, 1], dtype=torch.int16)
    rate = torch.tensor([eta]).view(torch.int16)
    sent = {STEPS: torch.cat([k, rate]), SCALARS: torch.tensor([g, g])}
    found = m.check(state, update(0, sent))
    assert (found is None) if says is None else says in str(found)


# --- what travels ---------------------------------------------------------------------------------------------------
def test_a_round_is_less_than_18_kilobytes() -> None:
    """Real packets, K = 4096, 200 steps: 4 K + 6 a step + 4, and headers."""
    w = language(meth={"name": "fedkseed"}, steps=200, turns=3, training={**SGD, "lr": 1e-6}, layers=1, clients=1)
    w.simulation.run()
    m, state = w.simulation.server.method, w.simulation.server.state
    sent = upload(m, [0] * 200, [1.0] * 200, dtype=torch.float32)
    assert nbytes(sent) == 200 * 6 + 4
    down = codec.build("raw").size(m.ship(state, Client(0), 3, 2, w.simulation.server.changed))
    up = codec.build("raw").size(sent)
    total = w.simulation.ledger.bytes
    assert total["up"] == 3 * up
    assert total["down"] == 2 * down + codec.build("raw").size({})  # clients hold the start model
    assert up + down < 18_000


def test_clients_without_the_start_model_get_it_once() -> None:
    w = language(meth=spec(), steps=2, turns=3, training={**SGD, "lr": 1e-6}, layers=1, clients=2, preloaded=False)
    size = nbytes(w.simulation.server.state["params"])
    w.simulation.run()
    assert 2 * size < w.simulation.ledger.bytes["down"] < 2 * size + 2 * 2 * (32 * 4 + 400) + 2 * 5000


def test_pro_sends_probabilities_too() -> None:
    make = lambda name: language(
        meth={"name": name, "directions": 512}, steps=2, turns=3, training={**SGD, "lr": 1e-6}, layers=1, clients=1
    )
    plain, pro = make("fedkseed"), make("fedkseed-pro")
    plain.simulation.run(), pro.simulation.run()
    more = pro.simulation.ledger.bytes["down"] - plain.simulation.ledger.bytes["down"]
    assert 2 * 512 * 4 <= more <= 2 * (512 * 4 + 100)
    assert pro.simulation.ledger.bytes["up"] == plain.simulation.ledger.bytes["up"]


def test_after_a_dense_step_only_tensors_will_do() -> None:
    m = method.build(spec())
    state = m.init({"w": torch.randn(40), "v": torch.randn(3)}, 3)
    send = lambda i: update(i, upload(m, [1, 2], [1.0, 2.0], dtype=torch.float32))
    one = m.step(state, [send(0)], [1.0])
    mixed = update(1, Lazy(["w", "v"], lambda k: torch.ones_like(state["params"][k])))
    two = m.step(one, [mixed, send(2)], [1.0, 1.0])  # one dense tree among them makes the step dense
    three = m.step(two, [send(3)], [1.0])
    changed = {"w": 3, "v": 3, SUMS: 3}
    assert m.ship(three, Client(0), 3, 2, changed).keys() == {SUMS}
    for since in (-1, 0, 1):
        sent = m.ship(three, Client(0), 3, since, changed)
        assert sent.keys() >= {"w", "v", SUMS}
        held = m.load([{}, state["params"], one["params"]][since + 1], sent)
        assert digest(held | {SEED: state["params"][SEED]}) == digest(three["params"])
    assert digest(m.load(two["params"], {SUMS: three["params"][SUMS]})) == digest(three["params"])


def test_a_server_optimizer_steps_on_the_dense_difference() -> None:
    """FedAdam on the sum that the scalars stand for; the model then travels as tensors."""
    m = method.build(spec(server_optimizer="adam", server_lr=0.1))
    by_hand = method.build({"name": "fedavg", "server_optimizer": "adam", "server_lr": 0.1})
    params = {"w": torch.randn(40, dtype=torch.float64)}
    state, sent = m.init(params, 3), upload(m, [1, 2], [1.0, 2.0])
    want = by_hand.step(by_hand.init(params, 3), [update(0, dict(m.accept(state["params"], sent)))], [1.0])
    after = m.step(state, [update(0, sent)], [1.0])
    assert torch.equal(after["params"]["w"], want["params"]["w"])
    assert set(m.ship(after, Client(0), 1, 0, {"w": 1})) == {"w"}
    assert m.model(after["params"]).keys() == {"w"}


def test_uploads_keep_no_tensors_of_the_version_they_met() -> None:
    m = method.build(spec())
    state = m.init({"w": torch.randn(40)}, 3)
    held, w = Walked(state["params"], upload(m, [1], [1.0])), weakref.ref(state["params"]["w"])
    del state
    gc.collect()
    assert w() is None
    assert list(held) == ["w"]
    assert torch.equal(held["w"], held["w"])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"w": torch.ones(40)}, "unknown tensor 'w'"),
        ({STEPS: torch.zeros(2, dtype=torch.int16)}, "needs tensors"),
        ({STEPS: torch.zeros(4, dtype=torch.int64), SCALARS: torch.ones(2)}, f"'{STEPS}' is no vector of torch.int16"),
        ({STEPS: torch.zeros(2, 2, dtype=torch.int16), SCALARS: torch.ones(2)}, f"'{STEPS}' is no vector"),
        ({STEPS: torch.zeros(1, dtype=torch.int16), SCALARS: torch.ones(0)}, f"'{SCALARS}' has shape"),
        ({STEPS: torch.zeros(5, dtype=torch.int16), SCALARS: torch.ones(2)}, f"'{SCALARS}' has shape (2,)"),
        ({STEPS: torch.zeros(4, dtype=torch.int16), SCALARS: torch.ones(2).double()}, f"'{SCALARS}' has shape"),
        ({STEPS: torch.zeros(3, dtype=torch.int16), SCALARS: torch.tensor([math.nan])}, f"'{SCALARS}' holds values"),
        ("index 32", f"'{STEPS}' holds an index that is not below 32"),
        ("index -1", f"'{STEPS}' holds an index"),
        ("eta inf", f"'{STEPS}' holds the rate inf"),
        ("eta nan", f"'{STEPS}' holds the rate nan"),
    ],
)  # fmt: skip
def test_unusable_uploads_are_refused_by_name(payload: Any, reason: str) -> None:
    m = method.build(spec())
    state = m.init({"w": torch.randn(40)}, 3)
    if isinstance(payload, str):
        what, value = payload.split()
        payload = (
            upload(m, [int(value)], [1.0], dtype=torch.float32)
            if what == "index"
            else upload(m, [1], [1.0], float(value), dtype=torch.float32)
        )
    assert reason in str(m.check(state, update(0, payload)))


@pytest.mark.parametrize("name", ["half", "int8", "int4", "sign", "topk"])
def test_under_lossy_codecs_indices_and_the_rate_survive(name: str) -> None:
    m = method.build(spec())
    sent = upload(m, list(range(32)), torch.linspace(-3, 3, 32).tolist(), 3e-7, torch.float32)
    c = codec.build({"name": name} | ({"share": 0.5} if name == "topk" else {}))
    got = c.decode(c.encode(sent))
    assert torch.equal(got[STEPS], sent[STEPS])
    assert m.check(m.init({"w": torch.randn(4)}, 3), update(0, got)) is None


@pytest.mark.parametrize("down", ["half", "int8", {"name": "topk", "share": 0.2}, {"name": "svd", "rank": 2}])
def test_under_a_lossy_download_models_follow_the_sums_that_arrive(down: Any) -> None:
    """theta of a client is theta_0 - sum A z with A as it decoded it: what is lost is not lost again in the next."""
    w = language(meth=spec(), down=down, turns=5, training={**SGD, "lr": 1e-4}, layers=1, clients=2)
    views: list[Tree] = []
    link = w.simulation.downlink
    start, m, send = dict(w.simulation.server.state["params"]), w.simulation.server.method, link.send

    def noting(job: Any, server: Any) -> Any:
        out = send(job, server)
        view = out.view if out.view is not None else dict(link.spool.get(out.key))
        views.append({k: view[k] for k in view})
        return out

    link.send = noting
    w.simulation.run()
    for view in views:
        want = m.load(start, {SUMS: view[SUMS]})
        assert float((flat(view) - flat(want)).abs().max()) < 1e-6


# --- a recipe, a client, a machine -----------------------------------------------------------------------------------
def recipe(**training: Any) -> Any:
    return parse({
        "model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}, "method": spec(),
        "training": {"optimizer": "sgd", **training},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ({"optimizer": "adamw"}, "optimizer"), ({"momentum": 0.9}, "momentum"), ({"weight_decay": 0.1}, "weight_decay"),
        ({"schedule": "linear"}, "schedule"),
    ],
)  # fmt: skip
def test_training_that_breaks_the_rebuild_is_refused(training: Any, field: str) -> None:
    recipe()
    with pytest.raises(RecipeError, match=rf"training\.{field}: .*use"):
        recipe(**training)


def test_a_proximal_term_is_refused() -> None:
    with pytest.raises(RecipeError, match="mu: "):
        method.build(spec(mu=0.1))


@pytest.mark.parametrize(("arch", "name"), [("llama", "fedkseed"), ("gpt2", "fedkseed-pro")])
def test_the_loss_falls(name: str, arch: str) -> None:
    w = language(arch, meth={"name": name, "directions": 512}, steps=15, turns=5, layers=1, training={**SGD, "lr": 1e-2})
    losses: list[float] = []
    step = w.simulation.server.step

    def noting() -> Any:
        if record := step():
            losses.append(record["loss"])
        return record

    w.simulation.server.step = noting  # type: ignore[method-assign]
    w.simulation.run()
    assert losses[-1] < losses[0] - 0.1


def test_clients_differ_and_so_do_their_visits() -> None:
    w = quadratic(meth=spec(), lr=0.01, steps=8)
    m, params = w.simulation.server.method, w.simulation.server.state["params"]
    ks = {
        (c, v): tuple(m.train(Local(c, params, {}, 0, 1, v, 7, w.trainer), params)[STEPS].tolist())
        for c in range(2) for v in range(2)
    }  # fmt: skip
    assert len(set(ks.values())) == 4


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_both_losses_in_one_call_are_the_same(arch: str) -> None:
    sent = []
    for batched in (False, True):
        w = language(arch, meth=spec(batched=batched), steps=3, layers=1, training={**SGD, "lr": 1e-4})
        m, params = w.simulation.server.method, w.simulation.server.state["params"]
        sent.append(m.train(Local(0, params, {}, 0, 1, 0, 7, w.trainer), params))
    assert torch.equal(sent[0][STEPS], sent[1][STEPS])
    assert torch.allclose(sent[0][SCALARS], sent[1][SCALARS], atol=2e-2)  # fp32 losses, divided by 2 eps = 0.002


def test_a_model_that_cannot_be_batched_is_refused_with_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self) -> torch.Tensor:
            return self.w.sum() if float(self.w.sum()) > 0 else -self.w.sum()  # looks at values

    model, m = Odd(), method.build(spec(batched=True))
    view = View(model, dict(model.named_parameters()))
    config = Training.model_validate({"optimizer": "sgd", "lr": 0.1, "local_steps": 1})
    trainer = TorchTrainer(view, [[0]], lambda b: {"labels": torch.tensor(b)}, config, loss=lambda mod, b: (mod(), 1))
    params = m.init(view.start(), 0)["params"]
    with pytest.raises(RunError, match=r"method\.batched: .*Odd.*use false"):
        m.train(Local(0, params, {}, 0, 1, 0, 7, trainer), params)


def test_dropout_is_off_and_the_model_is_left_as_it_was() -> None:
    w = language("gpt2", meth=spec(), steps=2, layers=1, training={**SGD, "lr": 1e-4})
    for x in w.trainer.view.model.modules():
        if isinstance(x, nn.Dropout):
            x.p = 0.5
    w.trainer.view.model.train()
    m, params = w.simulation.server.method, w.simulation.server.state["params"]
    before = digest(theta(params))
    make = lambda: m.train(Local(0, params, {}, 0, 1, 0, 7, w.trainer), params)
    assert digest(make()) == digest(make())
    assert w.trainer.view.model.training
    assert digest(theta(params)) == before
    assert all(w.trainer.view.params[k].data_ptr() == params[k].data_ptr() for k in theta(params))
    assert not any(p.requires_grad for p in w.trainer.view.model.parameters())


def test_half_precision_models_walk_in_their_own_precision() -> None:
    from worlds import collate, tokens

    from hocket.models.tiny import tiny
    from hocket.models.views import make

    model, _ = tiny("llama", vocab=64, layers=1, width=8)
    model.to(torch.bfloat16)
    m = method.build(spec(eps=0.02))
    view = make(model, m, "causal", 7)
    config = Training.model_validate({"optimizer": "sgd", "lr": 1e-3, "local_steps": 5, "batch_size": 2})
    trainer = TorchTrainer(view, [tokens(0, 4)], collate, config)
    params = m.init(trainer.start(), 7)["params"]
    seen = []
    walk = trainer.walk

    def noting(*args: Any) -> Any:
        for point in walk(*args):
            seen.append({x.dtype for x in point.live.values()})
            yield point

    trainer.walk = noting  # type: ignore[method-assign]
    sent = m.train(Local(0, params, {}, 0, 1, 0, 7, trainer), params)
    assert seen == [{torch.bfloat16}] * 5
    assert torch.isfinite(sent[SCALARS]).all()
    after = m.step(m.init(trainer.start(), 7), [update(0, sent)], [1.0])["params"]
    assert {x.dtype for x in theta(after).values()} == {torch.float32}  # the server loses no small steps
    want = plain_client(m, params, sent)
    assert float((flat(after) - flat(want)).abs().max()) < 1e-6


@pytest.mark.parametrize(("keep", "extra"), [("none", 0), ("largest", 1)])
def test_a_step_holds_weights_activations_and_one_tensor(keep: str, extra: int) -> None:
    """Measured on every allocation of a step, against an inference pass."""
    w = language(meth=spec(keep=keep), steps=1, layers=2, width=64, training={**SGD, "lr": 1e-4, "measure_memory": True})
    m, params = w.simulation.server.method, w.simulation.server.state["params"]
    local = Local(0, params, {}, 0, 1, 0, 7, w.trainer)
    m.train(local, params)
    weights = nbytes(theta(params)) + nbytes(dict(w.trainer.view.model.named_buffers()))
    largest = max(x.numel() * 4 for x in theta(params).values())
    (batch,) = next(iter(w.trainer._batches(local)))
    meter = Meter(w.trainer.view.model, [], [], [])
    with meter, torch.no_grad():
        w.trainer._loss(w.trainer.view.model, batch)
    inference_peak = meter.parts["memory_peak"] - meter.parts["memory_parameters"]
    assert local.metrics["memory_peak"] <= weights + inference_peak + extra * largest + 4096
    assert local.metrics["memory_parameters"] == weights
    planned = inference(w.trainer.view.model, *batch["input_ids"].shape, "fp32")
    assert inference_peak <= planned <= 1.1 * inference_peak


def test_a_plan_has_the_bytes_of_the_run() -> None:
    from hocket.models.skeleton import skeleton
    from hocket.plan import plan

    for name in ("fedkseed", "fedkseed-pro"):
        r = parse({
            "model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}, "turns": 3,
            "method": {"name": name, "directions": 512}, "clients": {"count": 2},
            "training": {"optimizer": "sgd", "local_steps": 20},
        })  # fmt: skip
        found = plan(r)
        raw = codec.build("raw")
        m = method.build({"name": name, "directions": 512})
        sent = upload(m, [0] * 20, [0.0] * 20, dtype=torch.float32)
        sums = {k: torch.zeros(512) for k in ((SUMS, CHANCES) if name == "fedkseed-pro" else (SUMS,))}
        need = found["clients"][0]["memory"]
        assert need.gradients == need.trained == need.kept == need.logits == 0
        assert need.weights == 4 * found["total"]
        assert need.optimizer == 4 * max(p.numel() for p in skeleton("tiny:llama").parameters())
        assert need.activations > 0
        assert found["up"] == 3 * 2 * raw.size(sent)
        assert found["down"] == 2 * (2 * raw.size(sums) + raw.size({}))


# --- Pro ------------------------------------------------------------------------------------------------------------
def test_pro_draws_by_what_was_sent() -> None:
    m = method.build({"name": "fedkseed-pro", "directions": 4})
    state = m.init({"w": torch.randn(40, dtype=torch.float64)}, 3)
    assert torch.allclose(state["params"][CHANCES], torch.full((4,), 0.25))
    after = m.step(state, [update(0, upload(m, [1, 1, 2], [2.0, -4.0, 1e9]))], [1.0])
    a = torch.tensor([0.0, 6 / 3, 1000 / 2, 0.0]).double()  # with one 0 in every history
    want = torch.softmax(a / a.max(), 0).float()
    assert torch.allclose(after["params"][CHANCES], want)
    assert float(want.max() / want.min()) == pytest.approx(math.e)
    g = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([m._pick(after["params"], g) for _ in range(20_000)]), minlength=4) / 20_000
    assert torch.allclose(counts.float(), want, atol=0.015)
    spoiled = {CHANCES: torch.tensor([-0.1, 0.0, 0.0, 0.0])}
    assert 0 <= m._pick(spoiled, g) < 4


# --- a GPU ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_directions_are_the_same_on_a_gpu() -> None:
    for n in (5, 1000, PIECE + 3, 3_000_001):
        here, there = torch.zeros(n), torch.zeros(n, device="cuda")
        for room in (0, n):
            z = Directions(3, room)
            z.add({"w": here.zero_()}, [(1, 1.0)])
            z = Directions(3, room)
            z.add({"w": there.zero_()}, [(1, 1.0)])
            z.add({"w": there}, [(1, 0.0)])
            assert torch.equal(there.cpu(), here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_client_with_a_gpu_walks_the_same_way() -> None:
    from worlds import collate, tokens

    from hocket.models.tiny import tiny
    from hocket.models.views import make

    sent = []
    for device in ("cpu", "cuda"):
        model, _ = tiny("llama", vocab=64, layers=2, width=16)
        m = method.build(spec())
        view = make(model.to(device), m, "causal", 7)
        config = Training.model_validate({"optimizer": "sgd", "lr": 1e-4, "local_steps": 6, "batch_size": 2})
        trainer = TorchTrainer(view, [tokens(0, 4)], collate, config)
        params = m.init(trainer.start(), 7)["params"]
        sent.append(m.train(Local(0, params, {}, 0, 1, 0, 7, trainer), params))
    assert torch.equal(sent[0][STEPS], sent[1][STEPS])
    assert torch.allclose(sent[0][SCALARS], sent[1][SCALARS], atol=5e-2)
