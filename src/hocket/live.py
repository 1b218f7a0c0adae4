"""A run as its ledger says it stands now: read on as the file grows, for `hocket watch` and for metrics.

Simulated and deployed runs write the same rows, so one reader serves both. A last line that is not whole yet is left
for the next look; a file that was cut back (a run that goes on from a checkpoint) is read from its start again.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hocket import recipe as recipes
from hocket.errors import StoreError

KINDS = ("late", "rejected", "deadline", "offline")
"""How reasons of lost jobs begin; all others are failures, told in a site's own words."""


@dataclass
class Client:
    """One client, or site.

    Attributes:
        state: `away`, `here`, `asked`, `answered` or `lost` (its last job was).
        since: second of the run at which it came to that; heard: of its last update, if there was one.
        turn: of the last job that is known of.
        jobs, lost: updates that came, and jobs that were lost or refused.
        down, up: bytes.
        loss: training loss of the last update.
        rows: that it trains on, if it said so.
    """

    name: str
    state: str
    since: float = 0.0
    heard: float | None = None
    turn: int | None = None
    jobs: int = 0
    lost: int = 0
    down: int = 0
    up: int = 0
    loss: float | None = None
    rows: int | None = None


@dataclass
class State:
    """What the ledger's rows come to.

    Attributes:
        t: second of the last row; virtual in a simulation, of the wall in a deployment.
        version, loss, staleness, stalest: of the last aggregation.
        losses: training loss at each aggregation; held: (version, held-out loss) of each evaluation.
        refusals: lost and refused jobs by kind (see `KINDS`; else `failed`); last: the newest of them.
        late: jobs that were not there when they were due; what becomes of them is a second row.
    """

    clients: dict[int, Client] = field(default_factory=dict)
    t: float = 0.0
    version: int = 0
    updates: int = 0
    staleness: float = 0.0
    stalest: int = 0
    losses: list[float] = field(default_factory=list)
    held: list[tuple[int, float]] = field(default_factory=list)
    down: int = 0
    up: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    last: deque[tuple[float, int, str]] = field(default_factory=lambda: deque(maxlen=5))
    late: set[int] = field(default_factory=set)
    heard: float | None = None
    ended: bool = False

    def take(self, row: dict[str, Any]) -> None:
        """One row more."""
        what, at = row["what"], float(row.get("t", row.get("end", 0.0)))
        self.t = max(self.t, at)
        c = self.clients.get(row.get("client", -1))
        match what:
            case "begin":  # of a server's process: nobody is there until he joins
                for site in self.clients.values():
                    site.state = "away"
            case "step":
                self.version, self.staleness, self.stalest = row["version"], row["staleness"], row.get("stalest", 0)
                self.updates += row["updates"]
                if row.get("loss") is not None:
                    self.losses.append(float(row["loss"]))
            case "eval" if "loss" in row:
                self.held.append((row["version"], float(row["loss"])))
            case "down":
                self.down += row["bytes"]
            case "up":
                self.up += row["bytes"]
                self.heard = at
            case "lost":
                if row.get("job") in self.late:
                    return  # counted when it was due
                if row.get("late"):
                    self.late.add(row["job"])
                kind = kind_of(row["reason"])
                self.refusals[kind] += 1
                self.last.append((at, row["client"], row["reason"]))
            case "end":
                self.ended = True
        if c is not None:
            _take(c, what, at, row)


def _take(c: Client, what: str, at: float, row: dict[str, Any]) -> None:
    before = c.state
    match what:
        case "join":
            c.state, c.rows = "here", row.get("rows", c.rows)
        case "leave":
            c.state = "away"
        case "ask":
            c.state = "asked"
        case "down":
            c.down += row["bytes"]
        case "compute" if "loss" in row:
            c.loss = float(row["loss"])
        case "up":
            c.state, c.heard = "answered", at
            c.jobs += 1
            c.up += row["bytes"]
        case "lost":
            c.lost += 1
            c.state = c.state if c.state == "away" else "lost"
    c.turn = row.get("turn", c.turn)
    if what in ("join", "leave", "ask", "up", "lost") and (c.state != before or what in ("ask", "up")):
        c.since = at


def kind_of(reason: str) -> str:
    """A reason's kind, one of a few."""
    head = reason.partition(":")[0]
    return head if head in KINDS else "failed"


class Follower:
    """Follows a run's folder.

    Attributes:
        turns: of the run; 0 while its recipe is not there.
        deployed: whether its clients are sites, and its seconds the wall's.

    Raises:
        StoreError: there is no such folder, or it is not a run's.
        RecipeError: its recipe cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, State()
        self.title, self.turns, self.deployed = path.name, 0, False
        self._names: list[str] = []
        self._at, self._last, self._begun = 0, b"", False
        if not path.is_dir():
            raise StoreError(f"'{path}': there is no such folder yet; name the folder of a run that has been started")
        if not (path / "recipe.toml").exists() and not (path / "hub").is_dir():
            raise StoreError(f"'{path}' is no run folder: recipe.toml is missing")
        self._begin()

    def _begin(self) -> None:
        """What the recipe says, once it is there; a server writes it when its run begins."""
        if self._begun or not (self.path / "recipe.toml").exists() or not (self.path / "ledger.jsonl").exists():
            return
        recipe = recipes.load(self.path / "recipe.toml")
        self._begun = True
        self.deployed = (self.path / "packets").is_dir()
        self.turns = recipe.build_method().prelude + recipe.turns
        self.title = f"{recipe.name}: {recipe.method['name']} x {recipe.schedule['name']}, {recipe.model.source}"
        self._names = list(recipe.deployment.sites) if self.deployed else _names(self.path)
        self._names += [str(i) for i in range(len(self._names), recipe.clients.count)]
        self._anew()

    def _anew(self) -> None:
        away = "away" if self.deployed else "here"
        self.state = State({i: Client(n, away) for i, n in enumerate(self._names)})
        self._at, self._last = 0, b""

    @property
    def begun(self) -> bool:
        """Whether there is a ledger."""
        return self._begun

    @property
    def silence(self) -> float:
        """Seconds of the wall since the ledger's last row."""
        try:
            return max(0.0, time.time() - (self.path / "ledger.jsonl").stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def refresh(self) -> bool:
        """Read what is new; whether there was anything.

        Raises:
            StoreError: a whole line is damaged.
        """
        self._begin()
        if not self._begun:
            return False
        with (self.path / "ledger.jsonl").open("rb") as f:
            f.seek(self._at - len(self._last))
            if f.read(len(self._last)) != self._last:  # cut back since; what was written again is read again
                self._anew()
                f.seek(0)
            before = self._at
            for line in f:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    self.state.take({k: _number(v) for k, v in row.items()})
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise StoreError(
                        f"'{self.path / 'ledger.jsonl'}': a damaged line: {error!r}: {line[:80]!r}"
                    ) from error
                self._at, self._last = self._at + len(line), line
        return self._at != before


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value  # see `ledger.plain`


def _names(path: Path) -> list[str]:
    """Clients' names from the manifest of a simulated run, if it is there."""
    try:
        return [str(c["name"]) for c in json.loads((path / "manifest.json").read_text())["clients"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
