"""What a person sees while a run goes on: a bar in a terminal, a line a turn elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from hocket.report.page import duration, size


class Progress:
    """Turn, virtual time, losses, bytes, and the wall clock's estimate of what remains.

    Args:
        turns: of the run.
        quiet: show warnings only.
        console: where to show it; by default standard output.
    """

    def __init__(self, turns: int, quiet: bool = False, console: Console | None = None) -> None:
        self.turns, self.quiet = turns, quiet
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._live = self._console.is_terminal and not quiet
        self._eval: float | None = None
        self._began, self._first = time.monotonic(), 0
        self._bar = Bar(
            TextColumn("turn {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=None), TaskProgressColumn(),
            TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(),
            console=self._console, disable=not self._live,
        )  # fmt: skip
        self._task = self._bar.add_task("loading", total=turns)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def listen(self, row: dict[str, Any]) -> None:
        """Take a ledger record; and what a run says before: `data` (a table) and `warning`."""
        if row["what"] == "eval":
            self._eval = row["loss"]
            if not self._live and not self.quiet:
                whose = "own " if row.get("personal") else ""
                self._console.print(f"  turn {row['version']}: {whose}held-out loss {row['loss']:.4f}")
        elif row["what"] == "warning":
            self._console.print(f"warning: {row['text']}", markup=False)
        elif row["what"] == "data" and not self.quiet:
            self._console.print(row["table"])
        elif row["what"] == "step":
            self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        version = row["version"]
        self._first = self._first or version
        losses = [f"train {row['loss']:.3f}"] if row.get("loss") is not None else []
        losses += [f"held-out {self._eval:.3f}"] if self._eval is not None else []
        facts = " · ".join([f"virtual {duration(row['t'])}", *losses, size(row["down"] + row["up"])])
        self._bar.update(self._task, completed=version, description=facts)
        if not self._live and not self.quiet:
            spent = time.monotonic() - self._began
            left = spent / (version - self._first + 1) * (self.turns - version)
            self._console.print(f"  turn {version}/{self.turns}: {facts} · {spent:.0f} s, about {left:.0f} s left")
