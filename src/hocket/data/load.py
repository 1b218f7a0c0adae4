"""Rows from files, folders, hubs, or the machine itself."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from hocket.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def load(source: str | Path, *, split: str = "train", limit: int | None = None) -> datasets.Dataset:
    """Rows of a file, a folder, a hub id, or the built-in `docstrings`.

    Args:
        source: a `.jsonl`, `.jsonl.gz`, `.json` (a list of objects) or `.parquet` file; a folder that holds one named
            after `split`; `docstrings`; anything else is a hub id, for `datasets.load_dataset`.
        split: "train" or "test" (for a folder or a hub id; the held-out tenth of `docstrings`).
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


def _in_folder(folder: Path, split: str) -> Path:
    names = [split, *(["validation", "dev", "valid"] if split == "test" else [])]
    for name in names:
        for suffix in SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise DataError(f"folder '{folder}' holds no {' or '.join(names)} file ({', '.join(SUFFIXES)})")


def _file(path: Path, limit: int | None) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise DataError(f"data file '{path}' is empty")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return datasets.Dataset(pyarrow.parquet.read_table(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"data file '{path}' is not parquet: {error}") from error
    rows = list(_json(path, limit))
    if not rows:
        raise DataError(f"data file '{path}' holds no rows")
    columns = list(dict.fromkeys(k for r in rows for k in r))
    try:
        return datasets.Dataset.from_list([{k: r.get(k) for k in columns} for r in rows])
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are ValueError and TypeError
        raise DataError(f"data file '{path}': a column changes its type between rows: {error}") from error


def _json(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, or of a JSON file that holds one list."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            if path.suffix == ".json" and f.read(1).lstrip() == "[":
                f.seek(0)
                lines: Any = ((i, r) for i, r in enumerate(json.load(f), 1))
            else:
                f.seek(0)
                lines = ((i, json.loads(line)) for i, line in enumerate(f, 1) if line.strip())
            for number, row in lines:
                if not isinstance(row, dict):
                    raise DataError(f"data file '{path}', line {number}: expected an object, got {type(row).__name__}")
                yield row
                if limit and number >= limit:
                    return
    except json.JSONDecodeError as error:
        raise DataError(f"data file '{path}', line {number + 1}: not JSON: {error.msg}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"data file '{path}', after line {number}: cannot be read: {error}") from error


def _hub(source: str, split: str) -> datasets.Dataset:
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(
            f"data.source '{source}' is no file here, and the hub has no such set or cannot be reached "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); write hub sets as "
            f"'owner/name' or 'owner/name:config'"
        ) from error
