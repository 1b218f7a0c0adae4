"""The local loop and the views: what moves, what does not, what it costs, and that it is the plain loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import collate, language, tokens

from hocket.entries import Trained
from hocket.errors import Interrupted, RecipeError
from hocket.methods import Local, method
from hocket.models.forward import loss_sum
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import digest


def build(
    arch: str = "llama", meth: Any = "fedavg", **config: Any
) -> tuple[Any, TorchTrainer, dict[str, torch.Tensor]]:
    model, _ = tiny(arch, vocab=64, layers=4, width=16)
    view = make(model, method.build(meth), "causal", 3)
    trainer = TorchTrainer(
        view, [tokens(0, 6)], collate, Training.model_validate({"lr": 1e-2, "batch_size": 2, **config})
    )
    return view, trainer, view.start()


def local(trainer: Any, **values: Any) -> Local:
    return Local(
        **{
            "client": 0,
            "cache": {},
            "memory": {},
            "turn": 0,
            "turns": 4,
            "visit": 0,
            "seed": 1,
            "trainer": trainer,
            **values,
        }
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_fit_is_the_plain_loop(arch: str) -> None:
    """Same batches, torch's own AdamW and clipping: the same bits."""
    view, trainer, start = build(arch, local_steps=3, weight_decay=0.1)
    batches = [micro[0] for micro in trainer._batches(local(trainer))]
    delta = local(trainer).fit(start)
    model, _ = tiny(arch, vocab=64, layers=4, width=16)
    model.train()
    for p in model.parameters():
        p.requires_grad_(True)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([named[k] for k in sorted(named)], 1e-2, weight_decay=0.1, fused=True)
    for batch in batches:
        total, count = loss_sum(model, batch)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_([named[k] for k in sorted(named)], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for k in delta:
        assert torch.equal(start[k] + delta[k], start[k] + (named[k].detach() - start[k]))


def test_start_values_and_the_model_are_left_as_they_were() -> None:
    view, trainer, start = build(local_steps=2)
    before, pointers = digest(start), {k: p.data_ptr() for k, p in view.params.items()}
    delta = local(trainer).fit(start, lambda k: "layers.1." in k)
    assert digest(start) == before
    assert {k: p.data_ptr() for k, p in view.params.items()} == pointers  # nothing was copied, nothing stays loose
    assert all("layers.1." in k for k in delta)
    assert delta
    assert not any(p.requires_grad or p.grad is not None for p in view.model.parameters())


def test_no_second_copy_of_what_is_frozen() -> None:
    view, trainer, start = build(local_steps=1)
    assert all(view.params[k].data_ptr() == start[k].data_ptr() for k in start)
    other = {k: v + 1 for k, v in start.items()}
    view.place(other)
    assert all(view.params[k].data_ptr() == other[k].data_ptr() for k in other)


def test_autograd_stops_below_the_lowest_trained_layer() -> None:
    """Count what is kept for the backward pass: training the last layers must keep clearly less than the first."""

    def kept(layers: tuple[str, ...]) -> int:
        view, trainer, start = build(local_steps=1)
        total = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            local(trainer).fit(start, lambda k: any(f"layers.{i}." in k for i in layers))
        return total

    assert kept(("2", "3")) < 0.75 * kept(("0", "1"))


def test_accumulation_is_one_larger_batch() -> None:
    grads = {}
    for name, config in {"one": {"batch_size": 4}, "two": {"batch_size": 2, "accumulation": 2}}.items():
        _, trainer, start = build(local_steps=1, optimizer="sgd", clip=None, **config)
        grads[name] = local(trainer).fit(start)
    assert all(torch.allclose(grads["one"][k], grads["two"][k], atol=1e-6) for k in grads["one"])


def test_clipping_bounds_the_step() -> None:
    _, trainer, start = build(local_steps=1, optimizer="sgd", lr=1.0, clip=1e-3)
    delta = local(trainer).fit(start)
    assert math.sqrt(sum(float(d.double().square().sum()) for d in delta.values())) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.853553, 0.5, 0.146447])],
)
def test_rates_across_turns(schedule: str, rates: list[float]) -> None:
    config = Training.model_validate({"lr": 1.0, "schedule": schedule})
    assert [config.rate(t, 4) for t in range(4)] == pytest.approx(rates, abs=1e-6)


def test_steps_from_epochs() -> None:
    config = Training.model_validate({"local_epochs": 2, "batch_size": 4, "accumulation": 2})
    assert [config.steps(n) for n in (1, 8, 9)] == [1, 2, 3]


def test_optimizer_state_is_kept_in_the_clients_memory_only_when_asked() -> None:
    """Kept state makes two jobs of two steps one job of four."""
    results = {}
    for keep in ("reset", "keep"):
        _, trainer, start = build(local_steps=2, optimizer_state=keep, clip=None)
        me = local(trainer)
        first = me.fit(start)
        after = {k: start[k] + first[k] for k in start}
        second = local(trainer, memory=me.memory, visit=1).fit(after)
        results[keep] = {k: first[k] + second[k] for k in start}
        assert bool(me.memory) == (keep == "keep")
    assert digest(results["reset"]) != digest(results["keep"])
    _, trainer, start = build(local_steps=2, optimizer_state="keep", clip=None)
    me = local(trainer)
    after = {k: start[k] + d for k, d in me.fit(start).items()}
    steps = {k: float(v) for k, v in me.memory.items() if k.startswith("optimizer/step/")}
    assert set(steps.values()) == {2.0}
    local(trainer, memory=me.memory, visit=1).fit(after)
    assert {float(v) for k, v in me.memory.items() if k.startswith("optimizer/step/")} == {4.0}


def test_losses_that_are_not_finite_are_skipped_counted_and_reported() -> None:
    view, trainer, start = build(local_steps=4)
    calls = 0

    def poisoned(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        total, count = loss_sum(model, batch)
        return (total * float("nan") if calls in (2, 3) else total), count

    trainer._loss = poisoned
    me = local(trainer)
    delta = me.fit(start)
    assert me.metrics["skipped"] == 2
    assert me.metrics["steps"] == 2
    assert math.isfinite(me.metrics["loss"])
    assert all(torch.isfinite(d).all() for d in delta.values())


def test_an_interrupted_job_has_not_happened() -> None:
    view, trainer, start = build(local_steps=5)
    before, asked = digest(start), 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    trainer.interrupted = stop
    with pytest.raises(Interrupted):
        local(trainer).fit(start)
    trainer.interrupted = lambda: False
    assert digest(start) == before
    delta = local(trainer).fit(start)
    _, fresh, fresh_start = build(local_steps=5)
    assert digest(delta) == digest(local(fresh).fit(fresh_start))


def test_draws_depend_on_client_and_visit_not_on_what_ran_before() -> None:
    _, trainer, start = build(local_steps=2)
    torch.manual_seed(1)
    a = digest(local(trainer).fit(start))
    torch.rand(100)
    assert digest(local(trainer).fit(start)) == a
    assert digest(local(trainer, visit=1).fit(start)) != a


def test_every_row_of_a_pass_is_used_once() -> None:
    _, trainer, _ = build(local_steps=3)
    rows = [tuple(r.tolist()) for micro in trainer._batches(local(trainer)) for r in micro[0]["input_ids"]]
    assert sorted(rows) == sorted(tuple(r.tolist()) for r in tokens(0, 6))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    view = make(model, method.build("fedavg"), "causal", 3)
    trainer = TorchTrainer(view, [tokens(0, 6)], collate, Training.model_validate({"lr": 1e-2, "batch_size": 2}))
    _, plain, start = build()
    a, b = local(trainer).fit(view.start()), local(plain).fit(start)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


# --- views ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_lora_trains_its_factors_only_on_linear_and_conv1d(arch: str) -> None:
    view, trainer, start = build(arch, {"name": "fedit", "rank": 2, "alpha": 8})
    assert start
    assert all(".lora_A." in k or ".lora_B." in k for k in start)
    assert not any("default" in k for k in start)
    delta = local(trainer).fit(start)
    assert any(d.abs().max() > 0 for k, d in delta.items() if ".lora_B." in k)
    frozen = {n for n, p in view.model.named_parameters() if "lora" not in n}
    assert frozen


def test_ffa_lora_freezes_a_and_it_is_common_to_all() -> None:
    world = language(meth={"name": "ffa-lora", "rank": 2}).run()
    a = {k: v for k, v in world.iterates[0].items() if ".lora_A." in k}
    assert a
    assert digest({k: world.final[k] for k in a}) == digest(a)
    for delta in world.deltas.values():
        assert all(".lora_B." in k for k in delta)
    # the mean of B_i A is the mean of B_i times A, exactly: row space of the update lies in that of A
    for k in (k for k in world.final if ".lora_B." in k):
        update = world.final[k] @ world.final[k.replace("lora_B", "lora_A")]
        basis = torch.linalg.qr(world.final[k.replace("lora_B", "lora_A")].T).Q
        assert float((update - update @ basis @ basis.T).abs().max()) < 1e-6


def test_fedit_error_is_the_covariance_of_the_factors() -> None:
    """mean(B_i A_i) - mean(B_i) mean(A_i) = mean((B_i - B)(A_i - A)), in float64."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    A, B, p = draw(5, 2, 7), draw(5, 6, 2), torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64) / 15
    mA, mB = torch.einsum("i,irk->rk", p, A), torch.einsum("i,ior->or", p, B)
    from hocket.combine import mean

    trees = [{"A": a, "B": b} for a, b in zip(A, B, strict=True)]
    out = dict(mean(trees, [1, 2, 3, 4, 5]))
    assert torch.allclose(out["A"], mA, atol=1e-14)
    ideal = torch.einsum("i,ior,irk->ok", p, B, A)
    assert torch.allclose(ideal - out["B"] @ out["A"], torch.einsum("i,ior,irk->ok", p, B - mB, A - mA), atol=1e-13)


def test_lora_start_depends_on_the_seed_and_the_name_alone() -> None:
    starts = [digest(build(meth={"name": "fedit", "rank": 2})[2]) for _ in range(2)]
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    other = digest(make(model, method.build({"name": "fedit", "rank": 2}), "causal", 4).start())
    assert starts[0] == starts[1] != other


def test_wrong_targets_name_the_modules_there_are() -> None:
    model, _ = tiny("llama", vocab=64, layers=2, width=16)
    with pytest.raises(RecipeError, match=r"method\.targets.*q_proj"):
        make(model, method.build({"name": "fedit", "targets": ["qkv"]}), "causal", 0)


def test_rank_and_alpha_patterns_are_data() -> None:
    model, _ = tiny("llama", vocab=64, layers=2, width=16)
    m = method.build({"name": "fedit", "rank": 2, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 2.0}})
    start = make(model, m, "causal", 0).start()
    assert {v.shape[0] for k, v in start.items() if "q_proj.lora_A" in k} == {2}
    assert {v.shape[0] for k, v in start.items() if "v_proj.lora_A" in k} == {4}


@pytest.mark.parametrize(("partial", "extras", "count"), [(False, False, 2), (True, False, 4), (False, True, 2)])
def test_blocks_partition_the_view(partial: bool, extras: bool, count: int) -> None:
    m = method.build({"name": "fedbcd", "layers_per_block": 2, "partial": partial, "extras": extras})
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    start = make(model, m, "causal", 0).start()
    blocks = m.cut(start)  # type: ignore[attr-defined]
    assert sorted(k for b in blocks for k in b) == sorted(start)
    assert len([b for b in blocks if any("layers" in k for k in b)]) == count
    assert extras == any("embed" in k for k in start)
    if partial:
        assert {"attn" in k or "input_layernorm" in k for k in blocks[0]} == {True}
        assert all("mlp" in k or "post_attention" in k for k in blocks[1])


@pytest.mark.parametrize("order", ["shuffled", "replacement", "sequential", "reverse"])
def test_orders_of_blocks(order: str) -> None:
    m = method.build({"name": "fedbcd", "order": order})
    turns = [m.block_of(t, 5, 11) for t in range(20)]  # type: ignore[attr-defined]
    if order == "replacement":
        assert set(turns) <= set(range(5))
        assert sorted(turns[:5]) != [0, 1, 2, 3, 4] or sorted(turns[5:10]) != [0, 1, 2, 3, 4]
    else:
        assert all(sorted(turns[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    if order == "sequential":
        assert turns[:5] == [0, 1, 2, 3, 4]
    if order == "reverse":
        assert turns[:5] == [4, 3, 2, 1, 0]
    if order == "shuffled":
        assert turns[:5] != turns[5:10] or turns[:5] != turns[10:15]


def test_classification_trains_and_averages_its_head() -> None:
    model, _ = tiny("bert", "classification", vocab=64, layers=2, width=16, num_labels=3)
    view = make(model, method.build({"name": "fedit", "rank": 2}), "classification", 0)
    start = view.start()
    assert any("classifier" in k for k in start)
    rows = [{"ids": t, "label": i % 3} for i, t in enumerate(tokens(0, 6))]

    def batch(chosen: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.stack([r["ids"] for r in chosen])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([r["label"] for r in chosen]),
        }

    trainer = TorchTrainer(view, [rows], batch, Training.model_validate({"lr": 1e-2, "local_steps": 30}))
    me = local(trainer)
    delta = me.fit(start)
    assert any(d.abs().max() > 0 for k, d in delta.items() if "classifier" in k)
    assert me.metrics["examples"] == 120


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_on_a_gpu(precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine: bf16 and fp16 training are for GPUs")
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    view = make(model.cuda(), method.build("fedavg"), "causal", 3)
    trainer = TorchTrainer(view, [tokens(0, 6)], collate, Training.model_validate({"lr": 1e-2, "precision": precision}))
    me = local(trainer)
    delta = me.fit(view.start())
    assert me.metrics["skipped"] <= 2
    assert all(torch.isfinite(d).all() for d in delta.values())


# --- precision ------------------------------------------------------------------------------------------------------
def half(meth: Any = "fedavg", dtype: torch.dtype = torch.bfloat16, **config: Any) -> tuple[Any, TorchTrainer]:
    """A trainer on a model whose weights are in half precision."""
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    view = make(model.to(dtype), method.build(meth), "causal", 3)
    return view, TorchTrainer(
        view, [tokens(0, 6)], collate, Training.model_validate({"lr": 1e-2, "batch_size": 2, **config})
    )


def test_weights_in_bf16_train_on_fp32_masters() -> None:
    """The plain loop of BAdam: masters in fp32, the rest in bf16, arithmetic in bf16; steps far below bf16 survive."""
    view, trainer = half(local_steps=3, lr=1e-6)
    start = trainer.start()
    assert {v.dtype for v in start.values()} == {torch.float32}
    only = lambda k: "layers.2." in k
    delta = local(trainer).fit(start, only)
    assert {d.dtype for d in delta.values()} == {torch.float32}
    assert all(0 < float(d.abs().max()) < 4e-6 for d in delta.values())
    assert {p.dtype for p in view.model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(view.params[k].data, start[k].bfloat16()) for k in start)
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    model.to(torch.bfloat16).train()
    live = {k: p for k, p in sorted(model.named_parameters()) if only(k)}
    for k, p in model.named_parameters():
        p.requires_grad_(k in live)
    for p in live.values():
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(live.values(), 1e-6, weight_decay=0.0, fused=True)
    for micro in trainer._batches(local(trainer)):
        with torch.autocast("cpu", torch.bfloat16):
            total, count = loss_sum(model, micro[0])
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(list(live.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(delta[k], live[k].data - start[k]) for k in live)


def test_a_bf16_model_keeps_one_copy_of_each_value_and_takes_new_ones() -> None:
    view, trainer = half()
    start = trainer.start()
    first = trainer.loss(start, collate(tokens(0, 2)))
    pointers = {k: p.data_ptr() for k, p in view.params.items()}
    local(trainer).fit(start, lambda k: "layers.2." in k)
    assert all(view.params[k].data_ptr() == pointers[k] for k in start if "layers.2." not in k)
    assert torch.equal(trainer.loss(start, collate(tokens(0, 2))), first)
    assert not torch.equal(trainer.loss({k: v * 1.5 for k, v in start.items()}, collate(tokens(0, 2))), first)


def test_a_bf16_model_learns_as_an_fp32_one_does() -> None:
    """The same federation in both precisions; the server's sums are in fp32, so small updates add up."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        _, trainer = half("fedbcd", dtype, local_steps=4, lr=3e-3)
        params, batch = trainer.start(), collate(tokens(0, 6))
        before = float(trainer.loss(params, batch))
        for turn in range(12):
            me = local(trainer, turn=turn, turns=12, visit=turn, cache=params)
            delta = method.build("fedbcd").train(me, params)
            params = params | {k: params[k] + d for k, d in delta.items()}
        ends.append((before, float(trainer.loss(params, batch))))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=0.01)
    assert ends[0][1] < 0.9 * ends[0][0]
    assert ends[1][1] == pytest.approx(ends[0][1], rel=0.02)


def test_lora_on_a_bf16_base() -> None:
    view, trainer = half({"name": "fedit", "rank": 2})
    delta = local(trainer).fit(trainer.start())
    assert {d.dtype for d in delta.values()} == {torch.float32}
    assert any(d.abs().max() > 0 for k, d in delta.items() if ".lora_B." in k)


def test_a_client_keeps_its_loss_scale() -> None:
    """fp16: a job goes on with the scale its client's last job found; other clients have their own."""
    _, trainer = half(dtype=torch.float32, precision="fp16", local_steps=3)
    start, memory = trainer.start(), {}
    me = local(trainer, memory=memory)
    fit = trainer._loss
    trainer._loss = lambda model, batch: (lambda t, n: (t * float("inf"), n))(*fit(model, batch))
    me.fit(start)
    assert me.metrics["skipped"] == 3
    assert memory["scaler/scale"].tolist() == [65536 / 8, 0]
    trainer._loss = fit
    again = local(trainer, memory=memory, visit=1)
    again.fit(start)
    assert again.metrics["skipped"] == 0
    assert memory["scaler/scale"].tolist() == [65536 / 8, 3]
    assert "scaler/scale" not in local(trainer).memory


def test_a_plan_counts_numbers_as_clients_train_them(tmp_path: Path) -> None:
    """Files in bf16 are trained, and travel, in fp32."""
    from hocket.models import export
    from hocket.models.skeleton import skeleton

    model, tokenizer = tiny("llama", vocab=64, layers=2, width=16)
    export(model.to(torch.bfloat16), tokenizer, tmp_path / "m")
    bare = skeleton(tmp_path / "m")
    assert {p.dtype for p in bare.parameters()} == {torch.float32}
    assert {p.device.type for p in bare.parameters()} == {"meta"}


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_norms_and_biases_can_be_spared_from_decay(decay: str) -> None:
    """With a gradient of zero only decay moves a tensor: theta <- (1 - lr lambda) theta a step."""
    w = language(clients=1, steps=2, training={"weight_decay": 0.5, "lr": 1e-2, "decay": decay, "clip": None})
    trainer, start = w.trainer, w.final
    trainer._loss = lambda model, batch: (0.0 * sum(p.sum() for p in model.parameters()), 1)
    delta = trainer.fit(Local(0, start, {}, 0, 1, 0, 7, trainer), start, lambda name: True, 0.0)
    for k, d in delta.items():
        shrinks = decay == "all" or d.ndim > 1
        assert torch.allclose(d, start[k] * ((1 - 5e-3) ** 2 - 1) if shrinks else torch.zeros_like(d), atol=1e-7), k


def test_a_recipe_can_keep_its_weights_in_bf16(stories: Any, tmp_path: Any) -> None:
    """Weights are bf16 in memory, the server's view and every update fp32; the run learns what the fp32 run learns."""
    from hocket.experiment import Experiment
    from hocket.recipe import parse

    data = {
        "turns": 2, "model": {"source": str(stories)}, "method": {"name": "fedbcd", "layers_per_block": 5},
        "data": {"source": "docstrings", "packages": ["peft"], "limit": 40, "heldout_limit": 10, "max_length": 400, "template": "plain"},
        "clients": {"count": 1}, "training": {"lr": 1e-3, "local_steps": 2, "batch_size": 1},
    }  # fmt: skip
    losses = {}
    for dtype in ("fp32", "bf16"):
        e = Experiment(parse(data | {"model": data["model"] | {"dtype": dtype}}))
        state = e.server().state
        assert {v.dtype for v in state["params"].values()} == {torch.float32}
        assert {p.dtype for p in e.view.model.parameters()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
        local = Local(0, state["params"], {}, 0, 1, 0, 0, e.trainer)
        delta = e.method.train(local, state["params"])
        assert {v.dtype for v in delta.values()} == {torch.float32}
        after = {k: v + delta[k] if k in delta else v for k, v in state["params"].items()}
        losses[dtype] = e.evaluate(after)["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_penalty_is_added_once_a_step(arch: str) -> None:
    """With a loss of zero its gradient alone moves what trains, micro-batches or not: theta <- theta - lr lambda theta."""
    view, trainer, start = build(
        arch, "flora", optimizer="sgd", lr=0.1, clip=None, local_steps=2, accumulation=3, batch_size=1
    )
    trainer._loss = lambda model, batch: (0.0 * sum(p.sum() for p in model.parameters()), 1)
    shapes: list[dict[str, Any]] = []

    def penalty(live: Any) -> torch.Tensor:
        shapes.append({k: v.shape for k, v in live.items()})
        return sum(0.5 * v.square().sum() for k, v in live.items() if ".lora_A." in k)

    only = lambda k: ".lora_" in k
    me = local(trainer)
    delta = me.fit(start, only, penalty=penalty)
    assert shapes == [{k: start[k].shape for k in start if only(k)}] * 2
    assert me.metrics["loss"] == 0
    for k, d in delta.items():
        assert torch.allclose(d, start[k] * (0.9**2 - 1) if ".lora_A." in k else torch.zeros_like(d), atol=1e-7), k


def test_a_penalty_shows_conv1d_as_out_by_in() -> None:
    """gpt2 keeps in x out: a merged base is seen, and moves, as the view has it."""
    view, trainer, start = build("gpt2", "flora", optimizer="sgd", lr=1.0, clip=None, local_steps=1)
    trainer._loss = lambda model, batch: (0.0 * sum(p.sum() for p in model.parameters()), 1)
    name = next(k for k in start if k.endswith("c_attn.base_layer.weight"))
    pull = torch.randn(start[name].shape)
    delta = local(trainer).fit(start, lambda k: k == name, penalty=lambda live: (live[name] * pull).sum())
    assert start[name].shape[0] != start[name].shape[1]
    assert torch.allclose(delta[name], -pull, atol=1e-6)


# --- entries ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_entries_move_as_they_would_and_all_others_stay(arch: str, optimizer: str) -> None:
    """Without clipping an entry's path does not depend on the rest: the masked job is the dense one at the entries,
    as long as the others do not move (one step); and nothing else moves, whatever decays."""
    config = {"optimizer": optimizer, "local_steps": 1, "weight_decay": 0.3, "clip": None, "accumulation": 2}
    view, trainer, start = build(arch, "flora", **config)
    only = lambda k: k.endswith("base_layer.weight")
    masks = {
        k: torch.randperm(v.numel(), generator=torch.Generator().manual_seed(3))[: v.numel() // 9].sort().values
        for k, v in start.items()
        if only(k)
    }
    ends: dict[str, torch.Tensor] = {}
    moved = Trained.moved

    def noting(self: Any) -> None:
        moved(self)
        ends.update({k: v.detach().clone() for k, v in self.logical().items()})

    Trained.moved = noting  # type: ignore[method-assign]
    try:
        sparse = local(trainer).fit(start, only, masks=masks)
    finally:
        Trained.moved = moved  # type: ignore[method-assign]
    dense = local(trainer).fit(start, only)
    for k in masks:
        assert sparse[k].shape == masks[k].shape
        assert torch.allclose(sparse[k], dense[k].reshape(-1)[masks[k]], atol=1e-7)
        rest = torch.ones(start[k].numel(), dtype=torch.bool)
        rest[masks[k]] = False
        assert torch.equal(ends[k].reshape(-1)[rest], start[k].reshape(-1)[rest])  # bit for bit, though there is decay
        assert not torch.equal(ends[k], start[k])
        assert torch.equal(view.logical(k).detach(), start[k])  # and the job leaves no trace


def test_a_job_with_entries_is_adamw_on_their_vector() -> None:
    """Three steps with clipping and decay against torch's optimizer on the gathered gradients: moments are the
    entries' alone, the norm is theirs, and gradients are taken where the rest of the weight stands still."""
    view, trainer, start = build("llama", local_steps=3, weight_decay=0.1, clip=0.05, accumulation=2)
    name = "model.layers.1.self_attn.v_proj.weight"
    mask = torch.tensor([0, 3, 17, 100, 101])
    batches = list(trainer._batches(local(trainer)))
    held: list[int] = []
    close = Trained.close
    Trained.close = lambda self: (held.extend(v.numel() for v in self.live.values()), close(self))[1]  # type: ignore
    try:
        delta = local(trainer).fit(start, lambda k: k == name, masks={name: mask})
    finally:
        Trained.close = close  # type: ignore[method-assign]
    assert held == [5]
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    model.train()
    weight = dict(model.named_parameters())[name]
    values = torch.nn.Parameter(start[name].reshape(-1)[mask].clone())
    optimizer = torch.optim.AdamW([values], 1e-2, weight_decay=0.1, fused=True)
    for micro in batches:
        weight.grad = None
        count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
        for b in micro:
            (loss_sum(model, b)[0] / count).backward()
        values.grad = weight.grad.reshape(-1)[mask].clone()
        torch.nn.utils.clip_grad_norm_([values], 0.05)
        optimizer.step()
        weight.data.view(-1)[mask] = values.data
    assert torch.allclose(delta[name], values.data - start[name].reshape(-1)[mask], atol=1e-7)


def test_no_dense_gradient_outlives_the_backward_pass_and_kept_state_is_the_entries() -> None:
    view, trainer, start = build("llama", "flora", optimizer_state="keep", decay="matrices", weight_decay=0.5)
    only = lambda k: k.endswith("base_layer.weight")
    masks = {k: torch.arange(7) for k in start if only(k)}
    me = local(trainer)
    seen: list[Any] = []
    penalty = lambda live: (seen.append([p.grad for p in view.params.values()]), sum(v.sum() * 0 for v in live.values()))[1]
    first = me.fit(start, only, penalty=penalty, masks=masks)
    assert seen
    assert all(g is None for grads in seen for g in grads)
    assert {v.numel() for k, v in me.memory.items() if "exp_avg" in k} == {7}
    second = local(trainer, memory=me.memory, visit=1).fit(start, only, masks=masks)
    assert all(torch.isfinite(second[k]).all() and not torch.equal(first[k], second[k]) for k in masks)


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_of_matrices_is_decay_of_their_entries(decay: str) -> None:
    """The vector of a matrix's entries is no vector of the model."""
    _, trainer, start = build(weight_decay=0.5, decay=decay, clip=None, local_steps=1)
    trainer._loss = lambda model, batch: (0.0 * sum(p.sum() for p in model.parameters()), 1)
    norm, matrix = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    masks = {norm: torch.arange(4), matrix: torch.arange(4)}
    delta = local(trainer).fit(start, lambda k: k in masks, masks=masks)
    assert torch.allclose(delta[matrix], -5e-3 * start[matrix].reshape(-1)[:4], atol=1e-7)
    assert bool(delta[norm].any()) == (decay == "all")


def test_entries_of_a_bf16_model_train_in_fp32() -> None:
    view, trainer = half("flora", local_steps=2, lr=1e-6)
    start, only = trainer.start(), lambda k: k.endswith("base_layer.weight")
    masks = {k: torch.arange(5) for k in start if only(k)}
    delta = local(trainer).fit(start, only, masks=masks)
    assert all(d.dtype == torch.float32 and 0 < float(d.abs().max()) < 4e-6 for d in delta.values())
