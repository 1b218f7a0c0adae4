"""Files of models on disk: hashes, manifests, and publishing a folder so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hocket.errors import ModelError

MANIFEST = "hocket.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHUNK = 1 << 20


def human(size: float) -> str:
    """`"93 MB"`: decimal units, three digits."""
    units = ["B", "kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:.0f} {units[0]}"


def sha256(path: Path) -> str:
    """SHA-256 of a file in lower-case hexadecimal, read in pieces of 1 MiB."""
    h = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(_CHUNK):
            h.update(piece)
    return h.hexdigest()


def remove(path: Path) -> None:
    """Delete a file or a whole folder; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_full(error: Exception | str) -> bool:
    """Whether an error, or a program's text about one, is about no space, a quota or a file size limit."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in ("No space left", "File too large", "quota exceeded"))


@contextlib.contextmanager
def disk(where: Path) -> Iterator[None]:
    """Turn "no space left", a quota or a file size limit met inside the block into a `ModelError` naming `where`.

    Writers in other languages raise their own types with the operating system's text, so the text counts too.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if is_full(error):
            raise ModelError(f"{where}: no space left on the disk ({error}); free some, or use another") from error
        raise


def room(where: Path, need: int) -> None:
    """Raise `ModelError` unless the disk that holds the folder `where` has `need` bytes free."""
    free = shutil.disk_usage(where).free
    if free < need:
        raise ModelError(f"{where}: no space: {human(need)} needed, {human(free)} free; make room or use another")


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write `hocket.json`: the given facts and size in bytes and SHA-256 of every other file in the folder."""
    files = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published folder, or None where there is none or it cannot be read."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and isinstance(data.get("files"), dict) else None


def damage(folder: Path, *, hashes: bool = False) -> str | None:
    """What is wrong with a published folder, or None: manifest there, sizes right, and with `hashes` contents too."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder / MANIFEST} is missing or unreadable"
    for name, want in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != want["bytes"]:
            return f"{path} has {path.stat().st_size} bytes instead of {want['bytes']}"
        if hashes and sha256(path) != want["sha256"]:
            return f"{path} does not have the recorded SHA-256"
    return None


def publish(work: Path, final: Path) -> None:
    """Make the finished folder `work` appear as `final`: fsync everything, then one rename. Replaces an old `final`.

    Both must be on one file system. A crash before the rename leaves `final` as it was.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(work.rglob("*")):
        # safetensors writes through a private temporary file; a cache or an export is for whoever may read the folder
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _sync(path)
    _sync(work)
    old = final.with_name(f".{final.name}.old")
    remove(old)
    if final.exists():
        final.rename(old)
    work.rename(final)
    _sync(final.parent)
    remove(old)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
