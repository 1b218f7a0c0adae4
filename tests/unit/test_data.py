"""Data: every format, every template, every partition, and errors that name file, line and field."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hocket.data import Encoded, collate, encode, load, partition, prepare, render
from hocket.data.docstrings import build
from hocket.data.templates import Unusable
from hocket.errors import DataError
from hocket.models.tiny import tiny_tokenizer

ROWS = [{"instruction": f"say {i}", "output": f"answer {i}", "label": i % 3, "source": "abc"[i % 3]} for i in range(30)]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat: bool = False, bos: bool = False) -> Any:
    """Characters as tokens, so that any text can be read back."""
    chars = sorted({chr(c) for c in range(32, 127)} | {"\n"})
    special = ["<pad>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + chars)} | {"<unk>": 999}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    t = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=special[3:],
    )  # fmt: skip
    if chat:
        t.chat_template = CHAT
    return t


def text(t: Any, ids: Any) -> str:
    return "".join(t.convert_ids_to_tokens([int(i) for i in ids]))


def answer(row: dict[str, Any]) -> list[int]:
    return [x for x in row["labels"] if x != -100]


# --- files -------------------------------------------------------------------------------------------------------------
def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(r) for r in ROWS) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write(lines)
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "folder"):
        assert load(tmp_path / name).to_list() == ROWS
        assert len(load(tmp_path / name, limit=7)) == 7


def test_wrong_files_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    (tmp_path / "list.jsonl").write_text('{"a": 1}\n[1]\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 5000)[:-20])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "mixed.jsonl").write_text('{"a": 1}\n{"a": {"b": 2}}\n')
    for name, message in {
        "bad.jsonl": "line 2: not JSON", "list.jsonl": "line 2: expected an object", "empty.jsonl": "is empty",
        "blank.jsonl": "holds no rows", "cut.jsonl.gz": "cannot be read", "bad.parquet": "is not parquet",
        "mixed.jsonl": "changes its type", "none.jsonl": "does not exist",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message) as error:
            load(tmp_path / name)
        assert name in str(error.value)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match="holds no train file"):
        load(tmp_path / "hollow")


def test_a_hub_id_without_a_network_is_a_clear_error() -> None:
    with pytest.raises(DataError, match="hub has no such set or cannot be reached"):
        load("nobody/nothing-of-this-name")


# --- the built-in set ------------------------------------------------------------------------------------------------------
def test_docstrings_are_read_not_imported_and_are_deterministic() -> None:
    packages = ["pydantic", "peft"]
    before = set(sys.modules)
    train, held = build(packages, per_package=150)
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in packages}
    assert set(train["package"]) == set(held["package"]) == set(packages)
    again, _ = build(packages, per_package=150)
    assert again.to_list() == train.to_list()
    assert 0.04 < len(held) / (len(train) + len(held)) < 0.2
    outputs = list(train["output"]) + list(held["output"])
    assert len(set(outputs)) == len(outputs)
    for row in train.select(range(20)):
        assert "def " in row["instruction"]
        assert row["output"] not in row["instruction"]


def test_held_out_docstrings_stay_held_out_when_another_team_joins() -> None:
    _, held = build(["peft"], per_package=100)
    _, more = build(["peft", "pydantic"], per_package=100)
    assert set(held["output"]) == {r["output"] for r in more if r["package"] == "peft"}


def test_an_unknown_package_is_named() -> None:
    with pytest.raises(DataError, match="'nosuchpackage' is not an installed"):
        build(["nosuchpackage"])


def test_a_module_that_is_one_file_is_a_package_too() -> None:
    train, _ = build(["typing_extensions", "argparse"])
    assert set(train["package"]) == {"typing_extensions", "argparse"}
    assert {r["name"].split(".")[0] for r in train if r["package"] == "argparse"} == {"argparse"}


# --- templates -----------------------------------------------------------------------------------------------------------------
def test_loss_is_on_the_answer_and_its_end_only() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    plain, chat = tokenizer(), tokenizer(chat=True)
    alpaca = render(row, plain, "auto", 400)[0]
    assert text(plain, answer(alpaca)) == "3</s>"
    assert "### Instruction:\nAdd." in text(plain, alpaca["input_ids"])
    assert "### Input:\n1 and 2" in text(plain, alpaca["input_ids"])
    talk = render(row, chat, "auto", 400)[0]
    assert text(chat, talk["input_ids"]) == "<|user|>Add.\n\n1 and 2<|end|>\n<|assistant|>3<|end|>"
    assert text(chat, answer(talk)) == "3<|end|>"
    simple = render(row, plain, "plain", 400)[0]
    assert text(plain, answer(simple)) == "3</s>"
    for r in (alpaca, talk, simple):
        head = sum(x == -100 for x in r["labels"])
        assert r["labels"] == [-100] * head + r["input_ids"][head:]


def test_text_alone_is_learned_as_a_whole_and_bos_comes_once() -> None:
    t = tokenizer(bos=True)
    row = render({"text": "hello"}, t, "plain", 50)[0]
    assert text(t, row["input_ids"]) == "<s>hello</s>"
    assert text(t, answer(row)) == "hello</s>"
    assert text(t, render({"question": "a", "answer": "b"}, t, "alpaca", 500)[0]["input_ids"]).count("<s>") == 1


def test_long_rows_are_cut_but_keep_an_answer_token() -> None:
    t = tokenizer()
    row = render({"instruction": "q", "output": "x" * 100}, t, "plain", 20)[0]
    assert len(row["input_ids"]) == 20
    assert len(answer(row)) == 18
    with pytest.raises(Unusable, match="no room"):
        render({"instruction": "q" * 50, "output": "x"}, t, "plain", 20)


def test_rows_that_cannot_be_used_are_counted_and_named() -> None:
    rows = [*ROWS[:3], {"instruction": "", "output": "x"}, {"instruction": "x", "output": " "}, {"instruction": "q" * 900, "output": "x"}]
    data = datasets.Dataset.from_list([{k: r.get(k) for k in ("instruction", "output")} for r in rows])
    encoded, kept, skipped = encode(data, tokenizer(), template="alpaca", max_length=300)
    assert kept == [0, 1, 2]
    assert len(encoded) == 3
    assert skipped == {"no instruction": [3], "no answer": [4], "prompt leaves no room for the answer": [5]}
    with pytest.raises(DataError, match=r"no row can be used: no text \(2\); columns are x"):
        encode(datasets.Dataset.from_list([{"x": 1}] * 2), tokenizer())


def test_fields_name_other_columns_and_chat_needs_a_template() -> None:
    t = tokenizer()
    row = render({"q": "hi", "a": "yo"}, t, "plain", 50, {"instruction": "q", "output": "a"})[0]
    assert text(t, answer(row)) == "yo</s>"
    with pytest.raises(DataError, match="no chat template"):
        render(ROWS[0], t, "chat", 50)


def test_a_real_tokenizer(stories: Path) -> None:
    t = AutoTokenizer.from_pretrained(stories)
    row = render({"question": "Who?", "answer": "Lily went to the park."}, t, "plain", 64)[0]
    assert "Lily went to the park." in t.decode(answer(row))


def test_packing_fills_rows_and_keeps_every_token() -> None:
    data = datasets.Dataset.from_list([{"instruction": "ab", "output": "c" * n} for n in (3, 4, 5, 20)])
    one, _, _ = encode(data, tokenizer(), template="plain", max_length=32)
    packed = one.packed(32)
    assert torch.equal(packed.ids, one.ids)
    assert len(packed) < len(one)


def test_classification_rows_are_texts_or_pairs() -> None:
    t = tokenizer()
    data = datasets.Dataset.from_list([{"sentence1": "ab", "sentence2": "cd", "label": 1}, {"sentence1": "x", "sentence2": "y", "label": 0}])
    encoded, _, _ = encode(data, t, task="classification")
    assert text(t, encoded[0]["input_ids"]) == "ab\ncd"
    batch = collate([encoded[0], encoded[1]], t.pad_token_id)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_labels_that_are_text_become_numbers_and_the_held_out_rows_share_them(tmp_path: Path) -> None:
    def file(name: str, labels: list[str]) -> str:
        (tmp_path / name).write_text("\n".join(json.dumps({"text": f"t {i}", "label": x}) for i, x in enumerate(labels)))
        return str(tmp_path / name)

    source = file("train.jsonl", ["pos", "neg ", "neutral", "", "neg"] * 6)
    more = {"task": "classification", "clients": 2, "num_labels": 3}
    p = prepare(source, tokenizer(), heldout_source=file("test.jsonl", ["pos", "neg"]), **more)
    assert p.classes == ["neg", "neutral", "pos"]
    assert p.heldout.labels.tolist() == [2, 0]
    assert sorted(int(x) for c in p.clients for x in c.labels) == [0] * 12 + [1] * 6 + [2] * 6
    assert p.skipped == {"no label (text, or a whole number from 0)": list(range(3, 30, 5))}
    assert prepare(source, tokenizer(), **more).classes == p.classes
    with pytest.raises(DataError, match="held-out label 'posi' is not in data.source.*did you mean 'pos'"):
        prepare(source, tokenizer(), heldout_source=file("odd.jsonl", ["posi"]), **more)
    with pytest.raises(DataError, match=r"model.num_labels is 2, but labels go from 0 to 2; set it to 3"):
        prepare(source, tokenizer(), **{**more, "num_labels": 2})


def test_encoded_is_a_list_of_rows_and_batches_are_padded_right() -> None:
    e = Encoded([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert len(e) == 2
    assert e[-1]["input_ids"].tolist() == [4]
    assert [r["input_ids"].tolist() for r in e.subset([1, 0])] == [[4], [1, 2, 3]]
    with pytest.raises(IndexError):
        e[2]
    batch = collate([e[0], e[1]], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    wide = collate([e[0], e[1]], pad_id=9, pad_to_multiple=8)
    assert wide["input_ids"].tolist()[1] == [4, *[9] * 7]
    assert wide["labels"].tolist()[0] == [-100, 2, 3, *[-100] * 5]
    assert wide["attention_mask"].sum(1).tolist() == [3, 1]


# --- partitions -----------------------------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(["iid", "dirichlet", "natural", "clusters"]), clients=st.integers(1, 3), seed=st.integers(0, 50))
def test_every_row_goes_to_exactly_one_client_the_same_way_each_time(kind: str, clients: int, seed: int) -> None:
    data = datasets.Dataset.from_list(ROWS)
    draw = lambda: partition(data, kind, clients, seed, column="source", alpha=5.0, clusters=3, min_rows=0, text=lambda r: r["instruction"] + " word" * r["label"])
    parts, labels = draw()
    assert sorted(i for p in parts for i in p) == list(range(30))
    assert (parts, labels) == draw()


def test_partitions_are_what_their_names_say() -> None:
    big = datasets.Dataset.from_list([{"label": i % 5, "text": f"t {i}"} for i in range(2000)])

    def skew(alpha: float) -> float:
        parts, _ = partition(big, "dirichlet", 5, 1, column="label", alpha=alpha, min_rows=0)
        shares = [max(sum(i % 5 == c for i in p) for c in range(5)) / max(len(p), 1) for p in parts]
        return sum(shares) / 5

    assert skew(0.1) > 0.5 > 0.35 > skew(100.0)
    parts, _ = partition(big, "iid", 3, 1)
    assert {len(p) for p in parts} <= {666, 667}
    assert parts != partition(big, "iid", 3, 2)[0]
    parts, labels = partition(datasets.Dataset.from_list(ROWS), "natural", 2, 0, column="source")
    assert [sorted({labels[i] for i in p}) for p in parts] in ([["a"], ["b", "c"]], [["a", "c"], ["b"]])


def test_impossible_partitions_say_what_to_change() -> None:
    data = datasets.Dataset.from_list(ROWS)
    for kind, clients, more, message in [
        ("natural", 4, {"column": "source"}, "has 3 values .* lower clients.count to 3"),
        ("natural", 2, {"column": "sorce"}, "no column 'sorce'"),
        ("iid", 31, {}, "31 clients for 30 usable rows"),
        ("dirichlet", 8, {"column": "source", "alpha": 0.01}, r"client \d gets 0 rows.*raise data.alpha"),
        ("clusters", 2, {"clusters": 99}, "99 clusters for 30 rows"),
        ("random", 2, {}, "there is no 'random'"),
    ]:
        with pytest.raises(DataError, match=message):
            partition(data, kind, clients, 0, **more)


def test_prepare_holds_out_drops_and_summarizes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [*ROWS, {"instruction": "x", "output": "", "label": 0, "source": "a"}]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    p = prepare(str(path), tokenizer(), kind="natural", column="source", clients=3, max_length=300, heldout_fraction=0.2, seed=3)
    assert sum(map(len, p.clients)) + len(p.heldout) + sum(map(len, p.skipped.values())) in (30, 31)
    assert p.names == ["a", "b", "c"]
    assert {p.heldout[i]["group"] for i in range(len(p.heldout))} <= {"a", "b", "c"}
    assert [r["rows"] for r in p.summary] == [len(c) for c in p.clients]
    assert p.table().row_count >= 3


def test_prepare_docstrings_splits_by_team() -> None:
    p = prepare("docstrings", tokenizer(), kind="natural", clients=2, packages=["peft", "pydantic"], max_length=1200, heldout_limit=10)
    assert p.names == ["peft", "pydantic"]
    assert len(p.heldout) == 10


def test_plain_text_is_a_row_a_paragraph_and_long_ones_come_in_windows(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    lines = ["", " = First = ", "", " one two three ", "", " = = Sub = = ", "", " four ", " = 1 rad / s = ", "", " = Second = ", "", " five "]
    path.write_text("\n".join(lines) + "\n")
    rows = load(path)
    assert rows["text"] == ["one two three", "four", "= 1 rad / s =", "five"]
    assert rows["section"] == ["First", "First", "First", "Second"]
    tok = tiny_tokenizer(128, "gpt2")
    whole = render({"text": "a" * 40}, tok, "plain", 400)[0]["input_ids"]
    parts = render({"text": "a" * 40}, tok, "plain", 9)
    assert [p["input_ids"][0] for p in parts[1:]] == [p["input_ids"][-1] for p in parts[:-1]]
    assert whole == parts[0]["input_ids"] + [t for p in parts[1:] for t in p["input_ids"][1:]]
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"bad\.txt', line 2.*UTF-8"):
        load(tmp_path / "bad.txt")
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        load(tmp_path / "none.txt")


def test_clients_keep_rows_that_nobody_trains_on(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{'word ' * (i % 7 + 1)}number {i % 30}" for i in range(60)))
    tok = tiny_tokenizer(128, "gpt2")
    options = {"heldout_fraction": 0.1, "clients": 3, "max_length": 128, "seed": 1}
    plain, split = prepare(str(path), tok, **options), prepare(str(path), tok, client_heldout=4, **options)
    assert not plain.own
    assert all(len(o) >= 4 for o in split.own)
    for before, train, own in zip(plain.clients, split.clients, split.own, strict=True):
        rows = lambda e: [r["input_ids"] for r in e.plain(range(len(e)))]
        assert sorted(rows(train) + rows(own)) == sorted(rows(before))
        assert not {tuple(r) for r in rows(own)} & {tuple(r) for c in split.clients for r in rows(c)}
    assert [(r["rows"], r["heldout"]) for r in split.summary] == [(len(t), len(o)) for t, o in zip(split.clients, split.own, strict=True)]
    assert len(split.table().columns) == len(plain.table().columns) + 1
    again = prepare(str(path), tok, client_heldout=4, packing=True, **{**options, "max_length": 64})
    assert again.own[0].tokens < 64 * len(again.own[0]) and len(again.clients[0]) < again.summary[0]["rows"]  # only the trained are packed
    with pytest.raises(DataError, match=r"data\.client_heldout: client 0 has \d+ rows, too few to hold 50 out.*data\.min_rows"):
        prepare(str(path), tok, client_heldout=50, **options)


def test_a_row_that_a_client_holds_out_is_trained_on_by_nobody(tmp_path: Path) -> None:
    path = tmp_path / "twice.txt"
    path.write_text("\n".join(f"number {i % 30}" for i in range(120)))
    tok = tiny_tokenizer(128, "gpt2")
    p = prepare(str(path), tok, clients=3, client_heldout=6, seed=1)
    texts = lambda e: {tuple(r["input_ids"].tolist()) for r in e}
    assert not set().union(*map(texts, p.own)) & set().union(*map(texts, p.clients))
    twice = p.skipped["equal to a row that another client holds out"]
    assert sum(map(len, p.clients)) + sum(map(len, p.own)) + len(twice) == 120 - len(p.heldout)
    assert prepare(str(path), tok, clients=3, client_heldout=6, seed=1).own[0].plain([0]) == p.own[0].plain([0])


def test_words_are_counted_of_text_alone(tmp_path: Path) -> None:
    path, held, pairs = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.jsonl"
    path.write_text("one two\nthree\nfour five six\n")
    held.write_text(" = T = \n\nseven eight\n" + "nine " * 40)
    pairs.write_text("\n".join(json.dumps(r) for r in ROWS))
    tok = tiny_tokenizer(128, "gpt2")
    p = prepare(str(path), tok, heldout_source=str(held), clients=1, max_length=16)
    assert p.words == 42
    assert len(p.heldout) > 2  # windows
    assert prepare(str(pairs), tok, clients=1, template="plain").words is None


def test_wikitext_sections_are_articles_and_clients() -> None:
    folder = Path(__file__).parents[3] / "shared" / "data" / "wikitext2"
    if not folder.exists():
        pytest.skip(f"no WikiText-2 at {folder}")
    rows = load(folder / "wiki.valid.raw")
    assert len(rows) == 1841
    assert len(set(rows["section"])) == 60
    tok = tiny_tokenizer(128, "gpt2")
    for kind in ("natural", "dirichlet"):
        p = prepare(str(folder / "wiki.valid.raw"), tok, kind=kind, column="section", clients=8, client_heldout=4, min_rows=8, limit=400)
        assert all(len(c) for c in p.clients)
        assert all(len(o) >= 4 for o in p.own)
