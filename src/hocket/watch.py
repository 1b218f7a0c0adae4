"""`hocket watch`: a run in a terminal, simulated or deployed, while it goes on or after."""

from __future__ import annotations

import math
import time
from collections import Counter

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from hocket.live import Client, Follower
from hocket.report.page import duration, size

BARS = "▁▂▃▄▅▆▇█"
STATES = {"lost": "red", "away": "yellow", "asked": "cyan", "here": "default", "answered": "green"}
"""States, those that want attention first, and their colours."""


def follow(path: Follower, console: Console, once: bool = False, every: float = 1.0) -> None:
    """Show a run until it has ended; one frame with `once`, and a frame a turn where there is no terminal."""
    path.refresh()
    if once or path.state.ended:
        console.print(frame(path, rows=20))
        return
    if not console.is_terminal:
        shown = -1
        while True:
            if path.begun and (path.state.version > shown or path.state.ended):
                shown = path.state.version
                console.print(frame(path, rows=20))
            if path.state.ended:
                return
            time.sleep(every)
            path.refresh()
    draw = lambda: frame(path, rows=max(3, console.height - 14))  # noqa: E731
    with Screen(draw(), console=console, auto_refresh=False) as screen:
        while not path.state.ended:
            time.sleep(every)
            path.refresh()
            screen.update(draw(), refresh=True)


def frame(run: Follower, rows: int) -> RenderableType:
    """What there is to see now, with at most `rows` clients."""
    s = run.state
    if not run.begun:
        return Text(f"{plain(run.title)}: the run has not begun; its server is starting, or waits to be submitted")
    state = "finished" if s.ended else f"last news {duration(run.silence)} ago"
    clock = "of the wall" if run.deployed else "virtual"
    lines = [
        Text(f"{plain(run.title)}   {state}", style="bold"),
        Text(f"turn {s.version}/{run.turns} {_bar(s.version, run.turns)} {duration(s.t)} {clock}"),
        Text(
            f"down {size(s.down)}, up {size(s.up)}, {s.updates} updates, staleness {s.staleness:.1f} (most {s.stalest})"
        ),
        Text(_losses("training loss", s.losses, "")),
        Text(_losses("held-out loss", [x for _, x in s.held], f" at version {s.held[-1][0]}" if s.held else "")),
        Text(_people(list(s.clients.values()), "sites" if run.deployed else "clients")),
    ]
    table = _table(run, rows)
    if s.refusals:
        shown = ", ".join(f"{n} {kind}" for kind, n in sorted(s.refusals.items()))
        lost = [Text(f"lost or refused: {shown}", style="red")]
        lost += [Text(f"  {duration(t)} {_name(run, c)}: {plain(reason)}") for t, c, reason in s.last]
    else:
        lost = [Text("lost or refused: none")]
    return Group(*lines, table, *lost)


def _table(run: Follower, rows: int) -> Table:
    """Clients: all of them, or, of many, those that want attention."""
    s, now = run.state, run.state.t + (run.silence if run.deployed and not run.state.ended else 0.0)
    who = list(s.clients.items())
    left = len(who) - rows
    if left > 0:
        order = list(STATES)
        who = sorted(sorted(who, key=lambda x: (order.index(x[1].state), x[1].since))[:rows])
    table = Table("site" if run.deployed else "client", "state", box=None, pad_edge=False)
    for head in ("for", "rows", "turn", "updates", "lost", "down", "up", "training loss"):
        table.add_column(head, justify="right")
    for _, c in who:
        table.add_row(
            plain(c.name), Text(c.state, STATES[c.state]), duration(max(0.0, now - c.since)), _or(c.rows), _or(c.turn),
            str(c.jobs), str(c.lost), size(c.down), size(c.up), "-" if c.loss is None else f"{c.loss:.3f}",
        )  # fmt: skip
    if left > 0:
        table.add_row(f"and {left:,} more", *[""] * 9)
    return table


def _people(clients: list[Client], what: str) -> str:
    by = Counter(c.state for c in clients)
    return f"{len(clients):,} {what}: " + ", ".join(f"{by[k]:,} {k}" for k in STATES if by[k])


def _losses(what: str, values: list[float], when: str) -> str:
    if not values:
        return f"{what} -"
    return f"{what} {values[0]:.4f} -> {values[-1]:.4f}{when} {_spark(values)}"


def _spark(values: list[float], width: int = 40) -> str:
    """A line of bars, the last `width` values; those that are not finite are gaps."""
    shown = values[-width:]
    known = [v for v in shown if math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    place = lambda v: round((v - low) / (high - low or 1.0) * (len(BARS) - 1))  # noqa: E731
    return "".join(BARS[place(v)] if math.isfinite(v) else "!" for v in shown)


def _bar(done: int, of: int, width: int = 30) -> str:
    full = min(width, width * done // max(of, 1))
    return "█" * full + "░" * (width - full)


def _name(run: Follower, client: int) -> str:
    c = run.state.clients.get(client)
    return plain(c.name) if c else str(client)


def _or(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def plain(text: str, most: int = 200) -> str:
    """Text from elsewhere, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
