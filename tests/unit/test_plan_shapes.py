"""Plans on shapes: public models without weights, the paper's clock, and bytes and seconds equal to a run's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from worlds import DEVICES, language

from hocket import plan as plans
from hocket.codecs.precision import Half
from hocket.errors import ModelError, RecipeError
from hocket.methods import method
from hocket.models import load
from hocket.models.skeleton import skeleton
from hocket.models.tiny import tiny
from hocket.recipe import parse

# published numbers of parameters, a tied head counted once; bytes of a number; rounds; minutes of FedBCD and ParaBlock
MODELS = {"llama-3-8b": 8_030_261_248, "llama-3.2-3b": 3_212_749_824, "qwen2.5-1.5b": 1_543_714_304}
TABLE_1 = {
    "8B, Alpaca": ("llama-3-8b", "half", 32, 30.2, 21.1),
    "8B, Math": ("llama-3-8b", "half", 32, 24.9, 15.8),
    "3B, Alpaca": ("llama-3.2-3b", "raw", 28, 19.1, 11.9),
    "3B, Math": ("llama-3.2-3b", "raw", 28, 17.3, 10.1),
}


@cache
def planned(model: str, codec: str, turns: int, seconds: float = 0.0, schedule: str = "sync", **method: Any) -> dict[str, Any]:
    """The plan of ten clients on half-duplex links of 100 MB/s, `seconds` of computing a round; FedBCD if not said."""
    device = {"step_seconds": seconds, "down_mb_s": 100, "up_mb_s": 100, "duplex": False}
    return plans.clock(
        parse(
            {
                "model": {"source": f"shape:{model}"}, "data": {"source": "docstrings"}, "turns": turns,
                "codec": {"up": codec, "down": codec}, "training": {"local_steps": 1},
                "clients": {"count": 10, "device": device}, "method": {"name": "fedbcd"} | method, "schedule": schedule,
            }
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_the_public_models(name: str) -> None:
    model = skeleton(f"shape:{name}")
    assert sum(p.numel() for p in model.parameters()) == MODELS[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_shape_cannot_be_run() -> None:
    with pytest.raises(ModelError, match=r"shape:llama-3-8b.*no weights.*hocket plan"):
        load("shape:llama-3-8b")
    with pytest.raises(ModelError, match="did you mean 'llama-3-8b'"):
        skeleton("shape:llama-3-8")


@pytest.mark.parametrize("cell", TABLE_1)
def test_the_papers_runtime_is_met_within_one_percent(cell: str) -> None:
    """The computing time of a round is fitted on FedBCD alone; ParaBlock's runtime then follows."""
    model, codec, turns, fedbcd, parablock = TABLE_1[cell]
    seconds = (fedbcd * 60 - planned(model, codec, turns)["seconds"]) / turns
    overlapped = planned(model, codec, turns, seconds, schedule="overlap")["seconds"] / 60
    assert overlapped == pytest.approx(parablock, rel=0.01)


def test_computing_adds_to_a_synchronous_round() -> None:
    """What the fit above rests on."""
    bare = planned("llama-3-8b", "half", 32)["seconds"]
    assert planned("llama-3-8b", "half", 32, 40.0)["seconds"] == pytest.approx(bare + 32 * 40)


@pytest.mark.parametrize(("cell", "minutes"), list(zip(TABLE_1, (16.0, 15.5, 12.5, 12.3), strict=True)))
def test_full_fine_tuning_of_the_layers_alone_is_the_papers_full_ft(cell: str, minutes: float) -> None:
    """Three rounds of all layers in one block, the same computing a round; the paper counts the last download too."""
    model, codec, turns, fedbcd, _ = TABLE_1[cell]
    block, layers = planned(model, codec, turns), planned(model, codec, 3, blocks=1)
    last = {k: p["up"] / p["turns"] / 10 / 100e6 for k, p in {"block": block, "layers": layers}.items()}
    seconds = (fedbcd * 60 - block["seconds"] - last["block"]) / turns
    assert (layers["seconds"] + last["layers"] + 3 * seconds) / 60 == pytest.approx(minutes, rel=0.01)


def test_a_plan_of_a_large_model_touches_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lossy downlink decodes nothing; packets are as large as the formula says."""
    monkeypatch.setattr(Half, "unpack", lambda *_: pytest.fail("a plan decoded a tensor"))
    p = planned("llama-3-8b", "half", 4, 1.0)
    assert p["up"] == pytest.approx(4 * 10 * 436_224_000 * 2, rel=1e-4)
    assert p["down"] == pytest.approx(3 * 10 * 436_224_000 * 2, rel=1e-4)
    assert planned("llama-3-8b", "int8", 1)["up"] == pytest.approx(10 * 436_224_000, rel=1e-3)


def test_methods_with_state_of_their_own_are_planned_as_they_step() -> None:
    """FLoRA's download is the stack of all clients' adapters; FedCyBGD's grows with the blocks that were updated."""
    p = planned("llama-3.2-3b", "raw", 3, name="flora", rank=4)
    assert p["down"] / 2 == pytest.approx(10 * p["up"] / 3, rel=0.02)
    p = planned("llama-3.2-3b", "raw", 4, schedule="cyclic", name="fedcybgd", blocks=14)
    assert p["down"] == pytest.approx((0 + 1 + 2 + 3) * p["up"] / 4, rel=1e-3)


@pytest.mark.parametrize("meth", ["flora", "slora"])
def test_weights_that_a_model_keeps_as_in_x_out_are_planned_too(meth: str) -> None:
    """GPT-2's Conv1D: methods see its weights as out x in, whichever the module has."""
    base = {"model": {"source": "tiny:gpt2"}, "data": {"source": "docstrings"}, "turns": 3, "clients": {"count": 2}}
    assert plans.clock(parse(base | {"method": METHODS[meth]}))["up"] > 0


METHODS: dict[str, Any] = {n: {"name": n} for n in method.names()}
METHODS |= {n: {"name": n, "rank": 2} for n in ("fedit", "ffa-lora", "flora")}
METHODS["slora"] |= {"rank": 2, "sparse_turns": 2}
METHODS["florist"] |= {"rank": 2, "energy": 1.0}  # below that it depends on values how much a stack keeps
METHODS["fedbcd, guided"] = {"name": "fedbcd", "order": "gradient"}
METHODS["fedavg, adam"] = {"name": "fedavg", "server_optimizer": "adam"}
SETTINGS: dict[str, tuple[dict[str, Any], Any, Any]] = {  # schedule, codecs up and down
    "sync": ({"name": "sync"}, "raw", "raw"),
    "sync, a part": ({"name": "sync", "cohort": 2}, "half", "int8"),
    "overlap": ({"name": "overlap"}, "half", "int8"),
    "overlap, a part": ({"name": "overlap", "cohort": 2}, {"name": "feedback", "codec": "int8"}, "raw"),
    "cyclic": ({"name": "cyclic"}, "raw", "half"),
    "fedasync": ({"name": "fedasync"}, {"name": "qrcp", "rank": 2}, "half"),
    "fedbuff": ({"name": "fedbuff", "buffer": 2}, {"name": "cur", "rank": 2}, "int4"),
    "fadas": ({"name": "fadas", "buffer": 2}, {"name": "svd", "rank": 2}, "raw"),
    "fedfa": ({"name": "fedfa", "form": "model"}, {"name": "feedback", "codec": {"name": "pca", "rank": 2}}, "raw"),
    "ca2fl": ({"name": "ca2fl", "buffer": 2, "caches": "clients"}, {"name": "pca", "rank": 2}, {"name": "pca", "rank": 2}),
    "safa": ({"name": "safa"}, {"name": "topk", "share": 0.1}, "raw"),
    "port": ({"name": "port", "buffer": 2}, "sign", "raw"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("meth", METHODS)
def test_a_plan_is_the_run(meth: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of both directions and virtual seconds, to the last byte; where a codec leaves out rows that happen to be
    zero (embeddings of tokens nobody met, adapters that have not begun), a plan that knows no values may say more."""
    sched, up, down = SETTINGS[setting]
    each = [{k: getattr(d, k) for k in ("step_seconds", "down_mb_s", "up_mb_s", "latency")} for d in DEVICES[:3]]
    try:
        recipe = parse(
            {
                "model": {"source": "tiny:llama"}, "data": {"source": "docstrings", "client_heldout": 1}, "turns": 4, "seed": 7,
                "method": METHODS[meth], "schedule": sched, "codec": {"up": up, "down": down},
                "training": {"local_steps": 2}, "clients": {"count": 3, "each": each},
            }
        )  # fmt: skip
    except RecipeError as error:
        pytest.skip(f"refused: {error}")
    arch = "gpt2" if meth == "fedpeft-bias" else "llama"  # which has no biases
    w = language(arch, meth=METHODS[meth], sched=sched, up=up, down=down, turns=4, steps=2)
    w.simulation.run()
    monkeypatch.setattr(plans, "skeleton", lambda *_, **__: tiny(arch, vocab=64, layers=4, width=8)[0])
    p, ledger = plans.clock(recipe), w.simulation.ledger
    if any(kind in f"{w.simulation.up} {w.simulation.downlink.codec}" for kind in ("pca", "svd", "qrcp", "cur")):
        for k in ("down", "up"):
            assert 0.7 * p[k] <= ledger.bytes[k] <= 1.03 * p[k]
        assert 0.7 * p["seconds"] <= w.simulation.clock.now <= 1.03 * p["seconds"]
        return
    assert {k: p[k] for k in ledger.bytes} == ledger.bytes
    assert p["seconds"] == w.simulation.clock.now
