"""GradualDiff-Fed: differences down. Lossless it is FedAvg to the bit; lossy, nothing is forgotten; drift is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import World, language, quadratic

from hocket.codecs import codec
from hocket.errors import HocketError, RecipeError
from hocket.methods import Client, Update, method
from hocket.methods.gradualdiff import AT, SUM, bits, checksum, composed
from hocket.methods.replay import without
from hocket.plan import plan
from hocket.recipe import parse
from hocket.tree import Tree, digest, generator, nbytes

XOR, FLOAT = {"name": "gradualdiff"}, {"name": "gradualdiff", "difference": "float"}
HALF, TOP = FLOAT | {"precision": "half"}, FLOAT | {"share": 0.1}
BOTH = HALF | {"share": 0.1}
EVERY = {"xor": XOR, "float": FLOAT, "half": HALF, "top": TOP, "half of the top": BOTH}
each = pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY)
WEIGHTS = [1.0, 2.0, 0.5]
ZSTD = codec.build("zstd")


def draw(key: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tree:
    shapes = {"a.weight": (30, 20), "b.weight": (7, 3), "c.bias": (40,), "s": ()}
    return {k: (torch.randn(s, generator=generator("gd", key, k), dtype=torch.float64) * scale).to(dtype) for k, s in shapes.items()}


def updates(turn: int, dtype: torch.dtype = torch.float64, n: int = 3) -> list[Update]:
    return [Update(i, i, turn, turn, draw(100 * turn + i + 1, dtype, 0.01)) for i in range(n)]


def mean(turn: int) -> Tree:
    sent = [u.payload for u in updates(turn)]
    return {k: sum(w * x[k] for x, w in zip(sent, WEIGHTS, strict=True)) / sum(WEIGHTS) for k in sent[0]}


def steps(spec: Any, turns: int, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Any]]:
    """The method and its states at versions 0..turns."""
    m = method.build(spec)
    states = [m.init(draw(0, dtype), 0)]
    for t in range(turns):
        states.append(m.step(states[-1], updates(t, dtype), WEIGHTS))
    return m, states


def changed(version: int) -> dict[str, int]:
    return dict.fromkeys(draw(0), version)


def ship(m: Any, state: Any, version: int, since: int) -> Tree:
    return m.ship(state, Client(0), version, since, changed(version))


# --- lossless is FedAvg ----------------------------------------------------------------------------------------------
SCHEDULES = ["sync", {"name": "sync", "cohort": 2}, "overlap", {"name": "fedbuff", "buffer": 2}]


@pytest.mark.parametrize(("spec", "sched"), [*((m, s) for m in (XOR, FLOAT) for s in SCHEDULES), (XOR, "fedasync"), (XOR, "fedfa")])
def test_lossless_is_fedavg_to_the_bit(spec: Any, sched: Any) -> None:
    """The same real run, end to end, packets and all. (Schedules with rates of their own round float steps otherwise.)"""
    ours, theirs = (language(meth=m, sched=sched, turns=4, up=c, down=c) for m, c in ((spec, "zstd"), ("fedavg", "raw")))
    ours.simulation.run()
    theirs.simulation.run()
    assert digest(ours.final) == digest(theirs.final)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [XOR, FLOAT], ids=["xor", "float"])
def test_every_dtype_is_fedavg_to_the_bit(spec: Any, dtype: torch.dtype) -> None:
    _, ours = steps(spec, 5, dtype)
    _, theirs = steps("fedavg", 5, dtype)
    assert digest(ours[-1]["params"]) == digest(theirs[-1]["params"])
    assert ours[-1]["residual"] == {}


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "adam", "yogi", "amsgrad"])
@pytest.mark.parametrize("spec", [XOR, FLOAT], ids=["xor", "float"])
def test_server_optimizers_are_fedavgs(spec: Any, optimizer: str) -> None:
    more = {"server_optimizer": optimizer, "server_lr": 0.1}
    _, ours = steps(spec | more, 4)
    _, theirs = steps({"name": "fedavg", **more}, 4)
    assert digest(ours[-1]["params"]) == digest(theirs[-1]["params"])


# --- what travels ----------------------------------------------------------------------------------------------------
@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("since", [-1, 0, 1, 2, 3, 4])
def test_from_any_version_a_client_gets_the_servers_bits(spec: Any, dtype: torch.dtype, since: int) -> None:
    m, states = steps(spec | ({"log": 3} if spec is XOR else {}), 5, dtype)
    sent = ship(m, states[5], 5, since)
    arrived = ZSTD.decode(ZSTD.encode(sent))
    held = states[since]["params"] if since >= 0 else {}
    assert digest(m.load(held, arrived)) == digest(states[5]["params"])
    assert nbytes(without(sent, [f"5/{SUM}"])) <= nbytes(states[5]["params"])  # never more than the model


def test_xor_of_many_versions_is_one_set() -> None:
    m, states = steps(XOR, 6)
    for since in range(2, 6):
        sent = ship(m, states[6], 6, since)
        assert set(sent) == {f"6/{k}" for k in [*draw(0), SUM]}
        for k in draw(0):
            assert torch.equal(sent[f"6/{k}"], bits(states[6]["params"][k]) ^ bits(states[since]["params"][k]))
            assert sent[f"6/{k}"].dtype == torch.int64
    assert set(states[6]["news"]) == {"3", "4", "5", "6"}  # log = 4
    assert not any("/" in k for k in set(ship(m, states[6], 6, 1)) - {f"6/{SUM}"})  # older: weights


def test_composition_is_any_order_of_steps() -> None:
    """XOR composes: all at once, one by one, or in two parts, the same bits come out."""
    m, states = steps(XOR | {"log": 9}, 6)
    log = [states[6]["news"][str(v)] for v in range(1, 7)]
    one = states[0]["params"]
    for news in log:
        one = m.apply(one, news)
    two = m.apply(m.apply(states[0]["params"], composed(log[:3])), composed(log[3:]))
    assert digest(one) == digest(two) == digest(m.apply(states[0]["params"], composed(log))) == digest(states[6]["params"])
    assert m.apply(states[6]["params"], composed(log + log)).keys() == one.keys()
    assert digest(m.apply(one, composed(log + log))) == digest(one)  # twice is nothing


def test_tensors_that_did_not_move_are_not_sent() -> None:
    m = method.build(XOR)
    state = m.init(draw(0), 0)
    for v, names in enumerate((["s"], ["c.bias"], ["s"])):
        state = m.step(state, [Update(0, 0, v, v, {k: draw(v + 1)[k] for k in names})], [1.0])
    sent = ship(m, state, 3, 0)
    assert set(sent) == {"3/s", "3/c.bias", f"3/{SUM}"}
    assert digest(m.load(draw(0), sent)) == digest(state["params"])


def test_a_client_that_holds_the_version_is_sent_nothing() -> None:
    for spec in EVERY.values():
        m, states = steps(spec, 2)
        assert ship(m, states[2], 2, 2) == {}
        assert ship(m, states[0], 0, 0) == {}


def test_bytes_of_a_difference() -> None:
    d = sum(x.numel() for x in draw(0).values())
    size = {}
    for name, spec in EVERY.items():
        m, states = steps(spec, 2, torch.float32)
        size[name] = nbytes(ship(m, states[2], 2, 1)) - 16
    assert size["xor"] == size["float"] == 4 * d
    assert size["half"] == 2 * d
    kept = {k: max(1, x.numel() // 10) for k, x in draw(0).items()}
    assert size["top"] == 4 + kept["a.weight"] * (4 + 2) + kept["b.weight"] * (4 + 1) + kept["c.bias"] * (4 + 1)
    assert size["half of the top"] == 2 + kept["a.weight"] * (2 + 2) + kept["b.weight"] * (2 + 1) + kept["c.bias"] * (2 + 1)
    m, states = steps(XOR, 2, torch.bfloat16)
    assert nbytes(ship(m, states[2], 2, 1)) - 16 == 2 * d
    m, states = steps(FLOAT, 2, torch.bfloat16)
    assert nbytes(ship(m, states[2], 2, 1)) - 16 == 2 * d  # fp32 numbers would be twice the weights: weights go


# --- lossy: nothing is forgotten -------------------------------------------------------------------------------------
def dense(news: Tree, like: Tree) -> Tree:
    out = {}
    for k, x in like.items():
        if k + AT in news:
            flat = torch.zeros(x.numel(), dtype=torch.float64)
            flat[news[k + AT].long()] = news[k].double()
            out[k] = flat.reshape(x.shape)
        else:
            out[k] = news[k].double()
    return out


@pytest.mark.parametrize("spec", [FLOAT, HALF, TOP, BOTH], ids=["float", "half", "top", "half of the top"])
def test_what_was_sent_and_the_rest_are_all_that_was_meant(spec: Any) -> None:
    m, start = method.build(spec), draw(0)
    state, sent, meant = m.init(start, 0), dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
    for t in range(30):
        state = m.step(state, updates(t), WEIGHTS)
        news = dense(state["news"][str(t + 1)], start)
        for k in start:
            sent[k] = sent[k] + news[k]
            meant[k] = meant[k] + mean(t)[k]
    for k in start:
        rest = state["residual"].get(k, torch.zeros(()).double())
        assert torch.allclose(sent[k] + rest, meant[k], atol=1e-14)
        assert torch.allclose(state["params"][k], start[k] + sent[k], atol=1e-13)


def test_top_entries_are_the_largest_of_step_and_residual() -> None:
    m, states = steps(TOP, 3)
    before, after, k = states[2], states[3], "a.weight"
    step = mean(2)[k] + before["residual"][k]
    want = set(step.abs().reshape(-1).topk(60).indices.tolist())
    assert set(after["news"]["3"][k + AT].long().tolist()) == want
    assert int((after["residual"][k] == 0).sum()) == 60
    moved = (after["params"][k] != before["params"][k]).reshape(-1).nonzero().squeeze(1)
    assert set(moved.tolist()) == want


def test_half_keeps_what_bf16_drops() -> None:
    m, states = steps(HALF, 1, torch.float32)
    news, k = states[1]["news"]["1"], "a.weight"
    assert news[k].dtype == torch.bfloat16
    step = dict(updates(0, torch.float32)[0].payload)[k]
    assert 0 < states[1]["residual"][k].abs().max() <= step.abs().max() * 4 * 2**-9


def test_lossy_missed_versions_come_one_by_one_while_they_cost_less_than_weights() -> None:
    m, states = steps(BOTH, 12, torch.float32)
    kept = [int(v) for v in states[12]["news"]]
    assert kept == list(range(kept[0], 13))
    assert 4 <= len(kept) < 12
    sent = ship(m, states[12], 12, kept[0] - 1)
    assert {k.partition("/")[0] for k in sent} == {str(v) for v in kept}
    assert nbytes(sent) <= nbytes(draw(0, torch.float32))
    assert set(ship(m, states[12], 12, kept[0] - 2)) == {*draw(0), f"12/{SUM}"}


# --- the checksum ----------------------------------------------------------------------------------------------------
@each
@pytest.mark.parametrize("since", [0, 3])
def test_one_flipped_bit_is_caught(spec: Any, since: int) -> None:
    m, states = steps(spec, 4, torch.float32)
    held, sent = dict(states[since]["params"]), ship(m, states[4], 4, since)
    if not any("/" in k for k in set(sent) - {f"4/{SUM}"}):
        sent = without(sent, ["b.weight"])  # weights would mend it
    drifted = bits(held["b.weight"].clone())
    drifted[2, 1] ^= 1
    held["b.weight"] = drifted.view(torch.float32)
    with pytest.raises(HocketError, match="version 4: this client's model is not the server's.*fetch the whole model"):
        m.load(held, sent)
    assert digest(m.load({}, ship(m, states[4], 4, -1))) == digest(states[4]["params"])  # what it says helps


def test_a_skipped_version_is_caught() -> None:
    m, states = steps(XOR, 4)
    with pytest.raises(HocketError, match="version 4"):
        m.load(states[2]["params"], ship(m, states[4], 4, 3))


def test_the_checksum_is_of_names_shapes_and_bits() -> None:
    a = {"x": torch.tensor([0.0, 1.0])}
    others = [{"x": torch.tensor([-0.0, 1.0])}, {"y": a["x"]}, {"x": a["x"].view(2, 1)}, {"x": a["x"].view(torch.int32)}]
    sums = [tuple(checksum(t).tolist()) for t in (a, *others)]
    assert len(set(sums)) == 5
    assert len(sums[0]) == 16


# --- runs ------------------------------------------------------------------------------------------------------------
def followed(w: World) -> World:
    """Every client really keeps a copy, brought on by nothing but the packets it is sent, and checked every time."""
    sim, held, name = w.simulation, {}, {}
    server, send = sim.server, sim.downlink.send
    first = dict(server.state["params"]) if server.preloaded else {}

    def sending(job: Any, _: Any) -> Any:
        start = held.get((job.client, job.since), first)
        down = sim.downlink.codec
        blob = down.encode(job.payload)
        got = server.method.load(start, down.decode(blob))
        assert digest(got) == digest(server.state["params"]), (job.client, job.since, job.version)
        held[job.client, job.version] = got
        name[job.id] = sorted(job.payload)
        download = send(job, server)
        assert download.bytes == len(blob)
        return download

    sim.downlink.send = sending  # type: ignore[method-assign]
    w.names = name  # type: ignore[attr-defined]
    sim.run()
    return w


@each
@pytest.mark.parametrize("preloaded", [True, False])
@pytest.mark.parametrize("sched", [{"name": "sync", "cohort": 2}, {"name": "fedbuff", "buffer": 2}])
def test_clients_follow_the_server_by_packets_alone(spec: Any, preloaded: bool, sched: Any) -> None:
    """Partial participation, lost jobs, no start model: whatever the way, the server's bits."""
    w = followed(language(meth=spec, sched=sched, clients=5, turns=8, steps=1, layers=2, loss=0.2, down="zstd", preloaded=preloaded))
    shipped = list(w.names.values())  # type: ignore[attr-defined]
    assert any(any("/" in k and SUM not in k for k in s) for s in shipped)
    assert any(any("/" not in k for k in s) for s in shipped) or preloaded


@each
def test_the_loss_falls(spec: Any) -> None:
    w = language(meth=spec, turns=6, down="zstd")
    losses = []
    w.simulation.ledger.listener = lambda row: losses.append(row["loss"]) if row["what"] == "step" else None
    w.simulation.run()
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("spec", [HALF, TOP], ids=["half", "top"])
def test_lossy_runs_end_near_fedavgs_optimum(spec: Any) -> None:
    """Quadratics in float64 with a common Hessian: the residual loses nothing for good."""
    gap = {}
    for name, meth in (("ours", spec), ("fedavg", "fedavg")):
        w = quadratic(meth=meth, turns=40, common=True, lr=0.2, layers=2)
        w.simulation.run()
        gap[name] = w.trainer.view.model.gap(w.final, [1.0, 1.0, 1.0])
    assert gap["ours"] < gap["fedavg"] + 1e-3


def test_where_it_breaks_without_its_residual() -> None:
    """The same top entries with nothing carried over: what is small stays away for good."""
    m, steps_, k = method.build(TOP), 40, "a.weight"
    scale = torch.logspace(-3, 0, 600, dtype=torch.float64).reshape(30, 20)
    delta = [Update(0, 0, 0, 0, {k: scale})]
    with_it, without_it = m.init(draw(0), 0), m.init(draw(0), 0)
    for _ in range(steps_):
        with_it = m.step(with_it, delta, [1.0])
        without_it = m.step(without_it | {"residual": {}}, delta, [1.0])
    off = [float((s["params"][k] - draw(0)[k] - steps_ * scale).norm() / (steps_ * scale).norm()) for s in (with_it, without_it)]
    assert off[0] < 0.3 < 0.5 < off[1]


# --- recipes and plans -----------------------------------------------------------------------------------------------
def recipe(meth: dict[str, Any], down: Any = "raw", **more: Any) -> Any:
    base = {"model": {"source": "shape:qwen2.5-1.5b"}, "data": {"source": "docstrings"}, "turns": 2, "clients": {"count": 2}}
    return parse({**base, "method": meth, "codec": {"down": down}, **more})


@pytest.mark.parametrize("down", ["half", "int8", {"name": "svd", "rank": 2}, {"name": "chain", "codecs": ["half", "zstd"]}])
def test_a_lossy_downlink_is_refused(down: Any) -> None:
    with pytest.raises(RecipeError, match=r"codec\.down: '\w+' loses bits, and every client's model must be the server's"):
        recipe(XOR, down)


def test_lossless_downlinks_are_taken() -> None:
    for down in ("raw", "zstd", {"name": "chain", "codecs": ["zstd"]}, {"name": "per_tensor", "rules": {"*bias": "raw", "*": "zstd"}}):
        assert recipe(XOR, down).build_codec("down").lossless
    both = recipe(XOR, "zstd", codec={"down": "zstd", "up": {"name": "feedback", "codec": "int8"}})
    assert both.build_codec("down").lossless
    assert not both.build_codec("up").lossless


def test_an_xor_cannot_be_rounded() -> None:
    with pytest.raises(RecipeError, match="precision = 'half': an XOR of bits cannot be rounded; use difference = 'float'"):
        method.build(XOR | {"precision": "half"})
    with pytest.raises(RecipeError, match=r"share = 0\.1: an XOR"):
        method.build(XOR | {"share": 0.1})


@pytest.mark.parametrize(("spec", "numbers"), [(XOR, 4.0), (BOTH, 0.1 * (2 + 4))])
def test_plans_count_the_same_bytes(spec: Any, numbers: float) -> None:
    """Two clients, two turns, start model in place: one difference down and two deltas up for each."""
    p = plan(recipe(spec, "zstd"))
    assert p["down"] == pytest.approx(2 * numbers * p["trainable"], rel=1e-3)
    assert p["up"] == pytest.approx(4 * 4 * p["trainable"], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_a_client_on_a_gpu_gets_the_servers_bits(spec: Any) -> None:
    """The server steps on the CPU, the client applies on the GPU: both only add, or flip bits."""
    m, states = steps(spec, 3, torch.float32)
    held = {k: v.cuda() for k, v in states[2]["params"].items()}
    got = m.load(held, ZSTD.decode(ZSTD.encode(ship(m, states[3], 3, 2))))
    assert digest(got) == digest(states[3]["params"])
