"""GLUE: pairs, the token a decoder is read at, hidden labels, hub sets with configurations, F1 with its interval."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hocket.data import collate, encode, load, prepare
from hocket.data.encode import HIDDEN, between
from hocket.errors import DataError
from hocket.evaluate import heldout
from hocket.evaluate.loss import _shares, wilson
from hocket.experiment import Experiment
from hocket.models import hub
from hocket.models import load as open_model
from hocket.models.tiny import tiny
from hocket.recipe import parse

DATA = Path(__file__).resolve().parents[2] / "data"
MRPC = {"sentence1": "he ran", "sentence2": "she ran", "label": 1}


def pulled(name: str) -> Any:
    """A known model that is on this machine, with a new classification head."""
    if not next(m["cached"] for m in hub.listing() if m["name"] == name):
        pytest.skip(f"{name} is not here; hocket models pull {name}")
    return open_model(name, task="classification")


def rows(tokenizer: Any, *given: dict[str, Any], **more: Any) -> Any:
    return encode(datasets.Dataset.from_list(list(given)), tokenizer, task="classification", **more)[0]


def spelled(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(row["input_ids"].tolist())


# --- pairs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", ["sentence1 sentence2", "question1 question2", "premise hypothesis", "question sentence"])
def test_both_texts_of_every_task_are_read_in_order(names: str) -> None:
    _, t = tiny("llama", "classification")
    first, second = names.split()
    row = {second: "she", first: "he", "label": 0, "idx": 7}
    assert "".join(spelled(t, rows(t, row)[0])) == "<s>he\nshe"
    assert "".join(spelled(t, rows(t, {"question": "he", "sentence": None, "text": "alone", "label": 0})[0])) == "<s>alone"


def test_a_mark_stands_between_two_texts_once_and_is_never_cut() -> None:
    _, bert = tiny("bert", "classification")
    _, gpt2 = tiny("gpt2", "classification")
    assert (between(bert), between(gpt2)) == ("", "\n")
    assert "".join(spelled(bert, rows(bert, MRPC)[0])) == "<s>he ran</s>she ran</s>"
    assert "".join(spelled(gpt2, rows(gpt2, MRPC)[0])) == "he ran\nshe ran"
    assert "".join(spelled(gpt2, rows(gpt2, {"sentence": "he ran", "label": 1})[0])) == "he ran"
    assert "".join(spelled(gpt2, rows(gpt2, {**MRPC, "sentence2": " "})[0])) == "he ran"
    long = rows(gpt2, {**MRPC, "sentence1": "a" * 50}, {**MRPC, "sentence2": "b" * 50}, max_length=12)
    assert ["".join(spelled(gpt2, r)) for r in long] == ["aaaaaa\nshe r", "he ran\nbbbbb"]


def test_minilm_marks_pairs_as_bert_was_taught() -> None:
    t = pulled("minilm-l6-v2").tokenizer
    row = rows(t, MRPC)[0]
    assert spelled(t, row) == ["[CLS]", "he", "ran", "[SEP]", "she", "ran", "[SEP]"]
    assert row["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]


# --- padding and pooling -------------------------------------------------------------------------------------------------
def alone_and_together(model: Any, encoded: Any, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        take = lambda batch: model(**{k: v for k, v in collate(batch, pad).items() if k != "labels"}).logits
        return torch.cat([take([r]) for r in encoded]), take(list(encoded))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_a_row_is_read_alike_alone_and_padded(arch: str) -> None:
    model, t = tiny(arch, "classification")
    encoded = rows(t, MRPC, {**MRPC, "sentence2": "a much longer text that pads all others"}, {**MRPC, "sentence1": "x"})
    alone, together = alone_and_together(model, encoded, t.pad_token_id)
    assert torch.allclose(alone, together, atol=1e-5)
    assert not torch.allclose(alone[0], alone[2], atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_decoder_whose_padding_is_its_end_token_is_read_at_the_last_other_token(arch: str) -> None:
    model, t = tiny(arch, "classification")
    t.pad_token = t.eos_token
    model.config.pad_token_id = t.pad_token_id
    texts = ["ab", "ab</s>", "ab</s></s>", "a</s>b", "</s>ab", "a longer text than these"]
    encoded = rows(t, *({"text": x, "label": 0} for x in texts))
    assert [int(t.eos_token_id in r["input_ids"]) for r in encoded] == [0, 1, 1, 1, 1, 0]
    alone, together = alone_and_together(model, encoded, t.pad_token_id)
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.allclose(alone[0], alone[1], atol=1e-5)  # an end token that closes a text is passed over
    assert torch.allclose(alone[0], alone[2], atol=1e-5)
    with torch.no_grad():  # inside a text it is read, and the text's own last token decides
        states = model.base_model(encoded[3]["input_ids"].long()[None]).last_hidden_state[0, -1]
    assert torch.allclose(model.score(states), alone[3], atol=1e-5)


@pytest.mark.parametrize("name", ["minilm-l6-v2", "smollm2-135m-instruct"])
@pytest.mark.parametrize("task", ["glue_mrpc", "glue_rte", "glue_sst2", "qqp_subset"])
def test_real_models_read_real_rows_alike_alone_and_padded(name: str, task: str) -> None:
    file = next((DATA / task).glob("*.jsonl.gz"), None)
    if file is None:
        pytest.skip(f"{task} is not here")
    loaded = pulled(name)
    encoded, kept, skipped = encode(load(file, limit=5), loaded.tokenizer, task="classification", max_length=64)
    assert (len(encoded), kept, skipped) == (5, list(range(5)), {})
    alone, together = alone_and_together(loaded.model, encoded, loaded.tokenizer.pad_token_id)
    assert torch.allclose(alone, together, atol=2e-3 * float(alone.abs().max()))
    if loaded.tokenizer.sep_token is None and task != "glue_sst2":
        assert all(spelled(loaded.tokenizer, r).count("Ċ") == 1 for r in encoded if len(r["input_ids"]) < 64)


# --- labels ---------------------------------------------------------------------------------------------------------------
def write(path: Path, given: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, given)))
    return str(path)


def test_hidden_labels_are_left_out_and_counted(tmp_path: Path) -> None:
    _, t = tiny("bert", "classification")
    train = write(tmp_path / "train.jsonl", [{**MRPC, "label": i % 2} for i in range(8)] + [{**MRPC, "label": -1}])
    test = write(tmp_path / "test.jsonl", [{**MRPC, "label": -1}, MRPC])
    p = prepare(train, t, heldout_source=test, task="classification", clients=2)
    assert p.skipped == {HIDDEN: [8], f"held out: {HIDDEN}": [0]}
    assert (sum(map(len, p.clients)), len(p.heldout)) == (8, 1)
    hidden = write(tmp_path / "hidden.jsonl", [{**MRPC, "label": -1}])
    with pytest.raises(DataError, match=r"no row can be used: hidden label .* \(1\); take a part that has labels"):
        prepare(train, t, heldout_source=hidden, task="classification", clients=2)


# --- hub sets -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set with two configurations in the hub's layout, which `datasets` itself reads, under its hub id."""
    parts = {"mrpc": ("train", "validation", "test"), "sst2": ("train", "validation")}
    lines = ["---", "configs:"]
    for config, splits in parts.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
            given = [{"sentence1": f"{split} {i}", "sentence2": "b", "label": -1 if split == "test" else i % 2} for i in range(6)]
            write(tmp_path / "glue" / config / f"{split}.jsonl", given)
    (tmp_path / "glue" / "README.md").write_text("\n".join([*lines, "---", ""]))
    real = datasets.load_dataset

    def fake(name: str, *more: Any, **options: Any) -> Any:
        here = str(tmp_path / "glue") if name == "nyu-mll/glue" else name
        return real(here, *more, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", fake)


def test_a_hub_set_is_named_with_its_configuration_and_split(glue: None) -> None:
    assert load("nyu-mll/glue:mrpc")["sentence1"][0] == "train 0"
    assert load("nyu-mll/glue:mrpc", split="test")["label"][0] == -1
    assert load("nyu-mll/glue:sst2", split="test")["sentence1"][0] == "validation 0"  # it has no test part
    assert load("nyu-mll/glue:mrpc:validation", split="test")["sentence1"][0] == "validation 0"
    _, t = tiny("bert", "classification")
    p = prepare("nyu-mll/glue:mrpc", t, heldout_source="nyu-mll/glue:mrpc:validation", task="classification", clients=2)
    assert len(p.heldout) == 6
    with pytest.raises(DataError, match="for example 'nyu-mll/glue:mrpc:validation'"):
        prepare("nyu-mll/glue:mrpc", t, heldout_source="nyu-mll/glue:mrpc", task="classification", clients=2)


def test_hub_names_that_are_wrong_say_what_there_is(glue: None) -> None:
    _, t = tiny("bert", "classification")
    for name, message in (
        ("nyu-mll/glue", r"Config name is missing.*\['mrpc', 'sst2'\]"),
        ("nyu-mll/glue:mrp", r"'mrp' not found. Available: \['mrpc', 'sst2'\]"),
        ("nyu-mll/glue:sst2:test", "no split 'test', only train, validation"),
        ("nyu-mll/glue:sst2:train:x", "write hub sets as 'owner/name'"),
    ):
        with pytest.raises(DataError, match=message):
            load(name)
    one = "nyu-mll/glue:sst2:train"
    with pytest.raises(DataError, match=r"data.heldout_source: .* is data.source itself"):
        prepare(one, t, heldout_source=one, task="classification", clients=2)


# --- scores ---------------------------------------------------------------------------------------------------------------
def test_f1_and_its_interval_are_those_of_the_paper() -> None:
    pairs = [(1, 1)] * 30 + [(0, 1)] * 6 + [(1, 0)] * 14 + [(0, 0)] * 50
    found = _shares(pairs)
    low, high = wilson(30, 50)
    assert found["f1"] == pytest.approx(60 / 80)
    assert (found["f1_low"], found["f1_high"]) == pytest.approx((2 * low / (1 + low), 2 * high / (1 + high)))
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson(80, 100)
    perfect = _shares([(1, 1)] * 10)
    assert perfect["f1_low"] < perfect["f1"] == 1.0 == pytest.approx(perfect["f1_high"])
    none = _shares([(0, 0)] * 10)
    assert (none["f1"], none["f1_low"], none["f1_high"]) == (0.0, 0.0, 1.0)  # no row says anything about class 1


@pytest.mark.parametrize("classes", [2, 3])
def test_the_interval_of_f1_covers_as_often_as_it_says(classes: int) -> None:
    draw = random.Random(0)
    kinds = [(a, b) for a in range(classes) for b in range(classes)]
    weights = [3.0 if a == b else 1.0 for a, b in kinds]
    truth = _shares([k for k, w in zip(kinds, weights, strict=True) for _ in range(int(w) * 100)])["f1"]
    trials = [_shares(draw.choices(kinds, weights, k=150)) for _ in range(400)]
    share = sum(t["f1_low"] <= truth <= t["f1_high"] for t in trials) / len(trials)
    assert 0.92 < share < 0.98


def test_a_recipe_on_pairs_gives_scores_with_intervals(tmp_path: Path) -> None:
    given = [{"premise": f"a {i}", "hypothesis": "b" * (1 + i % 9), "label": i % 2} for i in range(40)]
    write(tmp_path / "rte" / "train.jsonl", given)
    write(tmp_path / "rte" / "validation.jsonl", given[:11])
    for arch in ("llama", "bert"):
        recipe = parse({
            "turns": 1, "model": {"source": f"tiny:{arch}", "task": "classification"},
            "data": {"source": str(tmp_path / "rte"), "heldout_source": str(tmp_path / "rte")},
            "method": {"name": "fedavg"}, "clients": {"count": 2},
        })  # fmt: skip
        experiment = Experiment(recipe)
        found = experiment.evaluate(experiment.trainer.start())
        assert found["n"] == 11
        for score in ("accuracy", "f1"):
            assert 0 <= found[f"{score}_low"] <= found[score] <= found[f"{score}_high"] <= 1
        again = heldout(experiment.view.model, experiment.data.heldout, experiment.collate, batch_size=1)
        assert again["loss"] == pytest.approx(found["loss"], abs=1e-5)
