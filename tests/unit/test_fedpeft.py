"""FedPEFT: small parts alone move and travel; every kind of adapter is the same everywhere and opens in peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType
from transformers import AutoModelForSequenceClassification
from worlds import assemble, collate, language, tokens

from hocket import run
from hocket.errors import RecipeError, StoreError
from hocket.evaluate import heldout
from hocket.experiment import Experiment
from hocket.export import export
from hocket.methods import method
from hocket.models import load
from hocket.models.tiny import tiny
from hocket.models.views import UNFIT, View, make
from hocket.plan import clock
from hocket.recipe import parse
from hocket.report import read
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, digest, nbytes

FIT = {  # kind: options that a model of width 16 needs, architecture if llama will not do
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "beft": {}, "boft": {}, "c3a": {"block_size": 4}, "cartridge": {"num_virtual_tokens": 4}, "deft": {}, "delora": {},
    "fourierft": {"n_frequency": 20}, "glora": {}, "gralora": {}, "hira": {}, "hra": {}, "ia3": {}, "lily": {},
    "ln_tuning": {}, "loha": {}, "lokr": {}, "miss": {"r": 4}, "oft": {}, "peanut": {},
    "prefix_tuning": {"num_virtual_tokens": 4}, "pvera": {}, "randlora": {"r": 4}, "road": {"group_size": 8},
    "shadow": {}, "supertuning": {}, "tinylora": {}, "trainable_tokens": {"token_indices": [5, 6]}, "unilora": {},
    "vblora": {"num_vectors": 16, "vector_length": 8}, "vera": {}, "waveft": {"n_frequency": 40},
}  # fmt: skip


def spec(kind: str, **options: Any) -> dict[str, Any]:
    return {"name": "fedpeft", "adapter": kind, "options": {**FIT[kind], **options}}


def view_of(kind: str, seed: int = 7, arch: str = "llama", task: str = "causal") -> View:
    model, _ = tiny(arch, task, vocab=64, layers=2, width=16)
    return make(model, method.build(spec(kind)), task, seed)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.stack(tokens(9, 4)), attention_mask=torch.ones(4, 12)).logits


def everything(view: View) -> Tree:
    """Parameters and buffers, also those that no file holds."""
    return {**{k: p.data for k, p in view.model.named_parameters()}, **{f"b {k}": b for k, b in view.model.named_buffers()}}


def test_every_kind_of_peft_is_taken_or_refused_with_a_reason() -> None:
    assert {t.value.lower() for t in PeftType} == FIT.keys() | UNFIT.keys()
    assert not FIT.keys() & UNFIT.keys()


@pytest.mark.parametrize("kind", FIT)
def test_a_kind_trains_by_averaging_and_opens_in_peft(kind: str, tmp_path: Path) -> None:
    """Two rounds of three clients. What travels determines the model: put into another process's fresh adapter, or into
    peft's from its own file, it gives the same logits; frozen parts and buffers stay as the seed drew them."""
    torch.set_num_threads(1)
    view = view_of(kind)
    frozen = {k: v.clone() for k, v in everything(view).items() if k not in {n for n, p in names(view)}}
    config = Training.model_validate({"lr": 2e-2, "local_steps": 3, "batch_size": 2})
    trainer = TorchTrainer(view, [tokens(c, 4) for c in range(3)], collate, config)
    w = assemble(view, trainer, [4, 4, 4], method.build(spec(kind)), "sync", 2, "raw", "raw")
    batch, start = collate([t for c in range(3) for t in tokens(c, 4)]), dict(w.final)
    before = trainer.loss(start, batch)
    w.simulation.run()
    assert trainer.loss(w.final, batch) < before
    assert w.simulation.ledger.bytes["up"] < 6 * (nbytes(start) + 200 * len(start) + 300)
    assert all(torch.equal(v, everything(view)[k]) for k, v in frozen.items())
    view.place(w.final)
    want = logits(view.model)
    torch.manual_seed(123)  # another process: its global generator is elsewhere
    other = view_of(kind)
    assert digest(dict(other.start())) == digest(start)
    other.place(w.final)
    assert torch.allclose(logits(other.model), want, atol=1e-5)
    view.model.save_pretrained(tmp_path, save_embedding_layers=False)
    opened = PeftModel.from_pretrained(tiny("llama", vocab=64, layers=2, width=16)[0], tmp_path)
    assert torch.allclose(logits(opened), want, atol=1e-5)


def names(view: View) -> list[tuple[str, Any]]:
    """Model names of what the view holds."""
    ours = {id(p) for p in view.params.values()}
    return [(n, p) for n, p in view.model.named_parameters() if id(p) in ours]


@pytest.mark.parametrize("kind", ["vera", "loha", "unilora", "fourierft", "prefix_tuning", "pvera"])
def test_the_run_s_seed_draws_what_is_random_and_nothing_else_is_drawn_from(kind: str) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    a, b, c = view_of(kind), view_of(kind), view_of(kind, seed=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert digest(everything(a)) == digest(everything(b)) != digest(everything(c))


@pytest.mark.parametrize("kind", ["ia3", "vera", "lokr"])
def test_a_new_head_is_trained_and_exported_with_the_adapter(kind: str, tmp_path: Path) -> None:
    r = recipe(tmp_path, spec(kind))
    run.start(r, tmp_path / "run")
    e = Experiment(r)
    assert any("classifier" in k for k in e.view.params)
    assert export(tmp_path / "run", tmp_path / "out") == "adapter"
    base = load("tiny:bert", task="classification", num_labels=2, seed=r.seed).model
    opened = PeftModel.from_pretrained(base, tmp_path / "out")
    last = read(tmp_path / "run").evals[-1]
    assert heldout(opened, e.data.heldout, e.collate)["loss"] == pytest.approx(last["loss"], rel=1e-5)
    if kind != "vera":
        assert export(tmp_path / "run", tmp_path / "whole", merge=True) == "model"
        whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
        assert heldout(whole, e.data.heldout, e.collate)["loss"] == pytest.approx(last["loss"], rel=1e-4)


def recipe(tmp_path: Path, meth: Any, source: str = "tiny:bert", **more: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    words = ("good film", "bad film", "fine song", "dull song")
    lines = [{"text": f"{words[i % 4]} number {i}", "label": int(i % 4 in (0, 2))} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return parse({
        "turns": 2, "model": {"source": source, "task": "classification"}, "method": meth,
        "data": {"source": str(path), "max_length": 32}, "clients": {"count": 2},
        "training": {"local_steps": 2, "lr": 5e-3}, **more,
    })  # fmt: skip


@pytest.mark.parametrize("kind", ["fourierft", "waveft", "c3a"])
def test_where_weights_are_linear_in_it_the_mean_of_adapters_is_that_of_the_weights(kind: str) -> None:
    """Delta W of the mean of phi_i against the mean of Delta W(phi_i), in float64; for hira's factors it is not."""
    for k, exact in ((kind, True), ("hira", False)):
        view = view_of(k)
        view.model.double()
        module = next(m for n, m in view.model.named_modules() if n.endswith("layers.1.self_attn.q_proj"))
        start = view.start()
        draws = [{n: torch.randn(v.shape, generator=torch.Generator().manual_seed(i)).double() for n, v in start.items()} for i in range(3)]
        weights = []
        for tree in [*draws, {n: sum(d[n] for d in draws) / 3 for n in start}]:
            view.place(tree)
            weights.append(module.get_delta_weight("default").detach().clone())
        assert torch.allclose(sum(weights[:3]) / 3, weights[3], atol=1e-6) == exact


@pytest.mark.parametrize(
    ("meth", "message"),
    [
        ({"adapter": "ia4"}, r"method\.adapter: peft has no 'ia4'; did you mean 'ia3'.*; there are .*ia3.*vera"),
        ({"adapter": "lora"}, r"method\.adapter: 'lora' is what 'fedit'.*; there are .*loha"),
        ({"adapter": "adalora"}, r"method\.adapter: 'adalora' prunes"),
        ({"adapter": "prompt_tuning"}, r"method\.adapter: 'prompt_tuning' makes rows longer"),
        ({"adapter": "vera", "options": {"rank": 3}}, r"method\.options\.rank: 'vera' has no such field.*there are .*\br\b"),
        ({"adapter": "vera", "options": {"task_type": "X"}}, r"method\.options\.task_type: 'vera' has no such field"),
        ({"adapter": "ia3", "options": {"target_modules": ["nope"]}}, r"method\.options: 'ia3' does not fit LlamaForCausalLM: .*nope"),
        ({"adapter": "c3a", "options": {"block_size": 7}}, r"method\.options: 'c3a' does not fit"),
    ],
)  # fmt: skip
def test_wrong_adapters_say_what_there_is(meth: Any, message: str) -> None:
    model, _ = tiny("llama", vocab=64, layers=2, width=16)
    with pytest.raises(RecipeError, match=message):
        make(model, method.build({"name": "fedpeft", **meth}))


def test_an_adapter_that_no_weight_can_hold_is_not_merged(tmp_path: Path) -> None:
    r = recipe(tmp_path, spec("prefix_tuning"))
    run.start(r, tmp_path / "run")
    with pytest.raises(StoreError, match="leave out --merge"):
        export(tmp_path / "run", tmp_path / "whole", merge=True)
    assert export(tmp_path / "run", tmp_path / "out") == "adapter"


def test_a_plan_knows_an_adapter_without_weights() -> None:
    """From the configuration alone, a model of 3 billion parameters."""
    for kind, small in (("ia3", True), ("vera", True), ("ln_tuning", True), ("loha", False)):
        r = parse({
            "turns": 1, "model": {"source": "shape:llama-3.2-3b"}, "method": {"name": "fedpeft", "adapter": kind},
            "data": {"source": "docstrings"}, "clients": {"count": 2},
        })  # fmt: skip
        p = clock(r)
        assert p["up"] == pytest.approx(2 * 4 * p["trainable"], rel=0.1)
        assert (p["trainable"] < 1e-3 * p["total"]) == small


# --- biases -----------------------------------------------------------------------------------------------------------
def test_only_biases_move_and_travel() -> None:
    w = language("gpt2", meth="fedpeft-bias", turns=2)
    before = {k: p.clone() for k, p in w.trainer.view.model.named_parameters()}
    start = dict(w.final)
    assert start
    assert all(k.endswith("bias") for k in start)
    assert {k for k in before if k.endswith("bias")} == set(start)
    w.simulation.run()
    assert w.simulation.ledger.bytes["up"] <= 6 * (nbytes(start) + 120 * len(start) + 300)
    assert all(not torch.equal(w.final[k], start[k]) for k in start)
    w.trainer.place(w.final)
    after = dict(w.trainer.view.model.named_parameters())
    assert all(torch.equal(after[k], before[k]) for k in before if not k.endswith("bias"))


def test_it_is_fedavg_on_the_biases() -> None:
    """The same bits as FedAvg whose clients train nothing else."""

    class Biases(type(method.build("fedavg"))):  # type: ignore[misc]
        def trains(self, local: Any) -> Any:
            return lambda name: name.endswith("bias")

    a, b = language("gpt2", meth="fedpeft-bias", turns=3), language("gpt2", meth=Biases(), turns=3)
    a.simulation.run()
    b.simulation.run()
    assert digest(a.final) == digest({k: b.final[k] for k in a.final})


def test_biases_come_with_a_new_head_and_are_exported_whole(tmp_path: Path) -> None:
    r = recipe(tmp_path, "fedpeft-bias")
    run.start(r, tmp_path / "run")
    e = Experiment(r)
    assert {k for k in e.view.params if not k.endswith("bias")} == {"classifier.weight"}
    assert set(e.method.beside(e.view.params)) == {"classifier.weight", "classifier.bias"}  # counted apart
    assert 0 < read(tmp_path / "run").summary()["beside_bytes"] < moved_bytes(tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out") == "model"
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    last = read(tmp_path / "run").evals[-1]
    assert heldout(opened, e.data.heldout, e.collate)["loss"] == pytest.approx(last["loss"], rel=1e-5)


def moved_bytes(path: Path) -> int:
    s = read(path).summary()
    return int(s["up_bytes"] + s["down_bytes"])


def test_a_model_without_biases_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"method\.name: LlamaForCausalLM has no biases"):
        language("llama", meth="fedpeft-bias")
    model, _ = tiny("llama", "classification", vocab=64, layers=2, width=16)
    with pytest.raises(RecipeError, match=r"method\.name: LlamaForSequenceClassification has no biases"):
        make(model, method.build("fedpeft-bias"), "classification")
