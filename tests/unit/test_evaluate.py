"""Evaluation: the numbers by hand, the intervals by simulation, batched decoding against one by one."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import language, tokens

from hocket import run, store
from hocket.data import Encoded, collate
from hocket.errors import DataError, Interrupted
from hocket.evaluate import evaluate, extract, generate, gsm8k, heldout, wilson
from hocket.evaluate.loss import _ratio
from hocket.experiment import Experiment
from hocket.models.forward import loss_sum
from hocket.models.tiny import tiny
from hocket.recipe import parse
from hocket.tree import digest, generator


def rows(n: int = 7) -> Encoded:
    made = []
    for i in range(n):
        ids = tokens(i, 1, length=5 + i)[0].tolist()
        made.append({"input_ids": ids, "labels": [-100] * (1 + i % 3) + ids[1 + i % 3 :]})
    return Encoded(made, [("a", "b")[i % 2] for i in range(n)])


def pad(batch: list) -> dict[str, torch.Tensor]:
    return collate(batch, 0)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_heldout_is_the_token_mean_whatever_the_batches(arch: str) -> None:
    model, _ = tiny(arch, vocab=64, layers=2, width=16)
    data, total, count = rows(), 0.0, 0
    for i in range(len(data)):
        ids = data[i]["input_ids"].long()[None]
        logp = model(ids).logits[0].log_softmax(-1).detach()
        for at, label in enumerate(data[i]["labels"].tolist()[1:]):
            if label != -100:
                total, count = total - float(logp[at, label]), count + 1
    found = [heldout(model, data, pad, batch_size=b) for b in (1, 3, 7)]
    for r in found:
        assert r["loss"] == pytest.approx(total / count, rel=1e-5)
        assert r["tokens"] == count
        assert r["n"] == 7
        assert r["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
        assert r["loss_low"] < r["loss"] < r["loss_high"]
        assert set(r["groups"]) == {"a", "b"}
    assert not model.training


def test_word_perplexity_is_of_the_same_nats() -> None:
    model, _ = tiny("gpt2", vocab=64, layers=2, width=16)
    found = evaluate(model, None, rows(), pad, words=20)
    assert found["word_perplexity"] == pytest.approx(math.exp(found["loss"] * found["tokens"] / 20))
    assert "word_perplexity" not in evaluate(model, None, rows(), pad)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_training_loss_leaves_out_unneeded_logits_and_is_the_same(arch: str) -> None:
    model, _ = tiny(arch, vocab=64, layers=2, width=16)
    batch = pad([rows()[i] for i in (4, 5)])
    batch["labels"][:, :4] = -100
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    full = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), reduction="sum")
    total, count = loss_sum(model, batch)
    assert float(total.detach()) == pytest.approx(float(full.detach()), rel=1e-5)
    assert count == int((batch["labels"][:, 1:] != -100).sum())


def test_the_interval_of_the_mean_covers_as_often_as_it_says() -> None:
    g, hits = generator("interval"), 0
    for _ in range(400):
        counts = torch.randint(1, 30, (60,), generator=g).double()
        sums = counts * 2.0 + torch.randn(60, generator=g, dtype=torch.float64) * counts.sqrt()
        low, _, high = _ratio(sums, counts)
        hits += low < 2.0 < high
    assert 0.91 < hits / 400 < 0.98


def test_wilson_against_published_values() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_classification_accuracy_and_f1() -> None:
    model, _ = tiny("bert", "classification", vocab=64, layers=1, width=16)
    data = Encoded([{"input_ids": t.tolist(), "labels": i % 2} for i, t in enumerate(tokens(0, 12))])
    guess = [int(model(data[i]["input_ids"].long()[None]).logits.argmax()) for i in range(12)]
    r = heldout(model, data, pad, batch_size=5)
    assert r["accuracy"] == pytest.approx(sum(g == i % 2 for i, g in enumerate(guess)) / 12)
    tp = sum(g == 1 == i % 2 for i, g in enumerate(guess))
    wrong = sum((g == 1) != (i % 2 == 1) for i, g in enumerate(guess))
    assert r["f1"] == pytest.approx(2 * tp / (2 * tp + wrong) if tp + wrong else 0.0)
    assert "perplexity" not in r


def test_batched_greedy_decoding_is_one_by_one_decoding(stories: Path) -> None:
    model, t = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    prompts = ["Once upon a time", "Lily", "The dog ran to the big tree and then", "One day, Tom saw a"]
    together = generate(model, t, prompts, max_new_tokens=24, batch_size=3)
    alone = [generate(model, t, [p], max_new_tokens=24)[0] for p in prompts]
    assert together == alone
    ids = t(prompts[0], return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert together[0] == t.decode(plain, skip_special_tokens=True)
    assert len(together[0]) > 20


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7), ("#### 1,234", 1234), ("#### $1,080.50", Fraction(2161, 2)), (r"it is \boxed{42}.", 42),
        ("first 3 and then 12.", 12), ("#### -5%", -5), ("that is 3/4", Fraction(3, 4)), ("none", None), ("#### many, 9 of them", 9),
        ("#### 18.00", 18), ("costs $5.", 5), ("#### .5", Fraction(1, 2)),
    ],
)  # fmt: skip
def test_answers_are_read_as_numbers(answer: str, number: object) -> None:
    assert extract(answer) == number


def test_gsm8k_scores_what_the_model_says(stories: Path, tmp_path: Path) -> None:
    """Whatever this small model writes, the score must be that of its own text, read by hand."""
    model, t = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"What is {i} and {i}?", "answer": f"#### {i}"}) for i in range(4)))
    r = gsm8k(model, t, str(path), max_new_tokens=12)
    assert r["gsm8k_n"] == 4
    assert 0 <= r["gsm8k_low"] <= r["gsm8k"] <= r["gsm8k_high"] <= 1
    path.write_text(json.dumps({"question": "?", "answer": "no number"}))
    with pytest.raises(DataError, match="row 0 .* has no number"):
        gsm8k(model, t, str(path))
    path.write_text(json.dumps({"q": "?", "answer": "#### 1"}))
    with pytest.raises(DataError, match="not question and answer"):
        gsm8k(model, t, str(path))


class After:
    """Says yes from call number `n` on."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_evaluation_stops_between_batches_and_answers_between_tokens(stories: Path, tmp_path: Path) -> None:
    model, _ = tiny("llama", vocab=64, layers=2, width=16)
    model.train()
    with pytest.raises(Interrupted):
        heldout(model, rows(), pad, batch_size=2, interrupted=After(2))
    assert model.training
    model, t = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "What?", "answer": "#### 1"}))
    many = After(10**6)
    gsm8k(model, t, str(path), max_new_tokens=12, interrupted=many)
    assert 10**6 - many.left > 12
    for n in (0, 3):
        with pytest.raises(Interrupted):
            gsm8k(model, t, str(path), max_new_tokens=12, interrupted=After(n))


@pytest.mark.parametrize("n", [0, 4, 7])
def test_a_run_stopped_in_an_evaluation_resumes_to_the_same_bits(n: int) -> None:
    """Nothing of the evaluation has happened: it is still due, and is done first when the run goes on."""

    def world(interrupted: object) -> tuple:
        w = language(sched="overlap", turns=3, layers=2)
        data = Encoded([{"input_ids": x.tolist(), "labels": x.tolist()} for x in tokens(9, 4)])
        lines: list = []

        def evaluate(params: dict) -> dict:
            w.trainer.view.place(params)
            return heldout(w.trainer.view.model, data, pad, batch_size=2, interrupted=interrupted)

        w.simulation.evaluations.measure, w.simulation.evaluations.due = evaluate, True
        w.simulation.ledger.listener = lines.append
        return w, lines

    whole, lines = world(lambda: False)
    whole.simulation.run()
    cut, before = world(After(n))
    with pytest.raises(Interrupted):
        cut.simulation.run()
    assert cut.simulation.evaluations.due and cut.simulation.server.version == n // 2
    tensors, skeleton = store.flatten(cut.simulation.state_dict())
    again, after = world(lambda: False)
    again.simulation.load_state_dict(store.unflatten(tensors, json.loads(json.dumps(skeleton))))
    again.simulation.run()
    assert digest(again.final) == digest(whole.final)
    assert before + after == lines


def test_the_answers_of_the_real_test_set_are_all_read() -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no GSM8K test file at {path}")
    from hocket.data import load

    rows = load(path)
    assert len(rows) == 1319
    assert all(extract(a) is not None for a in rows["answer"])


def test_the_last_evaluation_has_each_clients_own_loss(tmp_path: Path) -> None:
    """The model is the same; a client's number is that of its rows alone, and only the last record has it."""
    (tmp_path / "a.txt").write_text("\n".join(f"client text number {i} of sixty" for i in range(60)))
    recipe = parse({
        "name": "own", "turns": 2, "model": {"source": "tiny:gpt2"}, "method": {"name": "fedavg"},
        "data": {"source": str(tmp_path / "a.txt"), "client_heldout": 3, "max_length": 64},
        "clients": {"count": 2}, "training": {"local_steps": 1}, "schedule": {"name": "sync"},
    })  # fmt: skip
    run.start(recipe, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    evals = [r for r in records if r["what"] == "eval"]
    assert [len(r.get("clients", [])) for r in evals] == [0, 0, 2]
    assert all(r["word_perplexity"] > r["perplexity"] for r in evals)
    e = Experiment(recipe)
    start = e.trainer.start()
    found = e.evaluate_clients(lambda client: start)["clients"]
    for rows, loss in zip(e.data.own, found, strict=True):
        assert loss == pytest.approx(heldout(e.view.model, rows, e.collate)["loss"], rel=1e-5)
    trained = {tuple(r["input_ids"].tolist()) for c in e.data.clients for r in c}
    assert not trained & {tuple(r["input_ids"].tolist()) for o in e.data.own for r in o}
