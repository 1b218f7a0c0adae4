"""How models are cut into blocks, and the order that gradients give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import language, quadratic

from hocket.errors import RecipeError
from hocket.methods import Update, method
from hocket.methods.blocks import LAYER
from hocket.methods.fedbcd import ORDER
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.tree import digest


def bcd(**more: Any) -> dict[str, Any]:
    return {"name": "fedbcd", "layers_per_block": 1, **more}


@pytest.mark.parametrize(("blocks", "sizes"), [(1, [7]), (2, [4, 3]), (3, [3, 2, 2]), (7, [1] * 7)])
def test_a_number_of_blocks_is_as_equal_as_can_be(blocks: int, sizes: list[int]) -> None:
    cut = method.build({"name": "fedbcd", "blocks": blocks}).cut(f"layers.{i}.w" for i in range(7))  # type: ignore[attr-defined]
    assert [len(b) for b in cut] == sizes


def test_layer_one_is_not_layer_ten() -> None:
    names = [f"model.layers.{i}.w" for i in range(20)]
    cut = method.build(bcd()).cut(names)  # type: ignore[attr-defined]
    assert len(cut) == 20
    assert cut[1] == ("model.layers.1.w",)
    assert cut[10] == ("model.layers.10.w",)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_blocks_of_every_size_and_half(arch: str, layers: int, partial: bool) -> None:
    m = method.build({"name": "fedbcd", "layers_per_block": layers, "partial": partial, "extras": True})
    task = "classification" if arch == "bert" else "causal"
    model, _ = tiny(arch, task, vocab=64, layers=4, width=16)
    start = make(model, m, task, 0).start()
    cut = m.cut(start)  # type: ignore[attr-defined]
    assert sorted(k for b in cut for k in b) == sorted(start)  # every tensor in one block
    inner = [b for b in cut if LAYER.search(b[0])]
    assert "embed" in cut[0][0] or "wte" in cut[0][0] or "wpe" in cut[0][0]  # embeddings come first
    assert len(inner) == 4 // layers * (2 if partial else 1)
    if partial:
        words = {"llama": "self_attn", "gpt2": ".attn.", "bert": "attention"}[arch]
        assert all(any(words in k for k in b) for b in inner[::2])
        assert not any(words in k and "attention.output.LayerNorm" not in k and "layernorm" not in k for b in inner[1::2] for k in b)


def gradient_norms(w: Any, scaled: bool) -> list[float]:
    """|grad_b f_i| / sqrt(d_b), averaged over clients, by autograd on the quadratics themselves."""
    model, start = w.trainer.view.model, w.iterates[0]
    n, sizes = len(model.layers), [len(layer.w) for layer in model.layers]
    norms = [0.0] * n
    for c in range(len(model.H)):
        x = torch.cat([start[f"layers.{i}.w"] for i in range(n)])
        for b, g in enumerate((model.H[c] @ (x - model.c[c])).split(sizes)):
            norms[b] += float(g.norm()) / (sizes[b] ** 0.5 if scaled else 1) / len(model.H)
    return norms


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_order_the_blocks(scaled: bool) -> None:
    order = "gradient_scaled" if scaled else "gradient"
    w = quadratic(meth=bcd(order=order), turns=8, layers=4)
    w.iterates = [w.final]
    norms = gradient_norms(w, scaled)
    expected = sorted(range(4), key=lambda b: -norms[b])
    w.run()
    assert w.simulation.server.state["params"][ORDER].tolist() == expected
    trained = [next(iter(w.deltas[0, t])) for t in range(8)]
    assert trained == [f"layers.{b}.w" for b in expected * 2]
    assert ORDER not in w.final


def test_the_pass_before_the_first_turn_is_charged_and_waited_for() -> None:
    for sched in ("sync", {"name": "overlap", "staleness": 2}):
        plain, guided = (quadratic(meth=bcd(order=o), sched=sched, turns=4).run().simulation for o in ("sequential", "gradient"))
        step = max(d.step_seconds for d in plain.devices[:3])
        assert guided.clock.now > plain.clock.now + 3 * step  # one more job of three steps for everybody
        assert guided.server.version == plain.server.version + 1
        assert guided.ledger.bytes["up"] > plain.ledger.bytes["up"]


def test_ahead_of_the_order_nobody_trains() -> None:
    w = quadratic(meth=bcd(order="gradient"), sched={"name": "overlap", "staleness": 2}, turns=4)
    jobs = w.simulation.server.poll()
    assert {j.turn for j in jobs} == {0}
    assert w.simulation.server.poll() == []


def test_training_turns_count_from_zero_whatever_came_before() -> None:
    w = quadratic(meth=bcd(order="gradient"), turns=4, training={"schedule": "linear"}).run()
    assert sorted({t for _, t in w.deltas}) == [0, 1, 2, 3]
    assert w.simulation.server.version == 5


def test_an_order_from_a_client_is_not_taken_when_none_was_asked() -> None:
    m = method.build(bcd(order="gradient"))
    state = m.init({f"layers.{i}.w": torch.zeros(2) for i in range(3)}, 0)
    norms = Update(0, 0, 0, 0, {ORDER: torch.tensor([1.0, 3.0, 2.0])})
    assert m.check(state, norms) is None
    state = m.step(state, [norms], [1.0])
    assert state["params"][ORDER].tolist() == [1, 2, 0]
    assert "not for now" in str(m.check(state, norms))
    assert "not for now" in str(method.build(bcd()).check(state, norms))


def test_gradient_norms_are_those_of_autograd_and_leave_nothing_behind() -> None:
    from hocket.methods import Local

    w = language(meth=bcd(), clients=1, steps=1, training={"batch_size": 3})
    start, trainer = w.final, w.trainer
    local = Local(0, start, {}, 0, 1, 0, 7, trainer)
    norms = trainer.gradient_norms(local, start)
    (batch,) = next(trainer._batches(local))
    model = trainer.view.model
    trainer.view.place(start)
    params = [trainer.view.params[k].requires_grad_(True) for k in sorted(start)]
    total, count = trainer._loss(model, batch)
    grads = torch.autograd.grad(total / (batch["labels"].shape[0] * (batch["labels"].shape[1] - 1)), params)
    for k, g in zip(sorted(start), grads, strict=True):
        assert norms[k] == pytest.approx(float(g.norm()), rel=1e-5)
    assert all(p.grad is None for p in params)


def test_a_block_starts_with_an_empty_optimizer_and_kept_state_is_the_clients_own() -> None:
    """BAdam: state is dropped at every switch; with one block that is never left, nothing differs from local AdamW."""
    once = language(clients=1, meth={"name": "fedbcd", "layers_per_block": 4}, turns=1, steps=6).run()
    keep = {"optimizer_state": "keep"}
    twice = language(clients=1, meth={"name": "fedbcd", "layers_per_block": 4}, turns=2, steps=3, training=keep).run()
    reset = language(clients=1, meth={"name": "fedbcd", "layers_per_block": 4}, turns=2, steps=3).run()
    assert not any(k.startswith("optimizer/") for k in reset.simulation.memory)
    assert digest(twice.final) != digest(reset.final)
    assert once.simulation.server.version == 1


def test_a_model_that_cannot_be_cut_is_an_error_before_anybody_is_asked() -> None:
    for name in ("fedbcd", "fedcybgd"):
        with pytest.raises(RecipeError, match=r"method\.blocks: 9 blocks for 4 layers"):
            quadratic(meth={"name": name, "blocks": 9}, layers=4)
        with pytest.raises(RecipeError, match="no layers"):
            method.build({"name": name}).init({"w": torch.zeros(2)}, 0)


def test_a_new_head_must_be_in_a_block() -> None:
    model, _ = tiny("bert", "classification", vocab=64, layers=2, width=16)
    with pytest.raises(RecipeError, match=r"method\.extras"):
        make(model, method.build(bcd()), "classification", 0)


def test_evaluations_count_training_turns() -> None:
    seen: list[int] = []
    w = quadratic(meth=bcd(order="gradient"), turns=4, evaluate=lambda p: {"loss": 0.0}, evaluate_every=2)
    w.simulation.ledger.listener = lambda r: seen.append(r["version"]) if r["what"] == "eval" else None
    w.run()
    assert seen == [0, 3, 5]
