"""The run's record: one JSON object a line, append-only, on the virtual clock, the same bytes whenever it is run again.

Kinds (`what`): `down`, `compute`, `up` (a lane in use, with `start`, `end`, `bytes`), `lost`, `join`, `leave`, `step`,
`eval`, `end`. Wall-clock facts are not in it; they are in the manifest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hocket.errors import StoreError


class Ledger:
    """Totals in memory, lines in a file (or nowhere, with `path=None`).

    Args:
        path: the file; opened for appending.
        position: bytes of it that are true (from a checkpoint); what follows is cut off, because it is done again.
        listener: called with each record, for progress bars and TensorBoard.

    Raises:
        StoreError: the file is shorter than `position`, so it is older than the checkpoint.
    """

    def __init__(
        self, path: Path | None = None, position: int = 0, listener: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.listener = listener
        self.bytes = {"down": 0, "up": 0, "catch_up": 0, "beside": 0}
        self.seconds = {"down": 0.0, "compute": 0.0, "up": 0.0}
        self.updates = self.losses = 0
        self.position = position
        self._file = None
        if path is not None:
            size = path.stat().st_size if path.exists() else 0
            if size < position:
                raise StoreError(f"'{path}' has {size} bytes, the checkpoint knows of {position}: the file is older")
            if size:
                os.truncate(path, position)
            self._file = path.open("ab")

    def add(self, what: str, **record: Any) -> None:
        """Append one record; `None` fields are left out. In the file, numbers that are not finite are strings."""
        row = {"what": what, **{k: v for k, v in record.items() if v is not None}}
        if what in self.bytes:
            self.bytes[what] += record["bytes"]
            for part in ("catch_up", "beside"):
                self.bytes[part] += row.get(part, 0)
        if what in self.seconds:
            self.seconds[what] += record["end"] - record["start"]
        self.updates += what == "up"
        self.losses += what == "lost"
        if self._file is not None:
            line = json.dumps(plain(row), separators=(",", ":")).encode() + b"\n"
            try:
                self._file.write(line)
                self._file.flush()  # whoever watches the run reads along
            except OSError as error:
                raise self._full(error) from error
            self.position += len(line)
        if self.listener is not None:
            self.listener(row)

    def flush(self) -> None:
        """Make all lines durable. Raises `StoreError` if the disk is full."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise self._full(error) from error

    def _full(self, error: OSError) -> StoreError:
        return StoreError(f"cannot write '{self._file and self._file.name}': {error.strerror}; free space, then resume")

    def close(self) -> None:
        """Flush and close the file."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        """Totals and the length of the file, which is flushed first."""
        self.flush()
        totals = {"bytes": self.bytes, "seconds": self.seconds, "updates": self.updates, "losses": self.losses}
        return {"position": self.position, **totals}

    def load_totals(self, saved: dict[str, Any]) -> None:
        """Take over the totals of `state_dict`; the position is the constructor's business."""
        self.bytes = {k: saved["bytes"][k] for k in self.bytes}  # the order is part of the file
        self.seconds = {k: saved["seconds"][k] for k in self.seconds}
        self.updates, self.losses = saved["updates"], saved["losses"]


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
