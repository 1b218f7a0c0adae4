"""Rows from files, folders, hubs, or the machine itself."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from hocket.errors import DataError

PLAIN = (".txt", ".raw", ".tokens")  # of which the last two are WikiText's
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", *PLAIN)
HEADING = re.compile(r"(?P<open>(= )+)(?P<title>[^= ](.*[^= ])?)(?P<close>( =)+)")  # " = Title = ", " = = Part = = "


def load(source: str | Path, *, split: str = "train", limit: int | None = None) -> datasets.Dataset:
    """Rows of a file, a folder, a hub id, or the built-in `docstrings`.

    Args:
        source: a `.jsonl`, `.jsonl.gz`, `.json` (a list of objects) or `.parquet` file; a `.txt`, `.raw` or `.tokens`
            file of plain text (see `_text`); a folder that holds one of these named after `split`; `docstrings`;
            anything else is a hub id, for `datasets.load_dataset`: `owner/name`, `owner/name:config`, or with a split
            of its own, `owner/name:config:split` (`owner/name::split`).
        split: "train" or "test" (for a folder or a hub id; the held-out tenth of `docstrings`). "test" is the test
            part, or else the validation part.
        limit: most rows, from the beginning.

    Raises:
        DataError: missing, empty or unreadable; the message names file and line.
    """
    if str(source) == "docstrings":
        from hocket.data.docstrings import build

        rows = build()[0 if split == "train" else 1]
    else:
        path = Path(source)
        if path.is_dir():
            path = _in_folder(path, split)
        if path.is_file():
            rows = _file(path, limit)
        elif str(source).endswith(SUFFIXES) or path.is_absolute() or str(source).startswith("."):
            raise DataError(f"data file '{source}' does not exist")
        else:
            rows = _hub(str(source), split)
    if not len(rows):
        raise DataError(f"'{source}' holds no rows")
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def _names(split: str) -> list[str]:
    """What a split may be called, first choice first."""
    return ["test", "validation", "dev", "valid"] if split == "test" else [split]


def _in_folder(folder: Path, split: str) -> Path:
    names = _names(split)
    for name in names:
        for suffix in SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise DataError(f"folder '{folder}' holds no {' or '.join(names)} file ({', '.join(SUFFIXES)})")


def _file(path: Path, limit: int | None) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise DataError(f"data file '{path}' is empty")
    if path.suffix in PLAIN:
        return _text(path)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return datasets.Dataset(pyarrow.parquet.read_table(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"data file '{path}' is not parquet: {error}") from error
    numbered = list(_json(path, limit))
    rows = [row for _, row in numbered]
    if not rows:
        raise DataError(f"data file '{path}' holds no rows")
    columns = list(dict.fromkeys(k for r in rows for k in r))
    try:
        return datasets.Dataset.from_list([{k: r.get(k) for k in columns} for r in rows])
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are ValueError and TypeError
        raise DataError(f"data file '{path}'{_odd(numbered, columns)}: a column changes its type: {error}") from error


def _text(path: Path) -> datasets.Dataset:
    """Plain text, a row a line that is not blank, with columns `text` and `section`; the text is kept as it is.

    A heading in WikiText's layout, which stands between blank lines, is no row: the title of an article is the section
    of all that follows it. Text before the first title, or without any, has the section "".
    """
    try:
        lines = [line.strip() for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"data file '{path}', line {number}: not UTF-8 (byte {error.start}): {error.reason}") from error
    except OSError as error:
        raise DataError(f"data file '{path}' cannot be read: {error}") from error
    rows, section = [], ""
    for before, line, after in zip(["", *lines[:-1]], lines, [*lines[1:], ""], strict=True):
        heading = None if before or after else HEADING.fullmatch(line)  # broken formulas look like one otherwise
        if heading and len(heading["open"]) == len(heading["close"]):
            section = heading["title"] if heading["open"] == "= " else section
        elif line:
            rows.append({"text": line, "section": section})
    if not rows:
        raise DataError(f"data file '{path}' holds no text")
    return datasets.Dataset.from_list(rows)


def _odd(numbered: list[tuple[int, dict[str, Any]]], columns: list[str]) -> str:
    """The first line whose value in a column is of another kind than before, or "" if the difference lies deeper."""
    for column in columns:
        first: Any = None
        for line, row in numbered:
            value = row.get(column)
            kind = float if isinstance(value, int) and not isinstance(value, bool) else type(value)
            if value is not None and first not in (None, kind):
                return f", line {line}, column '{column}'"
            first = first if value is None else kind
    return ""


def _json(path: Path, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a JSON-lines file, or of a JSON file that holds one list."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            whole = f.read() if path.suffix == ".json" else ""
            values = _list(whole) if whole.lstrip().startswith("[") else _lines(whole.split("\n") if whole else f)
            for count, (number, row, error) in enumerate(values, 1):
                if error:
                    raise DataError(f"data file '{path}', line {number}: not JSON: {error}")
                if not isinstance(row, dict):
                    raise DataError(f"data file '{path}', line {number}: expected an object, got {type(row).__name__}")
                yield number, row
                if limit and count >= limit:
                    return
    except RecursionError as error:
        raise DataError(f"data file '{path}', after line {number}: nested too deeply") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"data file '{path}', after line {number}: cannot be read: {error}") from error


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, Any, str]]:
    """(line, value, error) of JSON lines; blank ones are passed over but counted."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line), ""
            except json.JSONDecodeError as error:
                yield number, None, error.msg


def _list(text: str) -> Iterator[tuple[int, Any, str]]:
    """(line, value, error) of one JSON list, element by element."""
    decoder, at, line, closed = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while text[at : at + 1].isspace():
            at += 1
        line, closed = line + text.count("\n", closed, at), at
        if text[at : at + 1] == "]" and not text[at + 1 :].strip():
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, None, error.msg
            return
        yield line, value, ""
        while text[at : at + 1].isspace():
            at += 1
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            yield text.count("\n", 0, at) + 1, None, "expected ',' or ']' after an object"
            return


def _hub(source: str, split: str) -> datasets.Dataset:
    name, config, own, *more = [*source.split(":"), "", ""]
    if any(more) or not name:
        raise DataError(f"data source '{source}': write hub sets as 'owner/name', with ':config' or ':config:split'")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub's client raises many kinds
        said = " ".join(str(error).splitlines()[:2])  # the second line may list the configurations
        raise DataError(
            f"data source '{source}' is no file here, and the hub has no such set or cannot be reached "
            f"({type(error).__name__}: {said}); write hub sets as 'owner/name', 'owner/name:config' or "
            f"'owner/name:config:split'"
        ) from error
    for choice in [own] if own else _names(split):
        if choice in splits:
            return splits[choice]
    wanted = f"'{own}'" if own else " or ".join(_names(split))
    there = ", ".join(splits)
    raise DataError(f"data source '{source}' has no split {wanted}, only {there}; name one: 'owner/name:config:split'")
