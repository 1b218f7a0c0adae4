"""Ferret: coordinates in random vectors stand for updates, in the mean exactly, with an error of sqrt(d / K) each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import World, collate, language, quadratic, tokens

from hocket import draws
from hocket.codecs import codec
from hocket.errors import RecipeError
from hocket.methods import Client, Local, Update, method
from hocket.methods.ferret import COUNTS, GAMMA, SEED, Ferret, tiles
from hocket.methods.splits import apportion, blocks
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.plan import plan
from hocket.recipe import parse
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, digest, generator, nbytes, norm


def ferret(**fields: Any) -> Any:
    return method.build({"name": "ferret", **fields})


class Given:
    """A trainer that comes back with a given difference."""

    def __init__(self, delta: Tree) -> None:
        self.delta = delta

    def fit(self, local: Local, start: Tree, *_: Any) -> Tree:
        return {k: v.clone() for k, v in self.delta.items()}


def sent(m: Ferret, delta: Tree, visit: int = 0, client: int = 0) -> Tree:
    start = {k: torch.zeros_like(v) for k, v in delta.items()}
    return m.train(Local(client, start, {}, 0, 1, visit, 7, Given(delta)), start)  # type: ignore[arg-type]


def made(m: Ferret, delta: Tree, visit: int = 0, client: int = 0) -> Tree:
    """What the delta is taken for."""
    return dict(m.effect(m.accept(delta, sent(m, delta, visit, client))))


def some(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64, *salt: int) -> Tree:
    return {k: torch.randn(s, dtype=dtype, generator=generator("some", k, *salt)) for k, s in shapes.items()}


SHAPES = {"a": (20, 10), "b": (7,), "c": (300,), "d": (150, 2), "e": (3,)}
VECTOR = {"w": (400,)}


# --- what a reconstruction is ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("scale", "slope"), [("unbiased", 1.0), ("published", 1 / 3)])
def test_the_mean_reconstruction_is_the_update_or_a_third_of_it(scale: str, slope: float) -> None:
    delta, m, n = some(VECTOR)["w"], ferret(k=64, scale=scale), 200
    found = torch.stack([made(m, {"w": delta}, i)["w"] for i in range(n)])
    slopes = found @ delta / (delta @ delta)
    assert float(slopes.mean()) == pytest.approx(slope, abs=4 * float(slopes.std()) / n**0.5)
    assert float(slopes.std()) / n**0.5 < 0.03 * slope
    apart = float((found.mean(0) / slope - delta).norm() / delta.norm())
    assert apart == pytest.approx((400 / 64 / n) ** 0.5, rel=0.2)  # nothing but noise is left


@pytest.mark.parametrize(("k", "expected"), [(16, 5.0), (64, 2.5), (256, 1.25)])
def test_the_relative_error_is_the_root_of_d_over_k(k: int, expected: float) -> None:
    delta = some(VECTOR)["w"]
    errors = torch.stack([(made(ferret(k=k), {"w": delta}, i)["w"] - delta).norm() / delta.norm() for i in range(60)])
    assert float(errors.square().mean().sqrt()) == pytest.approx(expected, rel=0.06)


def test_least_squares_is_a_projection() -> None:
    delta, m = some(VECTOR)["w"], ferret(k=100, solve=True)
    found = torch.stack([made(m, {"w": delta}, i)["w"] for i in range(60)])
    assert torch.allclose(found @ delta, found.square().sum(1))  # what is left is orthogonal to what was found
    assert float((found @ delta / (delta @ delta)).mean()) == pytest.approx(100 / 400, abs=0.02)


def test_as_many_vectors_as_numbers_lose_nothing() -> None:
    delta = some(SHAPES)
    found = made(ferret(k=10_000, solve=True), delta)
    assert found.keys() == delta.keys()
    assert norm({k: found[k] - delta[k] for k in delta}) / norm(delta) < 1e-12
    exact = some(VECTOR)
    assert norm({"w": made(ferret(k=400, solve=True), exact)["w"] - exact["w"]}) / norm(exact) < 1e-12


def test_vectors_are_of_the_block_they_are_in() -> None:
    """Tensors of a block share its gamma: drawn with the block's bound, weighed with its variance."""
    delta, m = some(SHAPES), ferret(k=30, split="even")
    assert blocks(delta) == [["a"], ["b"], ["c"], ["d"], ["e"]]  # 0.9 of the median: 180
    delta = some({"a": (300,), "b": (100,), "c": (150,), "d": (300,), "e": (300,)})
    assert blocks(delta) == [["a"], ["b", "c"], ["d"], ["e"]]
    up = sent(m, delta)
    counts, seed = up[COUNTS].tolist(), int(up[SEED])
    assert counts == [8, 8, 7, 7]
    parts = dict(zip(["a", "bc", "d", "e"], up[GAMMA].split(counts), strict=True))
    v = {k: next(tiles(seed, k, n, 8, 250**-0.5))[1].double().clone() for k, n in (("b", 100), ("c", 150))}
    assert max(float(x.abs().max()) for x in v.values()) <= 250**-0.5 * (1 + 1e-6)
    want = (v["b"] @ delta["b"] + v["c"] @ delta["c"]) / (draws.variance(250**-0.5) * 8)
    assert torch.allclose(parts["bc"], want)
    found = m.effect(m.accept(delta, up))
    assert torch.allclose(found["c"], v["c"].T @ want)


def test_a_tensor_of_many_tiles_is_the_matrix_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hocket.methods.ferret.TILE", 1000)
    delta, m = some({"w": (37, 40)}), ferret(k=30)
    v = torch.cat([x.double().clone() for _, x in tiles(int(sent(m, delta)[SEED]), "w", 1480, 30, 1480**-0.5)], 1)
    assert v.shape == (30, 1480)
    want = v.T @ (v @ delta["w"].flatten()) / (draws.variance(1480**-0.5) * 30)
    assert torch.allclose(made(m, delta)["w"].flatten(), want)


def test_threads_do_not_change_a_bit() -> None:
    delta, m, out = some({"a": (300, 400), "b": (512,), "c": (200, 512)}, torch.float32), ferret(k=50), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out.append((digest(sent(m, delta)), digest(made(m, delta))))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert len(set(out)) == 1


# --- how many vectors a block gets ----------------------------------------------------------------------------------
def one_by_one(total: int, norms: list[float], caps: list[int]) -> list[int]:
    out = [0] * len(norms)
    for _ in range(min(total, sum(c for c, x in zip(caps, norms, strict=True) if x > 0))):
        free = [i for i, x in enumerate(norms) if x > 0 and out[i] < caps[i]]
        i = max(free, key=lambda i: (out[i] == 0, norms[i] / (out[i] + 1), -i))
        out[i] += 1
    return out


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 300),
    st.lists(st.tuples(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.0, 7.5, 1e4]), st.integers(1, 80)), min_size=1, max_size=9),
)
def test_numbers_go_one_by_one_to_who_moved_most(total: int, given: list[tuple[float, int]]) -> None:
    norms, caps = [x for x, _ in given], [c for _, c in given]
    out = apportion(total, norms, caps)
    assert sum(out) == min(total, sum(caps))
    assert all(0 <= n <= c for n, c in zip(out, caps, strict=True))
    moved = [i for i, x in enumerate(norms) if x > 0]
    want = one_by_one(total, norms, caps)
    assert [out[i] for i in moved] == [want[i] for i in moved]


def test_shares_are_proportional_with_one_at_least() -> None:
    assert apportion(100, [3.0, 1.0, 0.0, 1.0], [1000] * 4) == [60, 20, 0, 20]
    assert apportion(100, [1e9, 1.0, 0.0, 1.0], [1000] * 4) == [98, 1, 0, 1]
    assert apportion(2, [1.0, 3.0, 2.0], [9] * 3) == [0, 1, 1]
    assert apportion(100, [1.0, 1.0], [10, 1000]) == [10, 90]
    assert apportion(10, [0.0, 0.0], [30, 10]) == [8, 2]  # nothing moved
    assert apportion(10, [math.nan, 1.0], [30, 10]) == [8, 2]
    big = apportion(1_000_000, [float(i % 7 + 1) for i in range(300)], [10**8] * 300)
    assert sum(big) == 1_000_000


def test_a_block_s_share_follows_its_norm() -> None:
    delta = some({"a": (200,), "b": (200,), "c": (200,)})
    delta = {"a": delta["a"] * 5 / delta["a"].norm(), "b": delta["b"] * 0, "c": delta["c"] / delta["c"].norm()}
    assert sent(ferret(k=60), delta)[COUNTS].tolist() == [50, 0, 10]
    assert sent(ferret(k=60, split="even"), delta)[COUNTS].tolist() == [20, 20, 20]
    assert torch.equal(made(ferret(k=60), delta)["b"], torch.zeros(200).double())  # not moved, and counted as such
    still = {k: v * 0 for k, v in delta.items()}
    up = sent(ferret(k=60), still)
    assert up[COUNTS].tolist() == [20, 20, 20] and not up[GAMMA].any()


def test_blocks_are_greedy_groups_below_nine_tenths_of_the_median() -> None:
    tree = {f"{i:02}": torch.empty(n) for i, n in enumerate([10, 3, 15, 100, 20, 8, 40, 100, 1000, 5, 6])}
    assert blocks(tree) == [["00", "01"], ["02"], ["03"], ["04"], ["05"], ["06"], ["07"], ["08"], ["09", "10"]]
    assert blocks(dict(reversed(tree.items()))) == blocks(tree)
    assert blocks({"a": torch.empty(2), "n": torch.tensor(3)}) == [["a"]]


# --- federations ----------------------------------------------------------------------------------------------------
def gaps(w: World, other: World) -> list[float]:
    return [
        norm({k: a[k] - b[k] for k in a}) / max(norm(a), 1e-30) for a, b in zip(w.iterates, other.iterates, strict=True)
    ]


def test_one_step_with_every_vector_is_fedavg() -> None:
    more: dict[str, Any] = {"layers": 3, "size": 12, "steps": 1, "weights": [1, 3, 2]}
    w = quadratic(meth={"name": "ferret", "k": 36, "solve": True}, **more).run()
    assert max(gaps(w, quadratic(meth="fedavg", **more).run())) < 1e-9
    late = quadratic(meth={"name": "ferret", "k": 36, "solve": True}, sched="overlap", **more).run()
    assert max(gaps(late, quadratic(meth="fedavg", sched="overlap", **more).run())) < 1e-9


def ranks(w: World) -> list[int]:
    """Dimensions that the iterates' changes span, layer by layer."""
    out = []
    for k in sorted(w.iterates[0]):
        x = torch.stack([b[k] - a[k] for a, b in zip(w.iterates, w.iterates[1:], strict=False)])
        s = torch.linalg.svdvals(x)
        out.append(int((s > s[0] * 1e-9).sum()))
    return out


def test_one_list_of_vectors_holds_all_updates_in_their_span_for_ever() -> None:
    more: dict[str, Any] = {"layers": 2, "size": 20, "turns": 12, "lr": 0.01}
    fixed = quadratic(meth={"name": "ferret", "k": 8, "seeds": "fixed", "split": "even"}, **more).run()
    assert ranks(fixed) == [4, 4]
    fresh = quadratic(meth={"name": "ferret", "k": 8}, **more).run()
    assert min(ranks(fresh)) == 12
    news = fixed.simulation.server.state["last"]
    assert news[GAMMA].shape == (8,) and news[SEED].shape == (1,)  # averaged, not stacked
    for name, (_, v) in zip(
        ("layers.0.w", "layers.1.w"),
        (next(tiles(int(news[SEED]), f"layers.{i}.w", 20, 4, 20**-0.5)) for i in range(2)),
        strict=True,
    ):
        moved = fixed.final[name] - fixed.iterates[0][name]
        left = moved - v.double().T @ torch.linalg.lstsq(v.double().T, moved).solution
        assert float(left.norm() / moved.norm()) < 1e-9


def test_a_step_is_the_weighted_mean_of_the_effects() -> None:
    for fields in ({}, {"seeds": "fixed", "split": "size"}):
        m = ferret(k=40, server_lr=0.5, **fields)
        params = some(SHAPES)
        state = m.init(params, 7)
        updates = [Update(i, i, 0, 0, sent(m, some(SHAPES, torch.float64, i), 0, i)) for i in range(3)]
        assert [m.check(state, u) for u in updates] == [None] * 3
        weights, shares = [1.0, 2.0, -0.5], [2.0, 2.0, 1.0]
        after = m.step(state, updates, weights, shares)["params"]
        effects = [m.effect(m.accept(params, u.payload)) for u in updates]
        for k in params:
            want = params[k] + 0.5 * sum(w * e[k] for w, e in zip(weights, effects, strict=True)) / 5
            assert torch.allclose(after[k], want)
        dense = m.step(state, [Update(i, i, 0, 0, e) for i, e in enumerate(effects)], weights, shares)
        assert dense["news"] == {} and dense["version"] == 1
        assert all(torch.allclose(dense["params"][k], after[k]) for k in params)
        alone = m.step(state, updates[:1], [3.0])["params"]
        assert digest(alone) == digest(m.own(params, updates[0].payload))


def test_catching_up_gives_the_same_bits_as_going_step_by_step() -> None:
    m, params = ferret(k=8), some(SHAPES, torch.float32)
    state, client = m.init(params, 7), Client(0)
    steps, held, changed = [state], params, dict.fromkeys(params, 0)
    for t in range(4):
        updates = [Update(i, i, t, t, sent(m, some(SHAPES, torch.float32, t, i), t, i)) for i in range(2)]
        state = m.step(state, updates, [1.0, 2.0])
        steps.append(state)
        changed = dict.fromkeys(params, t + 1)
        news = m.ship(state, client, t + 1, t, changed)
        assert {k.partition("/")[0] for k in news} == {str(t + 1)}
        held = m.load(held, news)
        assert digest(held) == digest(state["params"])
    assert digest(m.load(steps[1]["params"], m.ship(state, client, 4, 1, changed))) == digest(state["params"])
    both = m.ship(state, client, 4, 0, changed)
    assert {k.partition("/")[0] for k in both} == {"1", "2", "3", "4"}
    assert digest(m.load(params, both)) == digest(state["params"])
    many = ferret(k=400)  # two clients' numbers are then nearly the weights
    state = many.init(params, 7)
    for t in range(2):
        state = many.step(state, [Update(i, i, t, t, sent(many, some(SHAPES, torch.float32, t, i), t, i)) for i in range(2)], [1.0, 1.0])
    assert many.ship(state, client, 2, 0, changed).keys() == params.keys()


@pytest.mark.parametrize(("seeds", "split", "lists"), [("fresh", "norm", 2), ("fixed", "size", 1)])
def test_plans_and_runs_have_the_bytes_of_the_formula(seeds: str, split: str, lists: int) -> None:
    spec = {"name": "ferret", "k": 100, "seeds": seeds, "split": split}
    r = parse({
        "model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}, "turns": 3, "method": spec,
        "clients": {"count": 2}, "training": {"optimizer": "sgd", "local_steps": 1},
    })  # fmt: skip
    w = language(meth=spec, clients=2, turns=3, steps=1, layers=2)
    n, raw = len(blocks(w.final)), codec.build("raw")
    up = {GAMMA: torch.zeros(100), COUNTS: torch.zeros(n, dtype=torch.int32), SEED: torch.zeros(1, dtype=torch.int64)}
    assert nbytes(up) == 4 * 100 + 4 * n + 8
    down = [
        {f"{v}/{GAMMA}": torch.zeros(lists * 100), f"{v}/{COUNTS}": torch.zeros(lists, n, dtype=torch.int32),
         f"{v}/{SEED}": torch.zeros(lists, dtype=torch.int64)}
        for v in (1, 2)
    ]  # fmt: skip
    w.run()
    assert w.simulation.ledger.bytes["up"] == 3 * 2 * raw.size(up)
    assert w.simulation.ledger.bytes["down"] == 2 * (raw.size({}) + sum(map(raw.size, down)))
    found = plan(r)
    model, _ = tiny("llama")
    n = len(blocks(dict(model.named_parameters())))
    up[COUNTS] = torch.zeros(n, dtype=torch.int32)
    for v, d in enumerate(down, 1):
        d[f"{v}/{COUNTS}"] = torch.zeros(lists, n, dtype=torch.int32)
    assert found["up"] == 3 * 2 * raw.size(up)
    assert found["down"] == 2 * (raw.size({}) + sum(map(raw.size, down)))


def test_odd_uploads_are_refused() -> None:
    m, params = ferret(k=40), some(SHAPES, torch.float32)
    state = m.init(params, 7)
    good = sent(m, params)

    def why(m: Ferret = m, **changes: Any) -> str | None:
        tree = {k: v for k, v in (good | changes).items() if v is not None}
        return m.check(state, Update(0, 0, 0, 0, tree))

    counts, gamma = good[COUNTS], good[GAMMA]
    assert why() is None
    assert why(a=params["a"]) == "unknown tensor 'a'"
    assert why(seed=None) == "tensor 'seed' is missing"
    assert "'seed' is torch.int64 of shape (2,)" in str(why(seed=torch.tensor([1, 2])))
    assert "'seed' is torch.float32" in str(why(seed=torch.tensor([1.0])))
    assert "'counts' is torch.int32 of shape (2,), expected 5" in str(why(counts=counts[:2]))
    assert "'counts' is torch.int64" in str(why(counts=counts.long()))
    assert "'counts' has -1 vectors for block 1 of 7" in str(why(counts=counts.clone().index_fill_(0, torch.tensor(1), -1)))
    assert "'counts' has 9 vectors for block 4 of 3" in str(why(counts=counts.clone().index_fill_(0, torch.tensor(4), 9)))
    assert "'counts' sums to" in str(why(counts=counts * 0))
    assert "'gamma' is torch.float32 of shape (39,), expected 40" in str(why(gamma=gamma[1:]))
    assert "'gamma' is torch.int32" in str(why(gamma=gamma.int()))
    assert "'gamma' holds values that are not finite" in str(why(gamma=gamma / 0))
    broken = sent(m, {k: v / 0 for k, v in params.items()})
    assert "not finite" in str(m.check(state, Update(0, 0, 0, 0, broken)))
    one = ferret(k=40, seeds="fixed", split="size")
    state, good = one.init(params, 7), sent(one, params)
    counts = good[COUNTS]
    assert why(one) is None
    assert "another list" in str(why(one, seed=good[SEED] + 1))
    swapped = counts.clone()
    swapped[0], swapped[1] = counts[0] - 1, counts[1] + 1
    assert "not the 'size' split" in str(why(one, counts=swapped))
    with pytest.raises(TypeError, match="accept"):
        m.effect(good)


def test_what_cannot_be_is_refused_before_the_run() -> None:
    base = {"model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}}
    for spec, reason in (
        ({"seeds": "fixed"}, r"split: one list.*'size' or 'even'"),
        ({"solve": True, "scale": "published"}, r"scale: least-squares"),
        ({"k": 0}, "k"),
    ):
        with pytest.raises(RecipeError, match=reason):
            parse(base | {"method": {"name": "ferret", **spec}})
    with pytest.raises(RecipeError, match=r"codec.up: 'ferret'"):
        parse(base | {"method": "ferret", "codec": {"up": {"name": "feedback", "codec": "int8"}}})


@pytest.mark.parametrize("name", ["half", "int8", "int4", "sign", "topk", "chain"])
def test_codecs_leave_seeds_and_counts_alone(name: str) -> None:
    fields = {"topk": {"share": 0.5}, "chain": {"codecs": ["half", "int8"]}}.get(name, {})
    c, up = codec.build({"name": name, **fields}), sent(ferret(k=40), some(SHAPES, torch.float32))
    back = c.decode(c.encode(up))
    assert torch.equal(back[COUNTS], up[COUNTS]) and back[COUNTS].dtype == torch.int32
    assert torch.equal(back[SEED], up[SEED])
    assert float(torch.nn.functional.cosine_similarity(back[GAMMA], up[GAMMA], 0)) > 0.5


# --- where it breaks ------------------------------------------------------------------------------------------------
def loss_after(m: Ferret, rate: float, steps: int = 1, runs: int = 60, k: int = 400) -> float:
    """Mean of |w - w*|^2 after some steps on |w - w*|^2 / 2, each the reconstruction of the way that is left, over the
    first one."""
    out = []
    for run in range(runs):
        left = some({"w": (k,)}, torch.float64, run)["w"]
        first = left.square().sum()
        for t in range(steps):
            left = left - rate * made(m, {"w": left}, run * steps + t)["w"]
        out.append(float(left.square().sum() / first))
    return sum(out) / runs


def test_where_it_breaks_a_step_that_fedavg_could_make_is_too_long() -> None:
    """A rate of 1 is at the solution at once with Delta itself; with K of d vectors the loss grows d / K times."""
    d, k = 400, 64
    assert loss_after(ferret(k=k), 1.0) == pytest.approx(d / k, rel=0.1)
    assert loss_after(ferret(k=k), k / (k + d)) == pytest.approx(d / (k + d), rel=0.02)  # the best rate there is
    assert loss_after(ferret(k=k, scale="published"), 3 * k / (k + d)) == pytest.approx(d / (k + d), rel=0.02)
    assert loss_after(ferret(k=k, solve=True), 1.0) == pytest.approx(1 - k / d, rel=0.02)


def test_where_it_breaks_one_list_of_vectors_leaves_what_is_outside_its_span() -> None:
    d, k = 100, 25
    fresh, fixed = ferret(k=k, solve=True), ferret(k=k, solve=True, seeds="fixed", split="size")
    assert loss_after(fixed, 1.0, 20, 6, d) == pytest.approx(1 - k / d, rel=0.15)
    assert loss_after(fresh, 1.0, 20, 6, d) < 0.01


def test_many_clients_average_the_noise_of_fresh_vectors_alone() -> None:
    delta, n = some(VECTOR)["w"], 25
    apart = {}
    for seeds in ("fresh", "fixed"):
        m = ferret(k=64, seeds=seeds, split="size")
        mean = torch.stack([made(m, {"w": delta}, 0, client)["w"] for client in range(n)]).mean(0)
        apart[seeds] = float((mean - delta).norm() / delta.norm())
    assert apart["fresh"] == pytest.approx((400 / 64 / n) ** 0.5, rel=0.15)
    assert apart["fixed"] == pytest.approx((400 / 64) ** 0.5, rel=0.25)


# --- on a model -----------------------------------------------------------------------------------------------------
def losses(w: World) -> list[float]:
    batch = collate([t for c in range(3) for t in tokens(c, 3)])
    out: list[float] = []

    def measure(params: Tree) -> dict[str, Any]:
        out.append(float(w.trainer.loss(params, batch)))
        return {}

    w.simulation.evaluations.measure = measure
    measure(w.final)
    w.simulation.run()
    return out


SGD = {"optimizer": "sgd", "lr": 0.1}


@pytest.mark.parametrize(
    ("sched", "fields"),
    [
        ("sync", {}), ("sync", {"seeds": "fixed", "split": "size"}), ("sync", {"solve": True, "server_lr": 4.0}),
        ("sync", {"scale": "published", "server_lr": 3.0}), ("sync", {"server_optimizer": "momentum", "server_lr": 0.3}),
        ("overlap", {}), ("ca2fl", {}),
    ],
)  # fmt: skip
def test_it_learns(sched: str, fields: dict[str, Any]) -> None:
    """512 numbers of 6736; FedAvg comes from 4.2 to 2.8 in the synchronous run."""
    w = language(
        meth={"name": "ferret", "k": 512, **fields}, sched=sched, turns=12, layers=2, width=16, steps=5, training=SGD
    )
    found = losses(w)
    assert found[-1] < found[0] - 0.5


def test_half_precision_models_train() -> None:
    model, _ = tiny("llama", vocab=64, layers=2, width=16)
    m = ferret(k=300)
    view = make(model.to(torch.bfloat16), m, "causal", 7)
    config = Training.model_validate({**SGD, "local_steps": 3, "batch_size": 2})
    trainer = TorchTrainer(view, [tokens(0, 6)], collate, config)
    state = m.init(trainer.start(), 7)
    batch = collate(tokens(0, 6))
    before = float(trainer.loss(state["params"], batch))
    for t in range(10):
        up = m.train(Local(0, state["params"], {}, t, 10, t, 7, trainer), state["params"])
        assert up[GAMMA].dtype == torch.float32
        assert m.check(state, Update(t, 0, t, t, up)) is None
        state = m.step(state, [Update(t, 0, t, t, up)], [1.0])
    assert float(trainer.loss(state["params"], batch)) < before - 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_sends_what_one_on_the_cpu_does() -> None:
    ups = []
    for device in ("cpu", "cuda"):
        model, _ = tiny("llama", vocab=64, layers=2, width=16)
        m = ferret(k=300, split="size")
        view = make(model.to(device), m, "causal", 7)
        config = Training.model_validate({**SGD, "local_steps": 2, "batch_size": 2})
        trainer = TorchTrainer(view, [tokens(0, 6)], collate, config)
        state = m.init(trainer.start(), 7)
        ups.append(m.train(Local(0, state["params"], {}, 0, 1, 0, 7, trainer), state["params"]))
        m.step(state, [Update(0, 0, 0, 0, ups[-1])], [1.0])
    assert torch.equal(ups[0][SEED], ups[1][SEED]) and torch.equal(ups[0][COUNTS], ups[1][COUNTS])
    assert torch.allclose(ups[0][GAMMA], ups[1][GAMMA].cpu(), rtol=1e-2, atol=1e-4)
