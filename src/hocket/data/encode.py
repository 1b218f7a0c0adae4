"""Rows as token ids in one flat tensor, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hocket.data.templates import IGNORE, TEXT, Unusable, check_fields, pick, render
from hocket.errors import DataError, nearest

PAIRS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"))
HIDDEN = "hidden label (-1, as in GLUE's test parts)"


class Encoded(Sequence[dict[str, Any]]):
    """Encoded rows, stored as flat int32 tensors with offsets (8 bytes a token), read like a list.

    Attributes:
        offsets: (rows + 1,) where each row starts.
        ids, labels: (tokens,) flat; `labels` is (rows,) for classification.
        types: (tokens,) flat `token_type_ids` (which text of a pair), or None where the tokenizer gives none.
        cut: (rows,) tokens that each row lost at max_length.
        groups: a partition value for each row, or empty.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], groups: Sequence[str] = ()) -> None:
        lengths = torch.tensor([0, *(len(r["input_ids"]) for r in rows)])
        self.offsets = lengths.cumsum(0)
        self.ids = torch.tensor([t for r in rows for t in r["input_ids"]], dtype=torch.int32)
        self.whole = bool(rows) and isinstance(rows[0]["labels"], int)  # one label a row
        flat: Iterable[int] = (r["labels"] for r in rows) if self.whole else (t for r in rows for t in r["labels"])
        self.labels = torch.tensor(list(flat), dtype=torch.int32)
        typed = bool(rows) and "token_type_ids" in rows[0]
        self.types = torch.tensor([t for r in rows for t in r["token_type_ids"]], dtype=torch.int32) if typed else None
        self.cut = torch.tensor([r.get("cut", 0) for r in rows], dtype=torch.int32)
        self.groups = list(groups)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        a, b = int(self.offsets[index]), int(self.offsets[index + 1])
        row: dict[str, Any] = {"input_ids": self.ids[a:b]}
        row["labels"] = int(self.labels[index]) if self.whole else self.labels[a:b]
        if self.types is not None:
            row["token_type_ids"] = self.types[a:b]
        if self.groups:
            row["group"] = self.groups[index]
        return row

    def subset(self, indices: Sequence[int]) -> Encoded:
        """The rows at `indices`, in that order."""
        return Encoded(self.plain(indices), [self.groups[i] for i in indices] if self.groups else ())

    def plain(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `indices` as lists of numbers."""
        lists = [{k: _list(v) for k, v in self[i].items() if k != "group"} for i in indices]
        return [row | {"cut": int(self.cut[i])} for row, i in zip(lists, indices, strict=True)]

    def replaced(self, indices: Sequence[int], rows: Encoded) -> Encoded:
        """These rows with those at `indices` replaced by `rows`, one by one."""
        new = self.plain(range(len(self)))
        for i, row in zip(indices, rows.plain(range(len(rows))), strict=True):
            new[i] = row
        return Encoded(new, self.groups)

    def packed(self, max_length: int) -> Encoded:
        """These rows joined end to end up to `max_length` tokens, in their order."""
        packs: list[dict[str, Any]] = []
        for row in self.plain(range(len(self))):
            if packs and len(packs[-1]["input_ids"]) + len(row["input_ids"]) <= max_length:
                packs[-1]["input_ids"] += row["input_ids"]
                packs[-1]["labels"] += [IGNORE, *row["labels"][1:]]  # the row before does not predict this one's start
                packs[-1]["cut"] += row["cut"]
            else:
                packs.append(row)
        return Encoded(packs)

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return len(self.ids)


def encode(
    dataset: Any, tokenizer: Any, *, task: str = "causal", template: str = "auto", max_length: int = 256,
    fields: Mapping[str, str] | None = None, classes: Sequence[str] | None = None,
) -> tuple[Encoded, list[int], dict[str, list[int]]]:  # fmt: skip
    """(encoded rows, their numbers in `dataset`, reason -> numbers of rows that cannot be used). A long row of text
    alone is several encoded rows, so its number comes several times.

    `classes` are the labels that are text, in the order of their numbers; None takes those of `dataset`. Raises
    `DataError` if no row can be used, or if a label is in no class.
    """
    out, kept, skipped = list[dict[str, Any]](), list[int](), dict[str, list[int]]()
    fields = fields or {}
    if hasattr(dataset, "column_names"):
        check_fields(fields, dataset.column_names)
    if task == "classification" and classes is None:
        classes = text_labels(dataset, fields)
    mark = between(tokenizer) if task == "classification" else ""
    for i, row in enumerate(dataset):
        try:
            if task == "classification":
                out.append(_classify(row, tokenizer, max_length, fields, classes or (), mark))
            else:
                out += render(row, tokenizer, template, max_length, fields)
            kept += [i] * (len(out) - len(kept))
        except Unusable as reason:
            skipped.setdefault(str(reason), []).append(i)
    if not out:
        reasons = ", ".join(f"{k} ({len(v)})" for k, v in skipped.items())
        columns = ", ".join(getattr(dataset, "column_names", []))
        advice = f"columns are {columns}: name them in data.fields"
        if set(skipped) == {HIDDEN}:
            advice = "take a part that has labels, on a hub for example 'nyu-mll/glue:mrpc:validation'"
        raise DataError(f"no row can be used: {reasons}; {advice}")
    return Encoded(out), kept, skipped


def text_labels(dataset: Any, fields: Mapping[str, str]) -> list[str]:
    """The different labels of a data set that are text, sorted; a label's place is its number."""
    column = fields.get("label", "label")
    values = dataset[column] if column in dataset.column_names else ()
    return sorted({v.strip() for v in values if isinstance(v, str)} - {""})


def between(tokenizer: Any) -> str:
    """What to put between two texts: nothing if the tokenizer has a mark for it, as an encoder's does, else a newline.

    Most decoders' tokenizers join two texts with nothing between, so that nobody can tell where the first ends.
    """
    special = tokenizer("a", "a", return_special_tokens_mask=True)["special_tokens_mask"]
    return "" if 1 in special[special.index(0) : -special[::-1].index(0) or None] else "\n"


def _classify(
    row: Mapping[str, Any], tokenizer: Any, max_length: int, fields: Mapping[str, str], classes: Sequence[str],
    mark: str,
) -> dict[str, Any]:  # fmt: skip
    """Text or a pair of texts, and its label. The longer text of a pair is cut first, and `mark` never is."""
    if "text" in fields:
        first, second = pick(row, "text", TEXT, fields), pick(row, "pair", (), fields) if "pair" in fields else ""
    else:
        given = next(((a, b) for a, b in PAIRS if row.get(a) is not None and row.get(b) is not None), None)
        first, second = map(str, (row[c] for c in given)) if given else (pick(row, "text", TEXT, fields), "")
    label = row.get(fields.get("label", "label"))
    if not first.strip():
        raise Unusable("no text")
    if isinstance(label, str) and (name := label.strip()):
        if name not in classes:
            hint = nearest(name, classes)
            raise DataError(f"held-out label '{name}' is not in data.source; mend it or leave its rows out{hint}")
        label = classes.index(name)
    if label == -1:
        raise Unusable(HIDDEN)
    if not isinstance(label, int) or label < 0:
        raise Unusable("no label (text, or a whole number from 0)")
    pair = mark + second if second.strip() else None
    whole = found = tokenizer(first, pair, verbose=False)  # longer than the model's longest is no concern yet
    if len(whole["input_ids"]) > max_length:
        found = tokenizer(first, pair, truncation=True, max_length=max_length)
    row = {k: list(found[k]) for k in ("input_ids", "token_type_ids") if k in found}
    return row | {"labels": label, "cut": len(whole["input_ids"]) - len(found["input_ids"])}


def collate(examples: Sequence[Mapping[str, Any]], pad_id: int, pad_to_multiple: int = 1) -> dict[str, Tensor]:
    """A batch, padded on the right: `input_ids`, `attention_mask` (rows, length) and `labels`, int64.

    The length is that of the longest row, rounded up to `pad_to_multiple`. `labels` are (rows, length) with -100 on
    padding, or (rows,) for classification.
    """
    longest = max(len(e["input_ids"]) for e in examples)
    longest += -longest % pad_to_multiple
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(examples), longest, dtype=torch.int64)
    whole = isinstance(examples[0]["labels"], int)
    labels = torch.full((len(examples),) if whole else (len(examples), longest), IGNORE, dtype=torch.int64)
    for i, e in enumerate(examples):
        n = len(e["input_ids"])
        ids[i, :n] = torch.as_tensor(e["input_ids"])
        mask[i, :n] = 1
        if whole:
            labels[i] = e["labels"]
        else:
            labels[i, :n] = torch.as_tensor(e["labels"])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = torch.zeros_like(ids)
        for i, e in enumerate(examples):
            batch["token_type_ids"][i, : len(e["token_type_ids"])] = torch.as_tensor(e["token_type_ids"])
    return batch


def _list(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
