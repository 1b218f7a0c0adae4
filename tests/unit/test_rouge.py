"""Rouge-L of greedy answers: the library's numbers by hand, prompts as training has them, decoding in batches, a whole run."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_data import CHAT
from transformers import AutoModelForCausalLM, AutoTokenizer

from hocket import report, run
from hocket.cli import _headline
from hocket.data import encode, load, prepare
from hocket.data.templates import closing
from hocket.errors import DataError, HocketError, Interrupted
from hocket.evaluate import generate, questions, rouge
from hocket.evaluate.generate import _stops
from hocket.evaluate.rouge import score
from hocket.experiment import Experiment
from hocket.models.tiny import tiny, tiny_tokenizer
from hocket.recipe import parse

ROW = {"instruction": "Say it.", "context": "it is five", "response": "Five!"}


# --- the score ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "reference", "f"),
    [
        ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 2 * 5 / (8 + 9)),
        ("a b c", "a b c", 1.0),
        ("A, b; C!", "a b c", 1.0),  # small letters, and no marks
        ("c b a", "a b c", 2 * 1 / 6),  # a common subsequence keeps the order
        ("a x b y c", "a b c", 2 * 3 / 8),  # ... and may have gaps
        ("running dogs", "run dog", 0.0),  # no stemming
        ("it's", "it s", 1.0),
        ("", "a b c", 0.0),
        ("?!", "a b c", 0.0),
        ("はい", "a b c", 0.0),
    ],
)
def test_the_score_of_known_pairs(answer: str, reference: str, f: float) -> None:
    found = score([answer], [reference])
    assert found["rouge_l"] == pytest.approx(f, abs=1e-12)
    assert found["rouge_l_n"] == 1
    assert found["rouge_l_empty"] == float(answer in ("", "?!", "はい"))


def test_the_mean_is_over_rows_with_a_normal_interval() -> None:
    answers = ["a b", "a", "", "b a c", "a b"]  # F: 1, 2/3, 0, 2/5, 1
    found = score(answers, ["a b"] * 5)
    each = torch.tensor([1, 2 / 3, 0, 2 / 5, 1], dtype=torch.float64)
    half = 1.959963984540054 * float(each.std()) / 5**0.5
    assert found["rouge_l"] == pytest.approx(float(each.mean()), abs=1e-12)
    assert found["rouge_l_low"] == pytest.approx(float(each.mean()) - half, abs=1e-12)
    assert found["rouge_l_high"] == pytest.approx(min(1.0, float(each.mean()) + half), abs=1e-12)
    assert found["rouge_l_empty"] == 0.2
    assert (score(["a"], ["a"])["rouge_l_low"], score(["a"], ["a"])["rouge_l_high"]) == (0.0, 1.0)  # one row says nothing


def test_the_library_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("network")

    for name in [m for m in sys.modules if m.split(".")[0] in ("rouge_score", "nltk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    assert score(["a b"], ["a b"])["rouge_l"] == 1.0


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(HocketError, match=r"hocket\[rouge\]"):
        score(["a"], ["a"])
    with pytest.raises(HocketError, match=r"hocket\[rouge\]"):  # before anything is trained
        Experiment(recipe(tmp_path, rouge=2))
    assert Experiment(recipe(tmp_path)).asked == []


# --- questions ---------------------------------------------------------------------------------------------------------
def chatty() -> Any:
    t = tiny_tokenizer(128)
    t.chat_template = CHAT
    t.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>", "<|assistant|>"]})
    return t


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("plain", "<s>Say it.\n\nit is five\n"),
        ("chat", "<s><|user|>Say it.\n\nit is five<|end|>\n<|assistant|>"),
        (
            "alpaca",
            "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
            "that appropriately completes the request.\n\n### Instruction:\nSay it.\n\n### Input:\nit is five\n\n### Response:\n",
        ),
    ],
)
@pytest.mark.parametrize("longest", [400, None])
def test_a_prompt_is_what_training_puts_before_the_answer(template: str, prompt: str, longest: int | None, tmp_path: Path) -> None:
    """Also where the answer is cut: the prompt is whole then, and so is the reference."""
    t = chatty()
    size = len(t(prompt, add_special_tokens=False)["input_ids"])
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(ROW | {"response": f"Five! {i}"}) for i in range(9)))
    data = prepare(str(tmp_path / "a.jsonl"), t, template=template, max_length=longest or size + 3, clients=2)
    ((ids, reference),) = questions(data.heldout, data.references, 5)
    assert t.convert_ids_to_tokens(ids) == t.convert_ids_to_tokens(t(prompt, add_special_tokens=False)["input_ids"])
    assert reference in {f"Five! {i}" for i in range(9)}
    assert data.heldout[0]["input_ids"][: len(ids)].tolist() == ids
    if longest is None:
        assert int(data.heldout.cut[0]) > 0


def test_the_rows_are_the_same_every_time_and_only_those_that_ask() -> None:
    t = tiny_tokenizer(128)
    rows = [{"instruction": f"q {i}", "context": "", "output": f"answer {i}", "text": ""} for i in range(40)]
    rows[3] |= {"instruction": "", "output": "", "text": "a long text alone that comes in several windows of few tokens"}
    rows[5]["output"] = "…"  # nothing that Rouge could count
    rows[7] |= {"instruction": "", "output": "an answer to nothing"}
    examples, kept, _ = encode(rows, t, template="plain", max_length=24)
    from hocket.data.templates import reference

    references = [reference(rows[i], {}) for i in kept]
    assert len(kept) > 40
    every = questions(examples, references, 1000)
    assert [r for _, r in every] == [f"answer {i}" for i in range(40) if i not in (3, 5, 7)]
    some = questions(examples, references, 10)
    assert some == questions(examples, references, 10) == sorted(some, key=every.index)
    assert [r for _, r in some] != [f"answer {i}" for i in range(10)]  # a file may be sorted
    with pytest.raises(DataError, match=r"evaluation\.rouge: no held-out row has an instruction"):
        questions(examples, [""] * len(kept), 10)
    longest = max(len(p) for p, _ in every)
    assert questions(examples, references, 1000, room=longest) == every
    with pytest.raises(DataError, match=r"evaluation\.rouge_tokens: .* lower it by 2"):
        questions(examples, references, 1000, room=longest - 2)


def test_dollys_columns_are_known(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "dolly15k" / "dolly15k.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no Dolly at {path}")
    rows = load(path, limit=40)
    examples, kept, _ = encode(rows, tiny_tokenizer(128), template="alpaca", max_length=512)
    from hocket.data.templates import reference

    found = questions(examples, [reference(rows[i], {}) for i in kept], 1000)
    assert [r for _, r in found] == [rows[i]["response"].strip() for i in kept]


# --- decoding ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def talker(stories: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)


def test_answers_in_a_batch_are_those_one_by_one(talker: tuple[Any, Any]) -> None:
    """Padding is on the left and masked; nothing counts it, not even a penalty that the model's settings ask for."""
    model, t = talker
    texts = ["Once upon a time", "Lily", "The dog ran to the big tree and then", "One day, Tom saw a"]
    prompts = [t(p)["input_ids"] for p in texts]
    seen: list[tuple[Any, Any]] = []
    inner = model.generate
    model.generate = lambda **k: seen.append((k["input_ids"], k["attention_mask"])) or inner(**k)
    try:
        together = generate(model, t, prompts, max_new_tokens=24, batch_size=4)
        model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 1.3, 2
        assert generate(model, t, prompts, max_new_tokens=24, batch_size=4) == together
    finally:
        model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = None, None
        del model.generate
    ids, mask = seen[0]
    assert sorted(row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)) == sorted(prompts)
    assert all(m.tolist() == sorted(m.tolist()) for m in mask)  # zeros first
    assert together == [generate(model, t, [p], max_new_tokens=24)[0] for p in prompts]
    assert together == generate(model, t, texts, max_new_tokens=24)
    assert min(map(len, together)) > 20
    found = [rouge(model, t, [(p, "there was a little girl") for p in prompts], batch_size=b, max_new_tokens=24) for b in (1, 3)]
    assert found[0] == found[1]
    assert 0 < found[0]["rouge_l"] < 1
    assert found[0]["rouge_l_n"] == 4


def test_a_reference_the_model_writes_scores_one_and_silence_zero(talker: tuple[Any, Any]) -> None:
    model, t = talker
    prompt = t("Once upon a time")["input_ids"]
    (own,) = generate(model, t, [prompt], max_new_tokens=16)
    assert rouge(model, t, [(prompt, own)], max_new_tokens=16)["rouge_l"] == 1.0
    less = rouge(model, t, [(prompt, own)], max_new_tokens=8)["rouge_l"]  # the bound cuts what the model would say
    assert 0.3 < less < 1

    class Mute:
        config, training, generation_config = SimpleNamespace(use_cache=None), False, SimpleNamespace(eos_token_id=None)
        eval = train = lambda self, mode=False: self
        parameters = staticmethod(lambda: iter([torch.zeros(1)]))
        generate = staticmethod(lambda input_ids, **_: torch.cat([input_ids, torch.full((len(input_ids), 1), t.eos_token_id)], 1))

    found = rouge(Mute(), t, [(prompt, "a b"), (prompt[:2], "a")], max_new_tokens=8)
    assert (found["rouge_l"], found["rouge_l_empty"]) == (0.0, 1.0)
    with pytest.raises(Interrupted):
        rouge(model, t, [(prompt, "a")], max_new_tokens=8, interrupted=lambda: True)


def test_an_answer_ends_where_the_chat_template_ends_it() -> None:
    """The mark need not be the tokenizer's end of text: a model trained on it would go on for ever."""
    t, plain = chatty(), tiny_tokenizer(128)
    assert t.convert_ids_to_tokens(closing(t)) == "<|end|>"
    assert closing(plain) is None
    model, _ = tiny("llama", vocab=128, layers=1, width=16)
    assert set(_stops(model, t) or ()) >= {t.eos_token_id, closing(t)}
    plain.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert closing(plain) is None  # letters end nothing
    plain.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert closing(plain) is None


# --- a whole run -------------------------------------------------------------------------------------------------------
def recipe(folder: Path, method: Any = "fedit", source: str = "tiny:llama", **evaluation: Any) -> Any:
    rows = [{"instruction": f"Tell of {w}.", "output": f"Once there was {w}."} for w in ("a dog", "a cat", "the sun", "the sea") * 6]
    rows = [r | {"output": f"{r['output']} {i}"} for i, r in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return parse({
        "name": "said", "turns": 2, "model": {"source": source}, "method": method, "clients": {"count": 2},
        "data": {"source": str(folder / "rows.jsonl"), "template": "plain", "max_length": 64, "heldout_fraction": 0.3},
        "training": {"local_steps": 1, "batch_size": 2}, "engine": {"threads": 1},
        "evaluation": {"rouge_tokens": 12, **evaluation},
    })  # fmt: skip


@pytest.mark.parametrize("method", ["fedavg", "fedit", "fedpeft"])
def test_a_run_scores_its_answers_at_every_evaluation(method: str, tmp_path: Path, stories: Path) -> None:
    run.start(recipe(tmp_path, method, str(stories), rouge=5), tmp_path / "run")
    found = report.read(tmp_path / "run")
    assert [e["version"] for e in found.evals] == [0, 1, 2]
    for e in found.evals:
        assert e["rouge_l_n"] == 5
        assert 0 <= e["rouge_l_low"] <= e["rouge_l"] <= e["rouge_l_high"] <= 1
        assert 0 <= e["rouge_l_empty"] <= 1
    last = found.evals[-1]
    assert found.summary()["rouge_l"] == last["rouge_l"]
    assert f"rouge_l {last['rouge_l']:.1%} (n = 5, 95 % " in _headline(found)
    page = report.build([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert f"rouge_l<b>{last['rouge_l']:.1%}</b>" in page
    e = Experiment(recipe(tmp_path, method, str(stories), rouge=5))
    again = e.evaluate(e.trainer.start())
    assert again["rouge_l"] == found.evals[0]["rouge_l"]  # bit for bit
    assert "rouge_l" not in Experiment(recipe(tmp_path, method, str(stories))).evaluate(e.trainer.start())


def test_a_comparison_has_the_mean_over_seeds(tmp_path: Path, stories: Path) -> None:
    from hocket.compare import Chosen, _perform, summary
    from hocket.results import table
    from hocket.study import gather

    (tmp_path / "a.toml").write_text(recipe(tmp_path, "fedit", str(stories), rouge=4, every=2, start=False).to_toml())
    (study,) = gather([tmp_path / "a.toml"], [0, 1])

    class Here:
        @staticmethod
        def result(r: Any) -> dict[str, Any]:
            return _perform(r.to_toml(), str(tmp_path / "runs" / r.hash))

    (name,) = (v.name for v in study.variant)
    found = summary(study, {name: Chosen(study.variant[0], 1e-4)}, Here())  # type: ignore[arg-type]
    each = [report.read(p).evals[-1]["rouge_l"] for p in (tmp_path / "runs").iterdir()]
    assert len(each) == 2
    assert found["variants"][name]["rouge_l"] == pytest.approx(sum(each) / 2)
    assert "rouge_l" in table(found).splitlines()[0]
    assert f"| {sum(each) / 2:.1%} |" in table(found)


def test_a_model_without_room_for_the_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.rouge_tokens: the model has no room"):
        Experiment(recipe(tmp_path, source="tiny:gpt2", rouge=2, rouge_tokens=500))
    assert len(Experiment(recipe(tmp_path, source="tiny:gpt2", rouge=2, rouge_tokens=400)).asked) == 2


def test_rows_of_text_alone_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"text number {i} of twenty" for i in range(20)))
    r = recipe(tmp_path, rouge=2)
    r = r.model_copy(update={"data": r.data.model_copy(update={"source": str(tmp_path / "a.txt")})})
    with pytest.raises(DataError, match=r"evaluation\.rouge: no held-out row"):
        Experiment(r)
