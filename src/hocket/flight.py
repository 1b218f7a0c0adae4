"""A job between being asked and being heard of, on the virtual clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hocket.clock import Clock
from hocket.methods import Job
from hocket.tree import Tree


@dataclass
class Flight:
    """One job's way through its client's three lanes.

    Attributes:
        view, key: what the client computes with, or where in the spool that is; `view` is dropped once it has.
        bytes, catch_up: of the download, and how many of them (or beside them, if free) are catching up.
        down, compute, up: (start, end) on each lane, in seconds; `compute` can still move while the job waits.
        encode: seconds at the end of `compute` that encoding the packet took.
        beside, up_beside: bytes of the download and of the upload that are no adapters (see `Method.beside`).
        raw: tensors that the codec sent as they are because nothing smaller stood for them.
        doomed: it will be lost on the client.
        abandoned: the server does not wait for it any more.
    """

    job: Job
    view: Tree | None
    bytes: int
    catch_up: int
    down: tuple[float, float]
    compute: tuple[float, float]
    doomed: bool
    up: tuple[float, float] | None = None
    up_bytes: int = 0
    weight: float = 0.0
    metrics: dict[str, float] | None = None
    abandoned: bool = False
    encode: float = 0.0
    raw: int = 0
    key: str | None = None
    beside: int = 0
    up_beside: int = 0

    def uses(self, now: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """What the job used of its lanes until `now`, for the ledger; a lane cut off counts its share of bytes."""
        job, told = self.job, ("loss", "steps", "skipped")
        common: dict[str, Any] = {"client": job.client, "job": job.id, "turn": job.turn, "version": job.version}
        metrics = {k: v for k, v in sorted((self.metrics or {}).items()) if k in told or k.startswith("memory_")}
        for what, lane, size in (
            ("down", self.down, self.bytes),
            ("compute", self.compute, 0),
            ("up", self.up, self.up_bytes),
        ):
            if lane is None or lane[0] > now:
                continue
            start, end = lane
            share = 1.0 if end <= now else (now - start) / (end - start)
            row = {**common, "start": start, "end": min(end, now), "bytes": round(size * share)}
            if what == "down":
                row |= {"catch_up": round(self.catch_up * share) or None, "beside": round(self.beside * share) or None}
            elif what == "up":
                row |= {"raw": self.raw or None, "beside": round(self.up_beside * share) or None}
            else:
                row["encode"] = min(self.encode, max(0.0, now - end + self.encode)) or None
            yield what, row | (metrics if what == "compute" else {})


def requeue(clock: Clock, waiting: Iterable[Flight], latency: float, client: int, end: float) -> None:
    """Let jobs that wait for their client's processor begin one after the other, once it is free at second `end`."""
    for later in waiting:
        start = max(end, later.down[1] + latency)
        end = start + later.compute[1] - later.compute[0]
        if (start, end) != later.compute:  # else its event is there already
            later.compute = start, end
            clock.schedule(end, "computed", later.job.id)
    clock.vacate(client, "compute", end)


def dump(flights: Iterable[Flight]) -> dict[str, Any]:
    """Flights as plain data and trees; trees that flights share stay shared."""
    views: list[Tree] = []
    index: dict[int, int] = {}
    rows = []
    for f in flights:
        if f.view is not None and id(f.view) not in index:
            index[id(f.view)] = len(views)
            views.append(f.view)
        rows.append({**vars(f), "job": vars(f.job), "view": None if f.view is None else index[id(f.view)]})
    return {"views": views, "flights": rows}


def restore(saved: dict[str, Any]) -> dict[int, Flight]:
    """Flights by job, from what `dump` gave."""
    flights = {}
    for f in saved["flights"]:
        lanes = {k: tuple(f[k]) if f[k] is not None else None for k in ("down", "compute", "up")}
        job = Job(**{**f["job"], "own": tuple(f["job"]["own"])})
        view = None if f["view"] is None else saved["views"][f["view"]]
        flights[job.id] = Flight(**{**f, **lanes, "job": job, "view": view})
    return flights
