"""What server and sites say to each other, whatever carries it.

The wire model is what every engine can do: the server sends a site a message, and the site answers it exactly once, at
any later time; at most one message is open for each site. A message brings the jobs that the site does not have yet and
names the one whose update is to come back, so a site that is ahead computes while updates and aggregates travel. Jobs
are known by their id: one that comes again is answered from what was computed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hocket.methods import Job


@dataclass(frozen=True)
class Ask:
    """A job and the file that holds its download as a packet."""

    job: Job
    packet: Path


@dataclass(frozen=True)
class Request:
    """One message to a site.

    Attributes:
        id: of this attempt; a message that is sent again has the same.
        asks: jobs that the site was not sent yet, in the order in which it does them.
        answer: the job whose update is to come back.
        forget: jobs that nobody waits for any more.
        largest: bytes that an upload may have.
        wait: answer once the update is there; else at once, with it or without (see `Taken`).
    """

    id: int
    client: int
    asks: tuple[Ask, ...]
    answer: int
    forget: tuple[int, ...] = ()
    largest: int = 1 << 40
    wait: bool = True


@dataclass(frozen=True)
class Joined:
    """A site can be asked. `hello` is what it says of itself: its `rows`, and the `version` it holds of this run."""

    client: int
    hello: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """A site cannot be reached any more."""

    client: int


@dataclass(frozen=True)
class Answered:
    """A job's update is here.

    Attributes:
        told: `weight`, `metrics`, `raw`, `beside`, which job it is, and the site's seconds: `waited` from having the
            job to beginning it, `computed`, and `kept` from its end until the answer began to travel.
        packet: file that holds the upload; the engine takes it away.
    """

    client: int
    job: int
    told: Mapping[str, Any]
    packet: Path


@dataclass(frozen=True)
class Taken:
    """A site has the jobs of a message that did not wait, and their updates are not there yet."""

    client: int
    request: int


@dataclass(frozen=True)
class Failed:
    """A message will not be answered.

    Attributes:
        kind: `lost` (the site has not got what the job needs, so all its jobs are to be asked anew), `job` (the job
            failed there and will again) or `link` (try again).
    """

    client: int
    request: int
    kind: str
    reason: str


Event = Joined | Left | Answered | Taken | Failed


class Link(Protocol):
    """Carries messages to sites and tells what comes back."""

    def send(self, request: Request) -> None:
        """Begin to send; never waits for the site."""

    def next(self, timeout: float | None) -> Event | None:
        """The next event, or None after `timeout` seconds."""

    def close(self) -> None:
        """Let all sites know that the run is over, and stop."""
