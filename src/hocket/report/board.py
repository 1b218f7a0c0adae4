"""Scalars for TensorBoard (extra `tensorboard`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hocket.errors import need


class TensorBoard:
    """Writes a run's steps and evaluations; x is the version. A resumed run writes the same points again.

    Args:
        folder: event files go here.

    Raises:
        HocketError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        need("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def listen(self, row: dict[str, Any]) -> None:
        """Take a ledger record; all but `step` and `eval` are passed over."""
        if row["what"] not in ("step", "eval"):
            return
        for key, value in row.items():
            if isinstance(value, int | float) and key != "version":
                self._writer.add_scalar(f"{row['what']}/{key}", value, row["version"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
