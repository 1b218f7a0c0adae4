"""To peft and back: what a run exports is the model it evaluated, and a run begins with the adapter it is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

from hocket import models, run, store
from hocket.errors import HocketError, ModelError, RecipeError, StoreError
from hocket.experiment import Experiment
from hocket.export import export
from hocket.methods import method
from hocket.methods.lora import PREFIX, A, B, LoRA, modules
from hocket.models.adapters import read
from hocket.recipe import Recipe, load, parse
from hocket.tree import Tree, generator

IDS = torch.tensor([[4, 9, 17, 23, 5, 41, 8, 8, 30, 6]])
METHODS = sorted(n for n in method.names() if issubclass(method.get(n), LoRA))
AUTO = {"causal": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


def recipe(folder: Path, source: str = "tiny:gpt2", task: str = "causal", meth: Any = "fedit", **more: Any) -> Recipe:
    """Two clients, two turns, a rate at which much moves."""
    rows = [{"text": f"{['yes', 'no'][i % 2]} {i} {'abcdefg'[i % 7] * 3}"} for i in range(24)]
    if task == "classification":
        rows = [{"sentence": r["text"], "label": r["text"].split()[0]} for r in rows]
    data = folder / f"{task}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    tables: dict[str, Any] = {
        "turns": 2, "model": {"source": source, "task": task, "device": "cpu"},
        "data": {"source": str(data), "max_length": 32, "client_heldout": 2}, "clients": {"count": 2},
        "method": {"name": meth} if isinstance(meth, str) else meth,
        "training": {"lr": 0.03, "batch_size": 4, "local_steps": 3}, "engine": {"threads": 1},
    }  # fmt: skip
    for key, value in more.items():
        tables[key] = {**tables[key], **value} if isinstance(value, dict) else value
    return parse(tables)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if r["what"] == "eval"]


def evaluated(folder: Path) -> Tensor:
    """Logits of the model that the run evaluated last, through the run's own objects."""
    experiment = Experiment(load(folder / "recipe.toml"))
    state = store.load(folder / "checkpoint")[0]["engine"]["server"]["state"]
    experiment.trainer.place(experiment.method.export(state))
    return logits(experiment.view.model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits


def base(r: Recipe) -> Any:
    """The recipe's model as it was before the run."""
    m = r.model
    return models.load(m.source, task=m.task, num_labels=m.num_labels, seed=r.seed).model


def close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, atol=1e-5)


PATTERNS = {
    "name": "fedit", "rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 20.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "task", "meth"),
    [
        ("tiny:gpt2", "causal", "fedit"),
        ("tiny:llama", "causal", PATTERNS),
        ("tiny:gpt2", "classification", "ffa-lora"),
        ("tiny:bert", "classification", {"name": "fedit", "rank_pattern": {"query": 3}}),
        ("tiny:llama", "causal", {"name": "fedit", "rank": 5, "scaling": "alpha/sqrt(r)", "rank_pattern": {"v_proj": 2}}),
    ],
)
def test_an_exported_adapter_and_the_merged_model_are_what_the_run_evaluated(
    tmp_path: Path, source: str, task: str, meth: Any
) -> None:
    r = recipe(tmp_path, source, task, meth)
    run.start(r, tmp_path / "run")
    want = evaluated(tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "adapter") == "adapter"
    assert not close(logits(base(r)), want)
    assert close(logits(PeftModel.from_pretrained(base(r), tmp_path / "adapter")), want)
    assert export(tmp_path / "run", tmp_path / "whole", merge=True) == "model"
    whole = AUTO[task].from_pretrained(tmp_path / "whole")
    assert close(logits(whole), want)
    if task == "classification":
        assert whole.config.id2label == {0: "no", 1: "yes"}
        assert whole.config.label2id == {"no": 0, "yes": 1}


def test_the_exported_config_has_every_modules_rank_and_alpha(tmp_path: Path) -> None:
    run.start(recipe(tmp_path, "tiny:llama", meth=PATTERNS), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny:llama"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    m = method.build(PATTERNS)
    for module in modules(tensors):
        name = module.removeprefix(PREFIX)
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], name), config["r"])
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], name), config["lora_alpha"])
        assert rank == len(tensors[module + A]) == m.rank_of(name)
        assert alpha / rank == pytest.approx(m.scale(name))
    assert isinstance(config["lora_alpha"], int)  # as peft declares it; some readers insist


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "constant"])
def test_factors_of_other_ranks_than_the_methods_are_exported_with_the_scale_they_were_used_with(
    tmp_path: Path, scaling: str
) -> None:
    """As methods leave them that decompose products: each module of a rank of its own."""
    r = recipe(tmp_path, "tiny:llama", meth={"name": "fedit", "rank": 4, "alpha": 6.0, "scaling": scaling}, turns=1)
    run.start(r, tmp_path / "run")
    saved, _ = store.load(tmp_path / "run" / "checkpoint")
    params = saved["engine"]["server"]["state"]["params"]
    added: Tree = {}
    for i, m in enumerate(modules(params)):
        rank, draw = (1, 3, 4, 7)[i % 4], lambda *shape, m=m: torch.randn(shape, generator=generator("by hand", m, *shape))
        params[m + A], params[m + B] = draw(rank, params[m + A].shape[1]), 0.05 * draw(len(params[m + B]), rank)
        s = {"alpha/r": 6 / rank, "alpha/sqrt(r)": 6 / rank**0.5, "constant": 6 / 4}[scaling]
        added[m.removeprefix(PREFIX)] = s * params[m + B] @ params[m + A]
    store.save(tmp_path / "run" / "checkpoint", 10**6, saved, load(tmp_path / "run" / "recipe.toml").hash)
    by_hand = base(r)
    for m, w in added.items():
        by_hand.get_submodule(m).weight.data += w
    want = logits(by_hand)
    assert close(evaluated(tmp_path / "run"), want)
    export(tmp_path / "run", tmp_path / "adapter")
    assert close(logits(PeftModel.from_pretrained(base(r), tmp_path / "adapter")), want)
    export(tmp_path / "run", tmp_path / "whole", merge=True)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), want)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(run, its adapter) of an architecture, made once."""
    folder, made = tmp_path_factory.mktemp("trained"), dict[str, tuple[Path, Path]]()

    def get(arch: str) -> tuple[Path, Path]:
        if arch not in made:
            task = "classification" if arch == "bert" else "causal"
            made[arch] = folder / arch, folder / f"{arch}-adapter"
            run.start(recipe(folder, f"tiny:{arch}", task, {"name": "fedit", "rank": 4, "alpha": 4.0}), made[arch][0])
            export(*made[arch])
        return made[arch]

    return get


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_a_run_of_any_lora_method_begins_where_the_adapters_run_ended(
    tmp_path: Path, trained: Callable[[str], tuple[Path, Path]], name: str, arch: str
) -> None:
    """Another rank and another scale; Conv1D and a new head."""
    before, adapter = trained(arch)
    task = "classification" if arch == "bert" else "causal"
    r = recipe(tmp_path, f"tiny:{arch}", task, {"name": name, "rank": 6, "alpha": 30.0}, model={"adapter": str(adapter)})
    experiment = Experiment(r)
    loss = experiment.evaluate(experiment.method.export(experiment.server().state))["loss"]
    assert loss == pytest.approx(losses(before)[-1], abs=1e-5)
    assert abs(loss - losses(before)[0]) > 1e-2


@pytest.mark.parametrize("name", [n for n in METHODS if not method.get(n).personal])
def test_a_second_run_goes_on_and_exports_all_of_it(
    tmp_path: Path, trained: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    before, adapter = trained("gpt2")
    r = recipe(tmp_path, meth={"name": name, "rank": 4, "alpha": 4.0}, model={"adapter": str(adapter)})
    run.start(r, tmp_path / "run")
    first = losses(tmp_path / "run")
    assert first[0] == pytest.approx(losses(before)[-1], abs=1e-5)
    assert first[-1] < first[0]
    kind = export(tmp_path / "run", tmp_path / "out")
    opened = (
        PeftModel.from_pretrained(base(r), tmp_path / "out")
        if kind == "adapter"
        else AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    )
    assert close(logits(opened), evaluated(tmp_path / "run"))


def made_by_peft(plain: Recipe, out: Path, **config: Any) -> Tensor:
    """Write an adapter with random factors by peft alone; returns its logits."""
    model = get_peft_model(base(plain), LoraConfig(task_type="CAUSAL_LM", **config))
    for k, p in model.named_parameters():
        if "lora_" in k:
            p.data = 0.2 * torch.randn(p.shape, generator=generator("peft", k))
    model.save_pretrained(out)
    return logits(model)


@pytest.mark.parametrize("name", ["fedit", "ffa-lora", "flora", "hlora"])
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {"r": 4, "lora_alpha": 12, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.2.self_attn.q_proj": 3}},
    ],
)
def test_an_adapter_made_by_peft_alone(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    plain = recipe(tmp_path, "tiny:llama")
    want = made_by_peft(plain, tmp_path / "adapter", **config)
    r = recipe(tmp_path, "tiny:llama", meth={"name": name, "rank": 4}, model={"adapter": str(tmp_path / "adapter")})
    experiment = Experiment(r)
    server = experiment.server()
    experiment.trainer.place(server.method.export(server.state))
    assert close(logits(experiment.view.model), want)
    assert not close(logits(base(plain)), want)


def test_directions_that_a_smaller_adapter_lacks_start_dead_in_B_only_and_learn(tmp_path: Path) -> None:
    made_by_peft(recipe(tmp_path, "tiny:llama"), tmp_path / "adapter", r=2, lora_alpha=2)
    r = recipe(tmp_path, "tiny:llama", meth={"name": "fedit", "rank": 5}, model={"adapter": str(tmp_path / "adapter")})
    experiment, fresh = Experiment(r), Experiment(recipe(tmp_path, "tiny:llama", meth={"name": "fedit", "rank": 5}))
    start, new = experiment.trainer.start(), fresh.trainer.start()
    run.start(r, tmp_path / "run")
    end = store.load(tmp_path / "run" / "checkpoint")[0]["engine"]["server"]["state"]["params"]
    for m in modules(start):
        assert torch.equal(start[m + A][2:], new[m + A][2:])  # drawn as ever: the same on all clients
        assert not start[m + B][:, 2:].any()
        assert end[m + B][:, 2:].any(dim=0).all()
        assert not torch.equal(end[m + A][2:], start[m + A][2:])


def test_a_product_in_float64_does_not_change_with_rank_and_scale(tmp_path: Path) -> None:
    made_by_peft(recipe(tmp_path, "tiny:gpt2"), tmp_path / "adapter", r=3, lora_alpha=7, fan_in_fan_out=True)
    found = read(str(tmp_path / "adapter"))
    meth = {"name": "fedit", "rank": 8, "alpha": 5.0}
    start = Experiment(recipe(tmp_path, meth=meth, model={"adapter": str(tmp_path / "adapter")})).trainer.start()
    for m in modules(start):
        ours = 5 / 8 * start[m + B].double() @ start[m + A].double()
        theirs = 7 / 3 * found.tensors[m + B].double() @ found.tensors[m + A].double()
        assert torch.allclose(ours, theirs, atol=1e-7)


def spoiled(adapter: Path, tmp_path: Path, change: Callable[[Tree, dict[str, Any]], None]) -> str:
    """A copy of an adapter with tensors or config changed."""
    out = tmp_path / "spoiled"
    shutil.copytree(adapter, out)
    tensors, config = load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config))
    return str(out)


FIRST = f"{PREFIX}transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.update({f"{FIRST}.lora_A.other.weight": t.pop(FIRST + A)}), "no place for .*lora_A.other.weight"),
        (lambda t, c: t.pop(FIRST + B), "there is no '.*h.0.attn.c_attn.lora_B.weight'"),
        (lambda t, c: t.update({f"{PREFIX}lm_head.weight": torch.zeros(2, 2)}), "no place for '.*lm_head.weight'"),
        (lambda t, c: t.update({FIRST + A: t[FIRST + A][:, :-1].contiguous()}), "lora_A.weight' has shape .* of another model"),
        (lambda t, c: t[FIRST + A].mul_(float("nan")), "not finite"),
        (lambda t, c: c.update(r=2), "r = 2 .* the file a rank of 4"),
        (lambda t, c: c.update(use_dora=True), "'use_dora' = True is not supported"),
        (lambda t, c: c.update(bias="all"), "'bias' = 'all' is not supported"),
        (lambda t, c: c.update(an_option_to_come={"x": 1}), "an_option_to_come"),
        (lambda t, c: c.update(peft_type="LOHA"), "peft_type is 'LOHA'"),
        (lambda t, c: c.update(init_lora_weights="pissa"), "changed the base weights"),
        (lambda t, c: c.clear(), "peft_type is None"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, trained: Callable[[str], tuple[Path, Path]], change: Any, message: str
) -> None:
    adapter = spoiled(trained("gpt2")[1], tmp_path, change)
    with pytest.raises(ModelError, match=message) as error:
        Experiment(recipe(tmp_path, model={"adapter": adapter}))
    assert str(error.value).startswith("model.adapter: ")


@pytest.mark.parametrize(
    ("meth", "message"),
    [
        ({"name": "fedit", "rank": 3}, r"rank 4, above the method's 3; set method.rank = 4"),
        ({"name": "fedit", "targets": ["c_attn", "c_fc"]}, "modules are c_attn, those of method.targets c_attn, c_fc"),
        ({"name": "fedit", "targets": ["c_fc"]}, "modules are c_attn, those of method.targets c_fc"),
    ],
)
def test_a_method_that_does_not_fit_is_told_its_field(
    tmp_path: Path, trained: Callable[[str], tuple[Path, Path]], meth: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Experiment(recipe(tmp_path, meth=meth, model={"adapter": str(trained("gpt2")[1])}))


def test_files_that_are_no_adapter_are_refused(tmp_path: Path, trained: Callable[[str], tuple[Path, Path]]) -> None:
    whole, pickled, torn = tmp_path / "whole", tmp_path / "pickled", tmp_path / "torn"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    for folder in (pickled, torn):
        shutil.copytree(trained("gpt2")[1], folder)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (torn / "adapter_model.safetensors").write_bytes((torn / "adapter_model.safetensors").read_bytes()[:999])
    for source, message in [
        (whole, "give it as model.source"),
        (pickled, "adapter_model.bin is not opened: save the adapter as safetensors"),
        (torn, "damaged"),
        (tmp_path / "none", "no folder, and no hub id"),
        ("nobody/no-adapter", "^model.adapter: nobody/no-adapter cannot be had"),
    ]:
        with pytest.raises(ModelError, match=message):
            read(str(source))
    with pytest.raises(ModelError, match=r"give its base model, and this as model\.adapter"):
        models.load(torn)
    with pytest.raises(RecipeError, match="model.adapter: 'fedavg' has no LoRA factors"):
        recipe(tmp_path, meth="fedavg", model={"adapter": "x"})


def test_a_weight_that_others_share_is_not_merged_into(tmp_path: Path) -> None:
    """GPT-2's head is its embedding; merging into it would change both."""
    r = recipe(tmp_path, meth={"name": "fedit", "targets": ["lm_head"]}, turns=1)
    run.start(r, tmp_path / "run")
    with pytest.raises(StoreError, match="'lm_head' is tied .* leave out --merge"):
        export(tmp_path / "run", tmp_path / "whole", merge=True)
    export(tmp_path / "run", tmp_path / "adapter")
    assert close(logits(PeftModel.from_pretrained(base(r), tmp_path / "adapter")), evaluated(tmp_path / "run"))


def test_an_adapter_that_could_not_stand_alone_is_exported_whole_only(tmp_path: Path) -> None:
    """An encoder without a pooler gets one drawn, which no adapter holds and every later draw would make another."""
    model, tokenizer = models.tiny.tiny("bert", "classification")
    BertModel(model.config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    run.start(recipe(tmp_path, str(tmp_path / "encoder"), "classification", turns=1), tmp_path / "run")
    with pytest.raises(HocketError, match=r"pooler.* was drawn for this run .* use --merge"):
        export(tmp_path / "run", tmp_path / "adapter")
    export(tmp_path / "run", tmp_path / "whole", merge=True)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert close(logits(whole), evaluated(tmp_path / "run"))


@pytest.mark.parametrize("name", ["ffa-lora", "fedit"])
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "constant"])
def test_the_scale_is_the_methods_from_the_first_step_to_the_export(tmp_path: Path, name: str, scaling: str) -> None:
    """Also where A is never put in place anew, and with patterns that peft matches from the start of a name."""
    q = "^model.layers.1.self_attn.q_proj"
    meth = {"name": name, "rank": 4, "scaling": scaling, "rank_pattern": {q: 2}, "alpha_pattern": {q: 30.0}}
    r = recipe(tmp_path, "tiny:llama", meth=meth, turns=1)
    view, m = Experiment(r).view, method.build(meth)
    for x in modules(view.params):
        rank = 2 if "layers.1" in x and "q_proj" in x else 4
        alpha = 30.0 if rank == 2 else 16.0
        want = alpha / rank**0.5 if scaling == "alpha/sqrt(r)" else alpha / rank
        assert len(view.params[x + A]) == m.rank_of(x) == rank
        assert view.model.get_submodule(x).scaling["default"] == m.scale(x) == pytest.approx(want)
    run.start(r, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "adapter")
    again = recipe(tmp_path, "tiny:llama", meth=meth, model={"adapter": str(tmp_path / "adapter")})
    experiment = Experiment(again)
    loss = experiment.evaluate(experiment.trainer.start())["loss"]
    assert loss == pytest.approx(losses(tmp_path / "run")[-1], abs=1e-6)
