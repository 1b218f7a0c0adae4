"""From a data section to encoded rows for each client and a held-out set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hocket.data import corrupt, docstrings
from hocket.data.encode import Encoded, encode, text_labels
from hocket.data.load import load
from hocket.data.partition import length_bin, length_edges, partition, summary
from hocket.data.templates import ANSWER, CONTEXT, PROMPT, TEXT, alone, pick, reference
from hocket.errors import DataError
from hocket.tree import generator

TEXTS = (("instruction", PROMPT), ("context", CONTEXT), ("text", TEXT), ("output", ANSWER))


@dataclass(frozen=True)
class Prepared:
    """Data, ready for a run.

    Attributes:
        clients: encoded rows of each client to train on; with `own`, every usable row exactly once.
        heldout: encoded rows that nobody trains on, with their `group` where the set has one.
        own: for each client, encoded rows of its own that nobody trains on; empty if none were asked for.
        names: what to call each client.
        skipped: reason -> row numbers that cannot be used, in the source, or ("held out: ...") in the held-out rows.
        summary: for each client its rows to train on, most frequent labels, rows `cut` at max_length and the tokens
            `lost` by that, `corrupted` rows, and `heldout` rows of its own, if any.
        classes: labels of a classification that are text; a label's place is its number.
        words: words of the held-out rows, if they are text alone.
        references: for each of `heldout` its whole answer, or "" where nothing is asked; empty for classification.
    """

    clients: list[Encoded]
    heldout: Encoded
    own: list[Encoded]
    names: list[str]
    skipped: dict[str, list[int]]
    summary: list[dict[str, Any]]
    classes: list[str]
    words: int | None = None
    references: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """The summary, for printing."""
        heads = {"lost": "tokens cut off", "cut": "rows cut", "corrupted": "rows spoiled", "heldout": "held out"}
        more = [k for k in heads if any(row.get(k) for row in self.summary)]
        table = Table("client", "rows", "tokens", "labels", *(heads[k] for k in more))
        for row, rows in zip(self.summary, self.clients, strict=True):
            counts = (str(row[k]) for k in more)
            table.add_row(row["client"], str(row["rows"]), str(rows.tokens), row["labels"], *counts)
        for reason, numbers in sorted(self.skipped.items()):
            shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            table.add_row("not used", str(len(numbers)), "", f"{reason}: rows {shown}")
        return table


def prepare(
    source: str, tokenizer: Any, *, heldout_source: str | None = None, heldout_fraction: float = 0.1,
    task: str = "causal", num_labels: int | None = None, template: str = "auto",
    fields: Mapping[str, str] | None = None, max_length: int = 256, packing: bool = False, kind: str = "iid",
    clients: int = 4, column: str | None = None, alpha: float = 0.5, clusters: int = 8, bins: int = 4,
    equal: bool = False, corruption: float = 0.0, corruption_alpha: float = 1.0, min_rows: int = 1, fill: bool = False,
    limit: int | None = None, heldout_limit: int | None = None, client_heldout: int = 0,
    packages: Sequence[str] | None = None, seed: int = 0,
) -> Prepared:  # fmt: skip
    """Load, hold out, encode, drop what cannot be used, then partition what is left.

    The held-out rows are those of `heldout_source`, or the built-in share of `docstrings`, or a share drawn by `seed`.
    Equal rows stay on one side of that draw. Then `client_heldout` rows of each client are drawn, and nobody trains on
    those either. What is left is spoiled at the rate `corruption`; who gets which rows does not depend on that. Packing
    joins rows of one client only, and never held-out rows.

    Raises:
        DataError: as `load`, `encode` and `partition` do.
    """
    fields, classes = fields or {}, list[str]()
    files = [Path(p) for p in (source, heldout_source) if p is not None and Path(p).is_file()]
    if len(files) == 2 and files[0].samefile(files[1]):
        raise DataError(f"data.heldout_source: '{heldout_source}' is data.source itself; rows would be trained on")
    if heldout_source == source and source.count(":") > 1:
        raise DataError(f"data.heldout_source: '{source}' is data.source itself; name another split of the set")
    held = None if heldout_source is None else load(heldout_source, split="test")
    if source == "docstrings":
        column = column or "package"
        train, share = docstrings.build(packages or None, heldout=heldout_fraction)
        held = share if held is None else held
        if limit is not None and limit < len(train):
            train = train.select(_spread(train["package"], limit, seed))
    else:
        train = load(source)
        classes = text_labels(train, fields) if task == "classification" else []
        if held is None:
            first: dict[str, int] = {}
            same = [first.setdefault(repr(sorted(r.items(), key=lambda kv: kv[0])), i) for i, r in enumerate(train)]
            count = max(1, round(heldout_fraction * len(first)))
            if count >= len(first):
                raise DataError(
                    f"'{source}' has {len(first)} different rows, too few to hold any out; set data.heldout_source"
                )
            order = torch.randperm(len(first), generator=generator(seed, "heldout")).tolist()
            values = list(first.values())
            out = {values[i] for i in order[:count]}
            held = train.select([i for i, s in enumerate(same) if s in out])
            train = train.select([i for i, s in enumerate(same) if s not in out])
        if limit is not None and limit < len(train):
            order = torch.randperm(len(train), generator=generator(seed, "limit")).tolist()
            train = train.select(sorted(order[:limit]))
    if heldout_limit is not None and heldout_limit < len(held):
        # not keyed by the seed: runs of several seeds are compared on the same rows
        order = torch.randperm(len(held), generator=generator("heldout limit")).tolist()
        held = held.select(sorted(order[:heldout_limit]))
    options: dict[str, Any] = {
        "task": task, "template": template, "max_length": max_length, "fields": fields, "classes": classes
    }  # fmt: skip
    rows, kept, skipped = encode(train, tokenizer, **options)
    usable, lengths = train.select(kept), _lengths(rows, kept)
    parts, labels = partition(
        usable, kind, clients, seed, column=column, alpha=alpha, clusters=clusters, lengths=lengths, bins=bins,
        equal=equal, min_rows=min_rows, fill=fill,
        text=lambda r: " ".join(filter(None, (pick(r, k, n, fields) for k, n in TEXTS))),
    )  # fmt: skip
    names = [f"client {i}" for i in range(clients)]
    if kind == "natural":
        names = [", ".join(dict.fromkeys(labels[i] for i in p)) for p in parts]
        names = [n if len(n) <= 40 else n[:37] + "..." for n in names]
    heldout, held_kept, held_skipped = encode(held, tokenizer, **options)
    skipped |= {f"held out: {reason}": numbers for reason, numbers in held_skipped.items()}
    if task == "classification" and num_labels is not None:
        top = max(int(e.labels.max()) for e in (rows, heldout))
        if top >= num_labels:
            raise DataError(f"model.num_labels is {num_labels}, but labels go from 0 to {top}; set it to {top + 1}")
    groups: list[str] = []
    if kind == "lengths":
        edges = length_edges(lengths, bins)
        groups = [length_bin(n, edges) for n in _lengths(heldout, held_kept)]
    elif column in held.column_names:
        groups = [str(v) for v in held.select(held_kept)[column]]
    heldout = Encoded(heldout.plain(range(len(heldout))), groups)
    own: list[Encoded] = []
    if client_heldout:
        parts, outs, twice = _hold_back([repr(sorted(r.items())) for r in usable], parts, client_heldout, seed)
        own = [rows.subset(o) for o in outs]
        if twice:
            skipped["equal to a row that another client holds out"] = [kept[i] for i in twice]
    spoiled: list[list[int]] = [[] for _ in parts]
    if corruption:
        if task == "classification":
            raise DataError("data.corruption: it spoils the words of answers; a classification has labels only")
        spoiled = corrupt.choose(parts, corrupt.rates(corruption, corruption_alpha, clients, seed), seed)
        chosen = sorted(i for s in spoiled for i in s)
        again = [corrupt.spoil(usable[i], kept[i], fields, seed) for i in chosen]
        rows = rows.replaced(chosen, encode(again, tokenizer, **options)[0])
    mine = [rows.subset(p) for p in parts]
    counts = summary(parts, labels, names)
    for c, row in enumerate(counts):
        row |= {"cut": int((mine[c].cut > 0).sum()), "lost": int(mine[c].cut.sum()), "corrupted": len(spoiled[c])}
        row |= {"heldout": len(own[c])} if own else {}
    if packing:
        mine = [m.packed(max_length) for m in mine]
    right = {i: reference(held[i], fields) for i in dict.fromkeys(held_kept)} if task == "causal" else {}
    texts = [alone(held[i], fields) for i in dict.fromkeys(held_kept)] if task == "causal" else []
    words = sum(len(t.split()) for t in texts) if texts and all(texts) else None
    return Prepared(mine, heldout, own, names, skipped, counts, classes, words, [right[i] for i in held_kept if right])


def _lengths(rows: Encoded, kept: Sequence[int]) -> list[int]:
    """Tokens of each row as they were before anything was cut; windows of one text have the length of the text."""
    total: dict[int, int] = {}
    for at, tokens in zip(kept, (rows.offsets.diff() + rows.cut).tolist(), strict=True):
        total[at] = total[at] + tokens - 1 if at in total else tokens  # a window begins with a token of the one before
    return [total[at] for at in kept]


def _hold_back(
    kinds: Sequence[str], parts: Sequence[Sequence[int]], count: int, seed: int
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """(rows each client trains on, at least `count` rows it holds out, rows equal to one that another holds out).

    Equal rows, and all windows of a text, are of one kind, and no kind is on both sides.
    """
    outs = []
    for c, part in enumerate(parts):
        rows: dict[str, list[int]] = {}
        for i in part:
            rows.setdefault(kinds[i], []).append(i)
        order, out = list(rows.values()), list[int]()
        for at in torch.randperm(len(order), generator=generator(seed, "client heldout", c)).tolist():
            out += order[at] if len(out) < count else []
        outs.append(sorted(out))
    gone = {kinds[i] for out in outs for i in out}
    left = [[i for i in part if kinds[i] not in gone] for part in parts]
    for c, (part, out) in enumerate(zip(parts, outs, strict=True)):
        if len(out) < count or not left[c]:
            raise DataError(
                f"data.client_heldout: client {c} has {len(part)} rows, too few to hold {count} out and train on "
                f"others; lower it, or raise data.min_rows"
            )
    used = {i for group in (*left, *outs) for i in group}
    return left, outs, sorted(i for part in parts for i in part if i not in used)


def _spread(groups: Sequence[str], limit: int, seed: int) -> list[int]:
    """`limit` row numbers, dealt out evenly over the groups; rows of a group are drawn by `seed`."""
    left: dict[str, list[int]] = {}
    for i in torch.randperm(len(groups), generator=generator(seed, "limit")).tolist():
        left.setdefault(groups[i], []).append(i)
    chosen: list[int] = []
    while len(chosen) < limit:
        chosen += [left[g].pop() for g in sorted(left) if left[g]]
    return sorted(chosen[:limit])
