"""A run folder read back: records, and the plain summaries that pages, the command line and benchmarks share."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hocket.errors import StoreError

LANES = ("down", "compute", "up")
PARTS = {
    "parameters": "parameters", "private": "private", "gradients": "gradients", "optimizer": "optimizer",
    "activations": "activations", "after_start": "start", "after_forward": "forward", "after_backward": "backward",
    "after_step": "step", "after_upload": "upload", "peak": "most at once",
}  # fmt: skip
"""Columns of the memory table: key in the records, heading."""


@dataclass
class Run:
    """One run's records, in the order of its ledger.

    Attributes:
        steps, evals, lost: records of those kinds.
        lanes: (client, lane, start, end, turn, bytes) of the first `keep` uses of lanes.
        clients: for each client sums over all its lane uses: jobs, seconds and bytes a lane, train loss, losses.
        planned, measured: for each client bytes of memory by part and phase (see `PARTS`), the largest of its jobs;
            empty unless the recipe states machines' memory, or asks to measure it.
        rows: that each client trains on, where it said so when it joined.
        seconds: of the last record, on the run's clock.
        personal: losses and accuracies are of each client's own model on its own held-out rows.
        label: what to call it.
    """

    path: Path
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    lanes: list[tuple[int, str, float, float, int, int]] = field(default_factory=list)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    planned: dict[int, dict[str, float]] = field(default_factory=dict)
    measured: dict[int, dict[str, float]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    uses: int = 0
    seconds: float = 0.0
    finished: bool = False
    personal: bool = False
    label: str = ""

    @property
    def clock(self) -> str:
        """What its seconds are: those of machines that were really at work, or of the virtual clock."""
        return "wall time" if self.manifest.get("deployed") else "virtual time"

    def summary(self) -> dict[str, Any]:
        """Headline numbers; losses are None if nothing was evaluated."""
        first, last = (self.evals[0], self.evals[-1]) if self.evals else ({}, {})
        total = {lane: sum(c[f"{lane}_bytes"] for c in self.clients.values()) for lane in ("down", "up")}
        return {
            "name": self.label,
            "personal": self.personal,
            "start_loss": first.get("loss") if first.get("version") == 0 else None,
            "final_loss": last.get("loss"),
            "perplexity": last.get("perplexity"),
            "accuracy": last.get("accuracy"),
            "gsm8k": last.get("gsm8k"),
            "rouge_l": last.get("rouge_l"),
            "virtual_seconds": self.seconds,
            "down_bytes": int(total["down"]),
            "up_bytes": int(total["up"]),
            "catch_up_bytes": self.steps[-1].get("catch_up", 0) if self.steps else 0,
            "beside_bytes": self.steps[-1].get("beside", 0) if self.steps else 0,
            "catch_up": self.recipe.get("clients", {}).get("catch_up", "charged"),
            "versions": self.steps[-1]["version"] if self.steps else 0,
            "updates": sum(s["updates"] for s in self.steps),
            "lost": len(self.lost),
            "staleness": sum(s["staleness"] for s in self.steps) / max(len(self.steps), 1),
            "stalest": max((s.get("stalest", 0) for s in self.steps), default=0),
            "server_memory": max((s.get("memory", 0) for s in self.steps), default=0),
            "server_packets": max((s.get("packets", 0) for s in self.steps), default=0),
            "raw_tensors": int(sum(c["raw"] for c in self.clients.values())),
            "skipped": int(sum(c["skipped"] for c in self.clients.values())),
            "busy": {c: v["compute"] / self.seconds if self.seconds else 0.0 for c, v in sorted(self.clients.items())},
            "finished": self.finished,
        }

    def reached(self, loss: float) -> float | None:
        """Virtual seconds until held-out loss was first at most `loss`; None if it never was."""
        return first(self.curve("t"), loss)

    def curve(self, x: str) -> list[tuple[float, float]]:
        """(x, held-out loss) points; x is "version", "t" or "bytes" (cumulative, both directions)."""
        moved = {0: 0.0} | {s["version"]: float(s["down"] + s["up"]) for s in self.steps}
        return [(moved.get(e["version"], 0.0) if x == "bytes" else float(e[x]), e["loss"]) for e in self.evals]

    def layers(self, what: str) -> list[tuple[float, float]]:
        """(version, mean over modules) of a step's `error` or `rank`, where the method writes them down."""
        noted = [(float(s["version"]), s["layers"].values()) for s in self.steps if s.get("layers")]
        return [(v, sum(m[what] for m in rows) / len(rows)) for v, rows in noted]


def clock(runs: Sequence[Run]) -> str:
    """The clock of all these runs, or just time if they have not the same."""
    found = {r.clock for r in runs}
    return found.pop() if len(found) == 1 else "time"


def first(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """Where a curve of (x, loss) points, joined by lines, first is at most `goal`; None if it never is."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y <= goal:
            if before is None or not math.isfinite(before[1]):
                return x
            return before[0] + (x - before[0]) * (before[1] - goal) / (before[1] - y)
        before = x, y
    return None


def read(path: Path, keep: int = 4000) -> Run:
    """Read a run, also one that is still being written (a last line that is not whole is left out).

    Raises:
        StoreError: not a run folder; the message names the missing or damaged file.
    """
    ledger = path / "ledger.jsonl"
    for need in (path / "recipe.toml", path / "manifest.json", ledger):
        if not need.exists():
            raise StoreError(f"'{path}' is no run folder: {need.name} is missing")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        recipe = tomllib.loads((path / "recipe.toml").read_text())
    except ValueError as error:
        raise StoreError(f"'{path}': manifest.json or recipe.toml cannot be read: {error}") from error
    run = Run(path, recipe, manifest, label=manifest.get("name", path.name))
    if (path / "memory.json").exists():  # see hocket.needs
        run.planned = {int(c): parts for c, parts in json.loads((path / "memory.json").read_text()).items()}
    blank = {
        "jobs": 0,
        "loss": 0.0,
        "lost": 0,
        "skipped": 0,
        "steps": 0,
        "down_bytes": 0,
        "up_bytes": 0,
        "raw": 0,
        **dict.fromkeys(LANES, 0.0),
    }
    with ledger.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # still being written
            try:
                row = json.loads(line)
            except ValueError as error:
                raise StoreError(f"'{ledger}', line {number}: not JSON: {error}") from error
            _take(run, row, blank, keep)
    if run.personal:
        run.label += " (personalized)"
    return run


def _take(run: Run, row: dict[str, Any], blank: dict[str, float], keep: int) -> None:
    row = {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()}  # see Ledger.add
    what = row["what"]
    _measure(run, row)
    run.seconds = max(run.seconds, row.get("t", 0.0))
    if what in LANES:
        run.uses += 1
        c = run.clients.setdefault(row["client"], dict(blank))
        c[what] += row["end"] - row["start"]
        if what == "compute":
            c["jobs"] += 1
            c["loss"] += row.get("loss", 0.0)
            c["steps"] += row.get("steps", 0)
            c["skipped"] += row.get("skipped", 0)
        else:
            c[f"{what}_bytes"] += row["bytes"]
            c["raw"] += row.get("raw", 0)
        if len(run.lanes) < keep:
            run.lanes.append((row["client"], what, row["start"], row["end"], row["turn"], row["bytes"]))
    elif what == "lost":
        run.lost.append(row)
        run.clients.setdefault(row["client"], dict(blank))["lost"] += 1
    elif what == "step":
        run.steps.append(row)
    elif what == "join" and "rows" in row:
        run.rows[row["client"]] = row["rows"]
    elif what == "eval":
        run.evals.append(row)
        run.personal = run.personal or bool(row.get("personal"))
    elif what == "end":
        run.finished = True


def _measure(run: Run, row: dict[str, Any]) -> None:
    """Keep the largest of what a client's jobs measured. While it uploads it holds its parameters and the packet."""
    found = {k.removeprefix("memory_"): v for k, v in row.items() if k.startswith("memory_")}
    if row["what"] == "up" and (so_far := run.measured.get(row["client"])):
        found = {"after_upload": so_far["parameters"] + so_far["private"] + row["bytes"]}
    if found:
        most = run.measured.setdefault(row["client"], {})
        most.update({k: max(v, most.get(k, 0.0)) for k, v in found.items()})


def thin(points: list[Any], most: int = 2000) -> list[Any]:
    """At most `most` points, evenly spread, the last one kept."""
    if len(points) <= most:
        return points
    stride = len(points) / (most - 1)
    return [points[int(i * stride)] for i in range(most - 1)] + [points[-1]]
