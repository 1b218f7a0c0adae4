"""One way to log for server, gate, sites and workers: an event and its fields, as a line of JSON or as text for people.

    {"time": "2026-01-31T12:00:00.123+00:00", "level": "info", "event": "answered", "site": "oslo", "turn": 3}

A terminal gets text and a file JSON, unless `HOCKET_LOG` (which `--log` sets, also for the processes that are started)
says `json` or `text`. Neither rows nor paths of a site's data are ever among the fields.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hocket.errors import HocketError
from hocket.ledger import plain

FORM = "HOCKET_LOG"
FORMS = ("auto", "json", "text")


def say(log: logging.Logger, event: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log an event; fields that are None are left out."""
    log.log(level, event, extra={"fields": {k: v for k, v in fields.items() if v is not None}})


class Lines(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        row = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        row |= {"from": record.name.removeprefix("hocket."), **getattr(record, "fields", {})}
        if record.exc_info:
            row["error"] = self.formatException(record.exc_info)
        return json.dumps(plain(row), default=str)


class Text(logging.Formatter):
    """Time, event, fields; whatever a distant machine said is on one line and without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        fields = " ".join(f"{k}={v}" for k, v in getattr(record, "fields", {}).items())
        line = f"{_time(record)[11:19]} {level}{record.getMessage()}{f'  {fields}' if fields else ''}"
        line = "".join(c if c.isprintable() else " " for c in line)
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def _time(record: logging.LogRecord) -> str:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")


def begin(form: str | None = None) -> None:
    """Log what hocket says to standard error.

    Args:
        form: `json`, `text` or `auto`; none: what the environment says.

    Raises:
        HocketError: there is no such form.
    """
    form = form or os.environ.get(FORM) or "auto"
    if form not in FORMS:
        raise HocketError(f"--log or {FORM}: '{form}' is none of {', '.join(FORMS)}")
    os.environ[FORM] = form
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    _to(logging.StreamHandler(), form)


def into(path: Path) -> None:
    """Log what hocket says to a file too, as JSON."""
    _to(logging.FileHandler(path, delay=True), "json")


def _to(handler: logging.Handler, form: str) -> None:
    handler.setFormatter(Lines() if form == "json" else Text())
    log = logging.getLogger("hocket")
    log.setLevel(logging.INFO)
    log.addHandler(handler)


EVENTS = {
    "join": "joined", "leave": "left", "ask": "asked", "up": "answered", "lost": "lost", "step": "stepped",
    "eval": "evaluated", "end": "ended",
}  # fmt: skip
FIELDS = ("job", "turn", "version", "reason", "bytes", "updates", "loss", "staleness", "n", "rows")


def telling(sites: Sequence[str]) -> Callable[[Mapping[str, Any]], None]:
    """A listener to a ledger that logs what happens, with the sites' names."""
    log = logging.getLogger("hocket.run")

    def tell(row: Mapping[str, Any]) -> None:
        what, client = row["what"], row.get("client")
        if what in EVENTS:
            site = sites[client] if client is not None and 0 <= client < len(sites) else client
            fields = {k: row[k] for k in FIELDS if k in row}
            event = EVENTS[what]
            if what == "lost" and str(row["reason"]).startswith(("late", "rejected")):
                event = "refused"
            at = round(row.get("t", row.get("end", 0.0)), 3)
            say(log, event, logging.WARNING if what == "lost" else logging.INFO, site=site, **fields, second=at)

    return tell
