"""The built-in data set `docstrings`: real text that every machine has, nothing shipped or downloaded.

Functions of the installed Python packages are read with `ast`; nothing is imported or run. The instruction is the
signature and the first lines of the body, the answer the first paragraph of the docstring. The package is the client's
private code base, so the split is natural and not iid. The order is fixed, duplicates are removed, and a tenth of each
package is held out by a hash of the content, so that it stays the same when packages grow.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import xxhash

from hocket.errors import DataError

TEAMS = ("stdlib", "torch", "numpy", "transformers", "pandas", "sklearn", "scipy", "datasets", "peft", "pydantic")
BODY_LINES = 5
PER_PACKAGE = 1500
SKIP = re.compile(r"(^|/)(tests?|testing|_vendor|lib2to3|idlelib|site-packages|test_[^/]*\.py|conftest\.py)(/|$)")
ASK = "Write the first paragraph of the docstring of this Python function."


def build(
    packages: Sequence[str] | None = None, per_package: int = PER_PACKAGE, heldout: float = 0.1
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training rows, held-out rows), columns `package`, `name`, `instruction`, `output`.

    Args:
        packages: top-level names, or `stdlib`; None takes those of `TEAMS` that are installed.
        per_package: most rows of a package, drawn over all its files by a hash.
        heldout: share of each package that is held out.

    Raises:
        DataError: a named package is not installed, or has no usable function.
    """
    return _build(tuple(packages or [p for p in TEAMS if _place(p)]), per_package, heldout)


@functools.lru_cache(maxsize=4)  # reading takes seconds, and what is installed does not change under a process
def _build(packages: tuple[str, ...], per_package: int, heldout: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    rows: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for package in packages:
        place = _place(package)
        if place is None:
            raise DataError(f"data.packages: '{package}' is not an installed Python package with sources")
        found = 0
        for row in _functions(package, place):
            key = re.sub(r"\W+", " ", row["output"]).lower()
            code = re.sub(r"\W+", " ", row["instruction"].split(":", 1)[-1])
            if key in seen or code in seen:
                continue
            seen |= {key, code}
            share = xxhash.xxh64_intdigest(row["output"].encode()) % 1000
            rows["heldout" if share < 1000 * heldout else "train"].append(row)
            found += 1
            if found >= per_package:
                break
        if not found:
            raise DataError(f"data.packages: '{package}' has no function with a usable docstring")
    order = lambda r: (r["package"], r["name"])  # noqa: E731
    train, held = (datasets.Dataset.from_list(sorted(rows[k], key=order)) for k in ("train", "heldout"))
    return train, held


def _place(package: str) -> Path | None:
    """The folder of a package, or the file of a module that is one file, without importing it."""
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _functions(package: str, place: Path) -> Iterator[dict[str, str]]:
    """Usable functions, file by file in the order of a hash of the name, so that a limit draws from everywhere."""
    folder = place if place.is_dir() else place.parent
    files = [p.relative_to(folder).as_posix() for p in ([place] if place.is_file() else place.rglob("*.py"))]
    files = [f for f in files if not SKIP.search(f)]
    for name in sorted(files, key=lambda f: (xxhash.xxh64_intdigest(f.encode()), f)):
        try:
            text = (folder / name).read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in other people's strings
                tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # not a source this Python can read; another one will do
        lines = text.split("\n")  # as the parser counts: a form feed does not end a line
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (row := _row(node, lines)):
                yield {"package": package, "name": f"{module}.{node.name}:{node.lineno}", **row}


def _row(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> dict[str, str] | None:
    """Instruction and answer of one function, or None if it does not make a good pair."""
    doc = ast.get_docstring(node)
    if not doc or len(node.body) < 2:
        return None
    answer = re.sub(r"\s+", " ", doc.split("\n\n")[0]).strip()
    if not 25 <= len(answer) <= 300 or not answer.isascii() or not answer[0].isalpha():
        return None
    if answer.count(" ") < 4 or re.search(r"deprecated|\{\w*\}|:param|>>>|%\(", answer, re.IGNORECASE):
        return None
    head = lines[node.lineno - 1 : node.body[0].lineno - 1]
    body = [line for line in lines[node.body[1].lineno - 1 : node.end_lineno] if line.strip()][:BODY_LINES]
    indent = len(lines[node.lineno - 1]) - len(lines[node.lineno - 1].lstrip())
    code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in head + body)
    if len(code) > 500 or not code.isascii():
        return None
    return {"instruction": f"{ASK}\n\n{code}", "output": answer}
