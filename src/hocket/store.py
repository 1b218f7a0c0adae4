"""What survives a crash: immutable blobs, atomic checkpoints, the run folder and its lock.

A checkpoint is one packet file: every tensor once (shared tensors stay shared) and the plain data around them as JSON
in the packet's meta. It is written whole or not at all; one that is torn all the same, or whose blobs are gone, is
noticed, and the one before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hocket import wire
from hocket.errors import StoreError, WireError

FORMAT = 3
KEEP = 2  # checkpoints kept, so that one torn file never loses a run


# --- nested state <-> one packet -----------------------------------------------------------------------------------
def flatten(value: Any) -> tuple[dict[str, Tensor], Any]:
    """(tensors, skeleton): the skeleton is JSON in which `{"$t": "7"}` stands for tensor 7; equal objects share one."""
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    pins: list[Any] = []  # keeps temporaries alive, so that an id is never used twice

    def visit(x: Any) -> Any:
        if isinstance(x, Tensor):
            if id(x) not in seen:
                seen[id(x)] = str(len(seen))
                pins.append(x)
                tensors[seen[id(x)]] = x
            return {"$t": seen[id(x)]}
        if isinstance(x, bytes):
            return {
                "$b": visit(torch.frombuffer(bytearray(x), dtype=torch.uint8) if x else torch.empty(0).byte())["$t"]
            }
        if isinstance(x, Mapping):
            if all(isinstance(k, str) and not k.startswith("$") for k in x):
                return {k: visit(v) for k, v in x.items()}
            return {"$d": [[visit(k), visit(v)] for k, v in x.items()]}
        if isinstance(x, list | tuple):
            return [visit(v) for v in x]
        if x is None or isinstance(x, bool | int | float | str):
            return x
        raise TypeError(f"cannot save a {type(x).__name__}: state is tensors and plain data only")

    skeleton = visit(value)
    return tensors, skeleton


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The inverse of `flatten`; tuples come back as lists."""
    loaded: dict[str, Tensor] = {}

    def tensor(key: str) -> Tensor:
        if key not in loaded:
            loaded[key] = tensors[key]
        return loaded[key]

    def visit(x: Any) -> Any:
        if isinstance(x, list):
            return [visit(v) for v in x]
        if not isinstance(x, dict):
            return x
        if "$t" in x:
            return tensor(x["$t"])
        if "$b" in x:
            return tensor(x["$b"]).numpy().tobytes()
        if "$d" in x:
            return {visit(k): visit(v) for k, v in x["$d"]}
        return {k: visit(v) for k, v in x.items()}

    return visit(skeleton)


def put(path: Path, what: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: these bytes, or what a function writes to it. Raises `StoreError` if it cannot
    be written."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as f:
            _ = f.write(what) if isinstance(what, bytes) else what(f)
        part.replace(path)
    except OSError as error:
        raise StoreError(
            f"cannot write '{path}': {error.strerror}; free space, then go on with the same command"
        ) from error


# --- blobs ---------------------------------------------------------------------------------------------------------
class Spool:
    """Packets waiting to be read: in memory up to `budget` bytes, in files beyond, so that memory does not grow with
    the number of clients. A blob never changes; a dropped file is deleted as soon as no kept checkpoint names it.
    """

    def __init__(self, folder: Path | None = None, budget: int = 64 << 20) -> None:
        self.folder, self.budget = folder, budget
        self._memory: dict[str, bytes] = {}
        self._used = 0
        self._files: set[str] = set()
        self._named: list[set[str]] = []  # keys in files that each kept checkpoint names, oldest first

    def put(self, key: str, blob: bytes) -> None:
        """Keep `blob` under a key that was never used before. Raises `StoreError` if the disk is full."""
        if self.folder is None or self._used + len(blob) <= self.budget:
            self._memory[key] = blob
            self._used += len(blob)
            return
        try:
            self._path(key).parent.mkdir(parents=True, exist_ok=True)
            self._path(key).write_bytes(blob)
        except OSError as error:
            self._path(key).unlink(missing_ok=True)
            raise StoreError(f"cannot write '{self._path(key)}': {error.strerror}; free space, then resume") from error
        self._files.add(key)

    def get(self, key: str) -> wire.Packet:
        """The packet under `key`; on disk it is mapped tensor by tensor, for nobody else writes here. It is not
        verified again: this process made it, or `load` checked it."""
        return wire.Packet(self._memory[key] if key in self._memory else self._path(key), check=False, mapped=True)

    def drop(self, key: str) -> None:
        """Forget `key`."""
        if key in self._memory:
            self._used -= len(self._memory.pop(key))
        elif key in self._files:
            self._files.discard(key)
            self._delete({key})

    def state_dict(self) -> dict[str, Any]:
        """The blobs in memory, and the names of those in files (made durable here)."""
        for key in sorted(self._files):
            with self._path(key).open("rb") as f:
                os.fsync(f.fileno())
        return {"memory": dict(self._memory), "files": sorted(self._files)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become the spool that `state_dict` described; its files were checked by `load`."""
        self._memory, self._files = dict(saved["memory"]), set(saved["files"])
        self._used = sum(map(len, self._memory.values()))

    def check(self, keys: Iterable[str]) -> None:
        """Raises `WireError` if the file of one of `keys` is gone or damaged."""
        for key in keys:
            try:
                wire.Packet(self._path(key))
            except FileNotFoundError as error:
                raise WireError(f"file '{self._path(key)}' is gone") from error

    def named(self, *checkpoints: Iterable[str]) -> None:
        """Newer checkpoints name these keys; what only a checkpoint beyond the newest `KEEP` needed is deleted."""
        before = set().union(*self._named)
        self._named = [*self._named, *map(set, checkpoints)][-KEEP:]
        self._delete(before)

    def sweep(self) -> None:
        """Delete files of a crashed run that neither this spool nor a kept checkpoint knows; call it after loading."""
        if self.folder is not None and self.folder.exists():
            known = {self._path(key).name for key in self._files.union(*self._named)}
            for path in sorted(self.folder.glob("*.hkt")):
                if path.name not in known:
                    path.unlink(missing_ok=True)

    @property
    def files(self) -> set[str]:
        """Keys that live in files."""
        return set(self._files)

    def _path(self, key: str) -> Path:
        assert self.folder is not None  # only keys that were put into files get here
        return self.folder / f"{key.replace('/', '-')}.hkt"

    def _delete(self, keys: set[str]) -> None:
        for key in keys.difference(self._files, *self._named):
            self._path(key).unlink(missing_ok=True)


# --- checkpoints ---------------------------------------------------------------------------------------------------
def save(folder: Path, step: int, state: Any, recipe_hash: str, spool: Spool | None = None) -> Path:
    """Write checkpoint number `step` (increasing) and delete all but the newest `KEEP`, with their files in `spool`.

    Raises:
        StoreError: it cannot be written (disk full); the ones before are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, skeleton = flatten(state)
    files = sorted(spool.files) if spool else []
    path = folder / f"{step:010d}.hkt"
    meta = {"format": FORMAT, "step": step, "recipe": recipe_hash, "files": files, "state": skeleton}
    try:
        wire.write_file(path, tensors, meta)
    except WireError as error:
        raise StoreError(f"no checkpoint written: {error}; the one before is whole: resume from it") from error
    for old in sorted(folder.glob("*.hkt"))[:-KEEP]:
        old.unlink(missing_ok=True)
    if spool:
        spool.named(files)
    return path


def load(folder: Path, recipe_hash: str | None = None, spool: Spool | None = None) -> tuple[Any, list[str]]:
    """(state of the newest whole checkpoint, warnings about newer ones that are not).

    Args:
        folder: where they are.
        recipe_hash: of the recipe that the checkpoint must belong to.
        spool: given to go on with the run. A checkpoint is then whole only if its files in the spool are, newer ones
            are deleted, so that none takes the place of a good one, and the spool learns what the rest names.

    Raises:
        StoreError: there is none, none is whole, or it belongs to another recipe or an older format.
    """
    warnings, torn = [], []
    paths = sorted(folder.glob("*.hkt"), reverse=True)
    for path in paths:
        try:
            packet = wire.Packet(path)
            if spool:
                spool.check(packet.meta.get("files", []))
        except (OSError, WireError) as error:
            warnings.append(f"checkpoint skipped: {path.name}: {error}")
            torn += [path] if isinstance(error, WireError) else []  # what cannot be read now may be whole
            continue
        meta = packet.meta
        if meta.get("format") != FORMAT:
            raise StoreError(
                f"'{path}' has checkpoint format {meta.get('format')}, this is {FORMAT}; start the run anew"
            )
        if recipe_hash is not None and meta["recipe"] != recipe_hash:
            raise StoreError(f"'{path}' belongs to another recipe (hash {meta['recipe']}, this one {recipe_hash})")
        state = unflatten(packet, meta["state"])
        if spool:
            for bad in torn:
                bad.unlink(missing_ok=True)
            spool.named(*(_files(p) for p in reversed(paths) if p < path), meta.get("files", []))
        return state, warnings
    detail = ("; ".join(warnings) + "; start the run anew") if warnings else "nothing to resume; use `hocket run`"
    raise StoreError(f"no whole checkpoint in '{folder}': {detail}")


def _files(path: Path) -> list[str]:
    """Keys in files that a checkpoint names; none if it cannot be read, because then it cannot be resumed from."""
    try:
        return list(wire.Packet(path, check=False).meta.get("files", []))
    except (OSError, WireError):
        return []


# --- the run folder --------------------------------------------------------------------------------------------------
class RunFolder:
    """Where one run keeps everything; a lock keeps a second process out while the first lives.

    Raises:
        StoreError: the folder is in use, cannot be made, or (for a new run) already holds one.
    """

    def __init__(self, path: Path, new: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make run folder '{path}': {error.strerror}") from error
        self._lock = FileLock(str(path / "lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(f"run folder '{path}' is in use by another process; choose another --out") from None
        if new and (self.ledger.exists() or self.checkpoints.exists()):
            self.close()
            raise StoreError(f"'{path}' already holds a run: `hocket resume {path}`, or choose another --out")

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    def write_json(self, path: Path, value: Any) -> None:
        """Write a small JSON file whole or not at all."""
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
            temporary.replace(path)
        except OSError as error:
            raise StoreError(f"cannot write '{path}': {error.strerror}; free space, then resume") from error

    def close(self) -> None:
        """Let others in."""
        self._lock.release()
