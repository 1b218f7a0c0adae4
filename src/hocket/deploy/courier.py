"""What runs in Flower's process for each message at a site: no torch, no model, only files and a socket.

Flower starts a process per message and kills it when it likes, so all that lasts is in the worker (see
`hocket.deploy.worker`): this hands it a request as JSON over a Unix socket that only the site's own user can open, and
takes what it says back. Payloads are files in the site's folder, written and read a part at a time.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from hocket.errors import StoreError

SOCKET, KEY = "worker.sock", "worker.key"


PLACES = re.compile(r"(?<=')[/~][^'\n]*(?=')|(?<=\")[/~][^\"\n]*(?=\")|(?<![\w.:/~-])~?(?:/[^\s'\",;:)]+)+")
"""Absolute paths in a text; not addresses, and not names such as `org/model`."""


class Unanswered(Exception):
    """A message that is best left without a reply."""


class NoWorker(Exception):
    """Nobody answers at the socket: the worker is not running (yet, or any more)."""


def ask(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer.

    Raises:
        NoWorker: there is none, or it died before it answered.
    """
    try:
        with Client(str(folder / SOCKET), "AF_UNIX", authkey=(folder / KEY).read_bytes()) as line:
            say(line, question)
            return hear(line)
    except (OSError, EOFError, ValueError, AuthenticationError) as error:
        raise NoWorker(f"no worker answers at this site ({plain(error)}); start `hocket join`") from error


def plain(error: BaseException) -> str:
    """An error as others may read it: none of this machine's paths."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{type(error).__name__} {error.errno}: {os.strerror(error.errno)}"
    return unplaced(f"{type(error).__name__}: {error}")


def unplaced(text: str) -> str:
    """A text without this machine's paths."""
    return PLACES.sub("[a path]", text)


def own(folder: Path) -> Path:
    """Make a folder that its owner alone can enter, and what is above it.

    Raises:
        StoreError: it cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise StoreError(f"'{folder}': {error.strerror}; choose a folder of your own") from error
    return folder


def say(line: Connection, what: dict[str, Any]) -> None:
    """Send JSON; never a pickled object."""
    line.send_bytes(json.dumps(what, separators=(",", ":")).encode())


def hear(line: Connection) -> dict[str, Any]:
    """Receive JSON. Raises `ValueError` for anything else."""
    found = json.loads(line.recv_bytes(1 << 30))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def store(path: Path, offset: int, data: bytes | memoryview, last: bool) -> None:
    """Write a part of a packet at its place; with the last one the file gets its name. Parts may come twice.

    The first one begins anew: a packet that lies here from before may be another one of the same name, as jobs are sent
    whole where their site has lost what they built on.

    Raises:
        ValueError: a part before this one is missing.
        OSError: the disk is full.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if offset == 0:
        path.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    elif path.exists() and not part.exists():
        return
    size = part.stat().st_size if part.exists() else 0
    if offset > size:
        raise ValueError(f"'{part.name}' has {size} bytes, and a part from {offset} on came; send it from the start")
    with part.open("r+b" if part.exists() else "wb") as f:
        f.seek(offset)
        f.write(data)
        f.truncate()
        if last:
            f.flush()
            os.fsync(f.fileno())
    if last:
        part.replace(path)


def fetch(path: Path, offset: int, count: int) -> bytes:
    """A part of a packet."""
    with path.open("rb") as f:
        f.seek(offset)
        return f.read(count)


def pair(mark: Path, place: int, patience: float, every: float = 0.05) -> None:
    """Bring a SuperNode that is a reply behind into step; called for both of two messages.

    A SuperNode hands out the next message when it has sent a reply, whichever. One that gave a message up after its
    client app had replied (the run ended meanwhile, say) has a reply too many: it sends that for the next message, and
    from then on each reply leaves with the message after it. Then, and only then, the second message comes while the
    first one waits here; if the first gets no reply, none is too many any more.

    Args:
        mark: a file that no other pair has.
        place: 1 or 2, the message's among the two.
        patience: seconds that one waits for the other; in step, the second finds at once that the first is over.

    Raises:
        Unanswered: this is the first message, and the second one has come.
    """
    mark.parent.mkdir(parents=True, exist_ok=True)
    met, over = mark.with_name(f"{mark.name}.met"), mark.with_name(f"{mark.name}.over")
    until = time.monotonic() + patience
    if place == 2:
        while time.monotonic() < until and not over.exists():
            with suppress(FileNotFoundError):
                mark.rename(met)  # either this or the renaming below, never both
                return
            time.sleep(every)
        over.unlink(missing_ok=True)
        return
    mark.touch()
    while time.monotonic() < until and not met.exists():
        time.sleep(every)
    try:
        mark.rename(over)
    except FileNotFoundError:
        met.unlink()
        raise Unanswered from None
