"""Data of a deployment: one site's rows at the site, and held-out rows, if there are any, at the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hocket.data.encode import Encoded, encode, text_labels
from hocket.data.load import load
from hocket.data.partition import summary
from hocket.data.prepare import Prepared
from hocket.errors import DataError
from hocket.tree import generator


def alone(
    source: str, tokenizer: Any, client: int, name: str, *, task: str = "causal", template: str = "auto",
    fields: Mapping[str, str] | None = None, max_length: int = 256, packing: bool = False, limit: int | None = None,
    seed: int = 0,
) -> Prepared:  # fmt: skip
    """A site's rows, all of them for training, as those of client `client`; the other clients have none here.

    Raises:
        DataError: as `load` and `encode` do; labels are text, whose numbers would depend on the site.
    """
    table = load(source)
    if task == "classification" and (classes := text_labels(table, fields or {})):
        raise DataError(
            f"'{source}' has labels in words ({', '.join(classes[:3])}): every site must give them the same numbers; "
            f"write the labels as 0, 1, ..."
        )
    if limit is not None and limit < len(table):
        order = torch.randperm(len(table), generator=generator(seed, "limit")).tolist()
        table = table.select(sorted(order[:limit]))
    rows, kept, skipped = encode(
        table, tokenizer, task=task, template=template, max_length=max_length, fields=fields or {}, classes=[]
    )
    if not len(rows):
        raise DataError(f"'{source}' has no row that can be trained on: {', '.join(sorted(skipped)) or 'it is empty'}")
    counts = summary([list(range(len(rows)))], ["" for _ in kept], [name])
    counts[0] |= {"cut": int((rows.cut > 0).sum()), "lost": int(rows.cut.sum()), "corrupted": 0}
    mine = rows.packed(max_length) if packing else rows
    return Prepared([*[mine.subset([])] * client, mine], mine.subset([]), [], [name], skipped, counts, [])


def judged(
    source: str | None, tokenizer: Any, *, task: str = "causal", template: str = "auto",
    fields: Mapping[str, str] | None = None, max_length: int = 256, limit: int | None = None,
) -> Encoded | None:  # fmt: skip
    """The server's held-out rows, the same as in a simulation of the recipe; None if it has none."""
    if source is None:
        return None
    held = load(source, split="test")
    if limit is not None and limit < len(held):
        order = torch.randperm(len(held), generator=generator("heldout limit")).tolist()
        held = held.select(sorted(order[:limit]))
    return encode(
        held, tokenizer, task=task, template=template, max_length=max_length, fields=fields or {}, classes=[]
    )[0]
