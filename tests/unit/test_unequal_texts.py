"""CLLoRA's two axes: lengths and quality of texts, unequal among clients, each without moving the other."""

from __future__ import annotations

import collections
import importlib.util
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hocket import run
from hocket.client import work
from hocket.data import prepare
from hocket.data.corrupt import rates, words
from hocket.data.partition import _equal, length_bin, length_edges
from hocket.errors import DataError
from hocket.experiment import Experiment
from hocket.methods import Job
from hocket.models.tiny import tiny_tokenizer
from hocket.recipe import parse
from hocket.tree import generator

TOKENIZER = tiny_tokenizer(101, "gpt2")  # a character is a token


def rows(n: int = 600) -> list[dict[str, Any]]:
    """Answers of 1 to 40 words that name their row, and a label that has nothing to do with their length."""
    out = []
    for i in range(n):
        g = generator("row", i)
        count = int(torch.randint(1, 41, (1,), generator=g))
        answer = " ".join(f"{chr(97 + (i + k) % 26)}{i}x{k}" for k in range(count))
        out.append({"instruction": f"row {i}", "output": answer, "topic": "ab"[int(torch.randint(2, (1,), generator=g))]})
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows())))
    return str(path)


def made(source: str, **more: Any) -> Any:
    options = {"template": "plain", "max_length": 600, "clients": 6, "kind": "lengths", "equal": True, "seed": 3, **more}
    return prepare(source, TOKENIZER, **options)


def spelled(row: Any, answer_only: bool = False) -> str:
    ids = [t for t in (row["labels"] if answer_only else row["input_ids"]).tolist() if t != -100]
    return "".join(TOKENIZER.convert_ids_to_tokens(ids)).removesuffix("</s>")


def number(row: Any) -> int:
    return int(spelled(row).split("\n")[0].split()[1])


def sizes(part: Any) -> list[int]:
    return (part.offsets.diff() + part.cut).tolist()


def distance(p: Any) -> float:
    """The largest Kolmogorov-Smirnov distance of a client's lengths from everybody's."""
    every = [n for c in p.clients for n in sizes(c)]
    return max(stats.ks_2samp(sizes(c), every).statistic for c in p.clients)


# --- lengths ---------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=12, max_size=80), clients=st.integers(2, 12),
    alpha=st.sampled_from([0.01, 0.1, 1.0, 1e6]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_shares_use_every_row_once_whatever_the_draw(labels: list[str], clients: int, alpha: float, seed: int) -> None:
    parts = _equal(labels, clients, seed, alpha)
    assert sorted(i for p in parts for i in p) == list(range(len(labels)))
    assert {len(p) for p in parts} <= {len(labels) // clients, len(labels) // clients + 1}
    assert parts == _equal(labels, clients, seed, alpha)


@pytest.mark.parametrize("equal", [False, True])
def test_the_rows_are_those_of_an_iid_partition_and_only_their_places_differ(source: str, equal: bool) -> None:
    iid = made(source, kind="iid", equal=False)
    skewed = made(source, equal=equal, alpha=0.1)
    texts = lambda p: sorted(spelled(r) for c in p.clients for r in c)
    assert texts(iid) == texts(skewed)
    assert sorted(map(spelled, iid.heldout)) == sorted(map(spelled, skewed.heldout))
    if equal:
        assert {len(c) for c in skewed.clients} == {90}


def test_lengths_are_alike_for_a_large_alpha_and_unlike_for_a_small_one(source: str) -> None:
    assert distance(made(source, alpha=1e6)) < 0.1
    assert distance(made(source, alpha=0.1)) > 0.4


def test_unequal_lengths_leave_topics_and_quality_as_they_are(source: str) -> None:
    topics = {i: r["topic"] for i, r in enumerate(rows())}
    share = lambda p: [sum(topics[number(r)] == "a" for r in c) / len(c) for c in p.clients]
    iid = [share(made(source, kind="iid", equal=False, seed=s)) for s in range(5)]
    skewed = [share(made(source, alpha=0.1, seed=s)) for s in range(5)]
    spread = lambda shares: math.sqrt(sum((x - 0.5) ** 2 for row in shares for x in row) / 30)
    assert spread(skewed) < 1.5 * spread(iid)  # 90 rows a client: 0.053 from chance alone
    clean, spoiled = made(source, alpha=0.1), made(source, alpha=0.1, corruption=0.4)
    where = lambda p: [sorted(number(r) for r in c) for c in p.clients]
    assert where(clean) == where(spoiled)  # quality moves no row, so it moves no length and no topic
    marked = [c["corrupted"] for c in made(source, alpha=1e6, corruption=0.4).summary]
    assert marked == [c["corrupted"] for c in spoiled.summary]  # and lengths move no client's quality


def test_bins_hold_equally_many_rows_and_their_names_sort_as_lengths() -> None:
    lengths = [int(x) for x in torch.randint(5, 900, (1000,), generator=generator("lengths"))]
    for bins in (2, 4, 12):
        edges = length_edges(lengths, bins)
        counts = collections.Counter(length_bin(n, edges) for n in lengths)
        assert len(counts) == bins
        assert max(counts.values()) - min(counts.values()) < 15
        assert [length_bin(n, edges) for n in sorted(lengths)] == sorted(length_bin(n, edges) for n in lengths)
    assert length_bin(10, [10, 20]) == "length 1: up to 10 tokens"
    assert length_bin(11, [10, 20]) == "length 2: to 20 tokens"
    assert length_bin(21, [10, 20]) == "length 3: above 20 tokens"
    with pytest.raises(DataError, match=r"data.bins: 4 bins, but nearly all rows have one length, 7"):
        length_edges([7] * 50, 4)


def test_held_out_rows_are_grouped_by_the_clients_bins(source: str) -> None:
    p = made(source, alpha=0.1, bins=3)
    edges = length_edges([n for c in p.clients for n in sizes(c)], 3)
    assert [r["group"] for r in p.heldout] == [length_bin(n, edges) for n in sizes(p.heldout)]
    assert len(set(p.heldout.groups)) == 3


def test_windows_of_a_text_are_as_long_as_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join("y" * n for n in [10, 12, 14, 99] * 6))
    (tmp_path / "b.txt").write_text("z" * 60)
    p = prepare(str(tmp_path / "a.txt"), TOKENIZER, heldout_source=str(tmp_path / "b.txt"), max_length=20, kind="lengths", clients=2, bins=4, alpha=9.0)
    assert set(p.heldout.groups) == {"length 2: above 15 tokens"}  # 60 tokens and the end, in four windows
    assert sum(map(len, p.clients)) == 6 * (3 + 6)


def test_what_would_do_nothing_is_refused(source: str) -> None:
    for kind in ("iid", "natural"):
        with pytest.raises(DataError, match=f"data.equal: it does nothing for partition '{kind}'"):
            made(source, kind=kind, column="topic", clients=2)


# --- truncation ------------------------------------------------------------------------------------------------------
def test_what_is_cut_is_counted_for_each_client(source: str) -> None:
    whole, cut = made(source, alpha=0.1), made(source, alpha=0.1, max_length=80)
    for a, b, row in zip(whole.clients, cut.clients, cut.summary, strict=True):
        lost = [max(0, n - 80) for n in sizes(a)]
        assert (row["cut"], row["lost"]) == (sum(n > 0 for n in lost), sum(lost))
        assert sizes(a) == sizes(b)  # bins are of what was there before the cut
    assert whole.summary[0]["cut"] == whole.summary[0]["lost"] == 0
    heads = [c.header for c in cut.table().columns]
    assert heads[-2:] == ["tokens cut off", "rows cut"]
    assert "rows cut" not in [c.header for c in whole.table().columns]
    packed = made(source, alpha=0.1, max_length=80, packing=True)
    assert [r["lost"] for r in packed.summary] == [int(c.cut.sum()) for c in packed.clients] == [r["lost"] for r in cut.summary]


def test_cuts_of_classified_pairs_are_counted(tmp_path: Path) -> None:
    given_rows = [{"sentence1": "a" * n, "sentence2": "b" * 5, "label": n % 2} for n in range(5, 25)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, given_rows)))
    p = prepare(str(tmp_path / "p.jsonl"), TOKENIZER, task="classification", clients=1, max_length=20, heldout_fraction=0.01)
    left = {int(r["input_ids"].eq(TOKENIZER.convert_tokens_to_ids("a")).sum()) for r in p.clients[0]}
    assert max(left) == 14 and p.summary[0]["cut"] > 5  # 20 tokens less a newline and five
    assert all(len(r["input_ids"]) <= 20 for r in p.clients[0])


# --- quality ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mean", [0.05, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("clients", [2, 8, 31])
def test_shares_have_the_stated_mean_and_are_the_betas(mean: float, alpha: float, clients: int) -> None:
    found = rates(mean, alpha, clients, 0)
    assert sum(found) / clients == pytest.approx(mean, abs=1e-6)
    assert found == rates(mean, alpha, clients, 0)
    if clients == 31:
        assert found != rates(mean, alpha, clients, 1) and sorted(found) == sorted(rates(mean, alpha, clients, 1))
        spread = sum((x - mean) ** 2 for x in found) / clients
        assert spread == pytest.approx(mean * (1 - mean) / (alpha + 1), rel=0.12, abs=1e-5)
    if alpha == 1e6:
        assert max(abs(x - mean) for x in found) < 0.01


def test_as_many_rows_are_spoiled_as_stated_and_always_the_same(source: str) -> None:
    clean, p = made(source, alpha=1e6), made(source, alpha=1e6, corruption=0.3)
    again, other = made(source, alpha=1e6, corruption=0.3), made(source, alpha=1e6, corruption=0.3, seed=4)
    answers = lambda p: [{number(r): spelled(r, True) for r in c} for c in p.clients]
    changed = [sum(a[i] != b[i] for i in a) for a, b in zip(answers(clean), answers(p), strict=True)]
    assert sum(r["corrupted"] for r in p.summary) == pytest.approx(0.3 * 540, abs=3)
    # an answer of one word stays as it is unless it is said twice
    assert all(0 <= r["corrupted"] - n <= 5 for r, n in zip(p.summary, changed, strict=True))
    assert max(changed) > 60 and min(changed) < 10  # clients are unlike
    assert answers(p) == answers(again) and answers(p) != answers(other)
    assert list(map(spelled, p.heldout)) == list(map(spelled, clean.heldout))
    assert "rows spoiled" in [c.header for c in p.table().columns]


def test_a_clients_own_held_out_rows_are_clean(source: str) -> None:
    truth = {f"row {i}": r["output"] for i, r in enumerate(rows())}
    p = made(source, corruption=0.9, corruption_alpha=1e6, client_heldout=10)
    assert all(truth[spelled(r).split("\n")[0]] == spelled(r, True) for o in p.own for r in o)
    trained = [truth[spelled(r).split("\n")[0]] == spelled(r, True) for c in p.clients for r in c]
    assert sum(trained) / len(trained) == pytest.approx(0.1, abs=0.05)


def test_words_are_shuffled_dropped_or_repeated_and_as_many_on_average() -> None:
    old = [f"w{i}" for i in range(20)]
    new = [words(" ".join(old), generator("words", i)).split() for i in range(600)]
    kinds = collections.Counter(len(n) for n in new)
    assert set(kinds) == {10, 20, 30} and min(kinds.values()) > 150
    for n in new:
        if len(n) == 20:
            assert sorted(n) == sorted(old) and n != old
        elif len(n) == 10:
            assert all(old.index(a) < old.index(b) for a, b in pairwise(n))
        else:
            assert [w for w in old if w in n] == old and collections.Counter(n).most_common(1)[0][1] == 2
    assert sum(map(len, new)) / len(new) == pytest.approx(20, abs=1)
    assert {words("one", generator("one", i)) for i in range(20)} == {"one", "one one"}


def test_other_columns_are_spoiled_by_name_and_what_has_no_answer_is_refused(tmp_path: Path) -> None:
    given_rows = [{"q": f"ask {i}", "a": "one two three four", "output": "five six seven"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, given_rows)))
    more = {"template": "plain", "clients": 1, "corruption": 0.99, "corruption_alpha": 1e6, "heldout_fraction": 0.1}
    p = prepare(str(tmp_path / "a.jsonl"), TOKENIZER, fields={"instruction": "q", "output": "a"}, **more)
    assert all(spelled(r, True) != "one two three four" and "five" not in spelled(r) for r in p.clients[0])
    (tmp_path / "t.txt").write_text("\n".join(f"text number {i}" for i in range(20)))
    with pytest.raises(DataError, match=r"data.corruption: row \d+ has no answer to spoil"):
        prepare(str(tmp_path / "t.txt"), TOKENIZER, **more)
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": f"t {i}", "label": i % 2}) for i in range(20)))
    with pytest.raises(DataError, match=r"data.corruption: it spoils the words of answers; a classification has labels"):
        prepare(str(tmp_path / "c.jsonl"), TOKENIZER, task="classification", **more)


# --- weights ---------------------------------------------------------------------------------------------------------
def test_an_update_weighs_the_label_tokens_it_was_trained_on(source: str) -> None:
    def trained(weighting: str) -> list[Any]:
        recipe = parse({
            "turns": 1, "seed": 3, "model": {"source": "tiny:gpt2"}, "method": {"name": "fedavg"},
            "data": {"source": source, "template": "plain", "partition": "lengths", "alpha": 0.1, "equal": True, "max_length": 200, "limit": 120},
            "clients": {"count": 4, "weighting": weighting}, "training": {"local_epochs": 1.0, "batch_size": 5},
        })  # fmt: skip
        e = Experiment(recipe)
        start = e.trainer.start()
        return [e.data, [work(e.setting(), Job(c, c, 0, 0, 0.0), start, {}, e.rows[c]).weight for c in range(4)]]

    data, found = trained("tokens")
    # 30 rows of each client are trained on once; every token of an answer counts but one that begins a row
    assert found == [sum(int((r["labels"][1:] != -100).sum()) for r in c) for c in data.clients]
    assert max(found) > 2 * min(found)
    assert trained("examples")[1] == trained("rows")[1] == [30.0] * 4
    assert trained("uniform")[1] == [1.0] * 4


# --- the study -------------------------------------------------------------------------------------------------------
def test_a_client_alone_is_a_federation_of_one(source: str, tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "cllora" / "local.py"
    spec = importlib.util.spec_from_file_location("cllora_local", path)
    assert spec and spec.loader
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    recipe = parse({
        "turns": 3, "model": {"source": "tiny:gpt2"}, "method": {"name": "fedit"}, "clients": {"count": 1},
        "data": {"source": source, "template": "plain", "limit": 60, "partition": "lengths", "client_heldout": 4, "corruption": 0.5},
        "training": {"local_steps": 2, "lr": 0.01}, "evaluation": {"every": 3},
    })  # fmt: skip
    run.start(recipe, tmp_path / "run")
    records = map(json.loads, (tmp_path / "run" / "ledger.jsonl").read_text().splitlines())
    last = [r for r in records if r["what"] == "eval"][-1]
    (alone,) = local.alone(Experiment(recipe))
    assert alone["loss"] == pytest.approx(last["loss"], abs=1e-6) != pytest.approx(alone["own"], abs=1e-6)
    assert [alone["own"]] == pytest.approx(last["clients"], abs=1e-6)
    assert alone["groups"] == pytest.approx(last["groups"], abs=1e-6)
    assert alone["corrupted"] == round(0.5 * alone["rows"])
