"""Data at the edges: what must not leak, what must be named, what must not be passed over in silence."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hocket.data import collate, docstrings, encode, load, partition, prepare, render
from hocket.data.templates import Unusable
from hocket.errors import DataError
from hocket.models.tiny import tiny_tokenizer

TOK = tiny_tokenizer(128)


def _file(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def _teams(folder: Path) -> str:
    rows = [{"instruction": f"q {i}", "output": "wxyz"[i % 4] * 3, "team": "wxyz"[i % 4]} for i in range(80)]
    return _file(folder, "teams.jsonl", "\n".join(map(json.dumps, rows)))


def test_packing_never_joins_rows_of_two_clients(tmp_path: Path) -> None:
    made = prepare(_teams(tmp_path), TOK, template="plain", packing=True, kind="natural", column="team", max_length=64)
    for rows in made.clients:
        assert len({c for r in rows for c in TOK.decode(r["input_ids"]) if c in "wxyz"}) == 1
    assert sum(r["rows"] for r in made.summary) > sum(map(len, made.clients))


def test_a_limit_on_docstrings_is_spread_over_the_packages() -> None:
    made = prepare("docstrings", TOK, packages=["stdlib", "peft"], kind="natural", clients=2, limit=60, max_length=2000)
    assert sorted(map(len, made.clients)) == [30, 30]


def test_the_share_and_the_source_held_out_of_docstrings_are_heeded(tmp_path: Path) -> None:
    few, many = (
        len(prepare("docstrings", TOK, packages=["peft"], clients=2, heldout_fraction=f, max_length=2000).heldout)
        for f in (0.1, 0.5)
    )
    assert many > 2 * few
    other = prepare(
        "docstrings", TOK, packages=["peft"], clients=2, heldout_source=_teams(tmp_path), max_length=2000, limit=20
    )
    assert len(other.heldout) == 80


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    same = _teams(tmp_path)
    with pytest.raises(DataError, match="is data.source itself"):
        prepare(same, TOK, heldout_source=same)
    rows = [json.dumps({"instruction": f"q {i % 20}", "output": "a"}) for i in range(200)]
    made = prepare(_file(tmp_path, "twice.jsonl", "\n".join(rows)), TOK, clients=2, max_length=2000)
    trained = {tuple(r["input_ids"].tolist()) for c in made.clients for r in c}
    assert len(made.heldout)
    assert not trained & {tuple(r["input_ids"].tolist()) for r in made.heldout}


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.jsonl", '{"a":1}\n\n\n{"a":\n', "line 4: not JSON"),
        ("a.json", '[{"a":1},\n{"a":2},\n{"a":]\n', "line 3: not JSON"),
        ("a.json", '[{"a":1}\n\n{"a":2}]', "line 3: not JSON: expected ','"),
        ("a.json", '[{"a":1},\n7]', "line 2: expected an object"),
        ("a.jsonl", '{"a":null}\n{"a":"x"}\n{"a":1}\n', "line 3, column 'a'"),
        ("a.jsonl", "[" * 200_000, "nested too deeply"),
        ("a.jsonl", b'{"a":"x"}\n{"a":"\xff"}\n', "cannot be read"),
    ],
)
def test_the_line_that_is_named_is_the_line(tmp_path: Path, name: str, text: str | bytes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        load(_file(tmp_path, name, text))


def test_blank_lines_marks_and_spaces_do_not_change_the_rows(tmp_path: Path) -> None:
    assert load(_file(tmp_path, "a.jsonl", '{"a":1}\n\n{"a":2}\n\n{"a":3}\n'), limit=3)["a"][:] == [1, 2, 3]
    assert load(_file(tmp_path, "b.jsonl", b'\xef\xbb\xbf{"a":1}\n'))["a"][:] == [1]
    assert load(_file(tmp_path, "c.json", '\n  [ {"a":1} , {"a":2} ]\n'))["a"][:] == [1, 2]
    assert load(_file(tmp_path, "d.json", '{"a":"x\u2028y"}\n{"a":"z"}\n'))["a"][:] == ["x\u2028y", "z"]


def test_a_gzip_damaged_anywhere_is_a_data_error(tmp_path: Path) -> None:
    good = gzip.compress("\n".join(json.dumps({"a": str(i**3)}) for i in range(400)).encode(), mtime=0)
    refused = 0
    for at in range(0, len(good), 23):
        bad = bytearray(good)
        bad[at] ^= 0xFF
        try:
            load(_file(tmp_path, "a.jsonl.gz", bytes(bad)))
        except DataError:
            refused += 1  # a harmless header byte may load; no other error may escape
    assert refused > 0.9 * len(range(0, len(good), 23))


def test_fields_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    data = load(_teams(tmp_path))
    with pytest.raises(DataError, match=r"no role 'outptu'; did you mean 'output'"):
        encode(data, TOK, fields={"outptu": "team"})
    with pytest.raises(DataError, match=r"data.fields.output: there is no column 'teem'; did you mean 'team'"):
        encode(data, TOK, fields={"output": "teem"})
    rows = [json.dumps({"q": f"{('apple pear', 'engine wheel')[i % 2]} w{i}", "a": "yes"}) for i in range(60)]
    made = prepare(
        _file(tmp_path, "q.jsonl", "\n".join(rows)), TOK, fields={"instruction": "q", "output": "a"},
        kind="clusters", clusters=2, clients=2, alpha=5.0, max_length=500,
    )  # fmt: skip
    assert sum(r["rows"] for r in made.summary) == sum(map(len, made.clients)) == 60 - len(made.heldout)


def test_rows_without_anything_to_learn_are_unusable() -> None:
    with pytest.raises(Unusable, match="nothing to predict"):
        render({"text": "a"}, tiny_tokenizer(128, "gpt2"), "plain", 1)
    with pytest.raises(Unusable, match="column 'output' is not text"):
        render({"instruction": "q", "output": {"text": ["a"]}}, TOK)


def test_an_answer_ends_even_if_the_chat_template_has_no_end_mark() -> None:
    chat = tiny_tokenizer(128)
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = render({"instruction": "q", "output": "yes"}, chat, "chat", 200)[0]
    assert row["input_ids"][-1] == row["labels"][-1] == chat.eos_token_id


def test_the_boundary_is_as_the_tokenizer_would_have_it(stories: Path) -> None:
    tok = AutoTokenizer.from_pretrained(stories)
    row = render({"instruction": "Tell", "output": "Once"}, tok, "alpaca", 400)[0]
    answer = [t for t in row["labels"] if t != -100]
    assert tok.decode(answer[:-1]) == "Once"
    assert tok.convert_ids_to_tokens(answer)[0] == "O"  # no space where the text has none
    assert row["input_ids"][:-1] == tok(tok.decode(row["input_ids"][1:-1]))["input_ids"]


def test_which_text_of_a_pair_a_token_is_from_reaches_the_batch(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "a", "b"])}, "[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", model_input_names=names)
    pairs = [{"sentence1": "a a", "sentence2": "b", "label": 1}, {"sentence1": "a", "sentence2": "b", "label": 0}]
    data = load(_file(tmp_path, "pairs.jsonl", "\n".join(map(json.dumps, pairs))))
    rows = encode(data, tok, task="classification")[0]
    batch = collate([rows[0], rows.subset([1])[0]], pad_id=0)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_a_form_feed_does_not_shift_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "formfeedpackage"
    package.mkdir()
    code = '\n\x0c\ndef first(a):\n    """Adds one to the number that is given."""\n    return a + 1\n'
    (package / "__init__.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    rows = [r for part in docstrings.build(["formfeedpackage"], heldout=0.0)[:1] for r in part]
    assert rows[0]["instruction"].endswith("def first(a):\n    return a + 1")
    assert rows[0]["output"] not in rows[0]["instruction"]


def test_alpha_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.alpha is 0"):
        partition(load(_teams(tmp_path)), "dirichlet", 2, 0, column="team", alpha=0.0)
