"""A link over Flower's public API: one conversation for each site, each in a thread of its own.

A thread waits for one message at a time, so a slow site's upload never holds up what others have sent (a reply is
announced before its bytes are there, and whoever asks for several waits for all). Payloads go in parts, so memory is
bounded by a part whatever the size of a model. A message that takes long is asked for again and again with short
waits: Flower keeps none for longer than we look after it. A site whose SuperNode fell out of step is brought into it.
"""

from __future__ import annotations

import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from hocket.deploy import checks
from hocket.deploy.courier import own
from hocket.deploy.logs import say
from hocket.deploy.messages import content, read
from hocket.deploy.nouns import Answered, Ask, Event, Failed, Joined, Left, Request, Taken
from hocket.deploy.site import plain

log = logging.getLogger(__name__)


class Gone(Exception):
    """The site cannot be reached."""


class FlowerLink:
    """Sites that are connected to a SuperLink.

    Args:
        grid: of the server app.
        run: the run's name, the same after a restart.
        recipe: what sites need of it, in TOML.
        sites: their names; a site's place is its client number.
        folder: where uploads arrive.
        part: bytes of a packet in one message.
        poll: seconds between looks for a reply.
        patience: seconds a message may take before it counts as lost; a site's answer may take longer, in several.
        pause: seconds after one that failed, so that a worker or node has time to come back before the next.
    """

    def __init__(
        self, grid: Grid, run: str, recipe: str, sites: Sequence[str], folder: Path, part: int = 64 << 20,
        poll: float = 0.1, patience: float = 300.0, pause: float = 5.0,
    ) -> None:  # fmt: skip
        self.grid, self.run, self.recipe, self.sites, self.folder = grid, run, recipe, list(sites), folder
        self.part, self.poll, self.patience, self.pause = part, poll, patience, pause
        own(folder)
        self._events: queue.Queue[Event] = queue.Queue()
        self._todo: dict[int, queue.Queue[Request | None]] = {}  # by client
        self._nodes: dict[int, int] = {}  # client -> node
        self._known: set[int] = set()  # nodes that were met or are being met; `_watch` alone writes it
        self._again: set[int] = set()  # of them those to be met again
        self._paired: dict[int, float] = {}  # node -> when it was last brought into step
        self._closed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def send(self, request: Request) -> None:
        with self._lock:
            todo = self._todo.get(request.client)
        if todo is None:
            self._events.put(Failed(request.client, request.id, "link", "its site is not connected"))
        else:
            todo.put(request)

    def next(self, timeout: float | None) -> Event | None:
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for todo in self._todo.values():
                todo.put(None)

    # --- who is there -------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            try:
                now = set(self.grid.get_node_ids())
            except Exception as error:  # the SuperLink is restarting
                say(log, "no SuperLink", logging.WARNING, reason=str(error))
                continue
            with self._lock:
                self._known -= self._again
                self._again.clear()
                left = (self._known | set(self._nodes.values())) - now
            for node in left:
                self._lose(node)
            for node in now - self._known:
                threading.Thread(target=self._meet, args=(node,), daemon=True).start()
            self._known = now

    def _lose(self, node: int) -> None:
        with self._lock:
            gone = [c for c, n in self._nodes.items() if n == node]
            for c in gone:
                del self._nodes[c]
                self._todo.pop(c).put(None)
                self._events.put(Left(c))  # before anybody hears that it is not connected

    def _meet(self, node: int) -> None:
        """Learn which site a node is, have it open the run, and begin its conversation; if it cannot yet, once more."""
        if not self._met(node):
            self._closed.wait(self.pause)
            with self._lock:
                self._again.add(node)

    def _met(self, node: int) -> bool:
        """Whether all is settled with a node; else it is met again, if it is there still."""
        try:
            told = self._say(node, {"op": "hello", "run": self.run})[0]
            if "failed" in told:
                raise Gone(str(told.get("reason")))
            if (name := told.get("name", "")) not in self.sites:
                say(log, "node refused", logging.WARNING, node=node, site=name, reason="no site of this run")
                return True
            client = self.sites.index(name)
            hello = self._open(client, node)
            if hello is None:
                return False
        except Exception as error:  # Gone, or no message of ours: whatever it is, the others go on
            say(log, "node does not answer", logging.WARNING, node=node, reason=f"{type(error).__name__}: {error}")
            return False
        with self._lock:
            if client in self._nodes:  # a SuperNode that was started anew may be seen before the old one is missed
                say(log, "node refused", logging.WARNING, node=node, site=name, reason="another node has this name")
                return self._nodes[client] == node
            self._nodes[client] = node
            todo = self._todo[client] = queue.Queue()
        self._events.put(Joined(client, hello))
        threading.Thread(target=self._converse, args=(client, node, todo), daemon=True).start()
        return True

    def _open(self, client: int, node: int) -> dict[str, int] | None:
        """Have a site open the run, once it has a worker; what it says of itself, None if it cannot. Raises `Gone`."""
        question = {"op": "hello", "run": self.run, "recipe": self.recipe, "client": client}
        while not self._closed.is_set():
            found = self._say(node, question, patience=3600.0)[0]
            if "failed" not in found:
                try:
                    return checks.hello(found)
                except ValueError as error:
                    found = {"failed": "job", "reason": f"hello: {error}"}
            say(log, "not open yet", logging.WARNING, site=self.sites[client], reason=found.get("reason"))
            if found["failed"] != "link":
                return None
            self._closed.wait(self.pause)
        return None

    # --- talking ------------------------------------------------------------------------------------------------
    def _converse(self, client: int, node: int, todo: queue.Queue[Request | None]) -> None:
        while (request := todo.get()) is not None:
            event: Event
            try:
                event = self._serve(client, node, request)
            except (Gone, OSError) as error:  # this machine's disk may be full for a while
                event = Failed(client, request.id, "link", str(error))
            except ValueError as error:
                event = Failed(client, request.id, "job", f"rejected: {error}")
            except Exception as error:  # an event for the engine in any case: it waits for one
                log.exception("site %d", client)
                event = Failed(client, request.id, "lost", f"{type(error).__name__}: {error}")
            if isinstance(event, Failed) and event.kind == "link":
                self._closed.wait(self.pause)
            self._events.put(event)

    def _serve(self, client: int, node: int, r: Request) -> Event:
        sizes = [a.packet.stat().st_size for a in r.asks]
        inline = sum(sizes) <= self.part
        if not inline:
            for ask in r.asks:
                self._upload(node, ask)
        do = {"op": "do", "run": self.run, "job": r.answer, "part": self.part}
        do["timeout"] = self.patience / 2 if r.wait else 0.0
        packets = [[a.job.id, n] for a, n in zip(r.asks, sizes, strict=True)] if inline else []
        news = {"asks": [plain(a.job) for a in r.asks], "packets": packets, "forget": r.forget}
        told, body = self._say(node, do | news, b"".join(a.packet.read_bytes() for a in r.asks) if inline else None)
        if told.get("wait") and not r.wait:
            return Taken(client, r.id)
        while told.get("wait"):
            told, body = self._say(node, do | {"asks": [], "packets": [], "forget": []})
        if "failed" in told:
            kind = "job" if told["failed"] not in ("link", "lost") else str(told["failed"])
            if kind == "lost" and self._open(client, node) is None:  # its worker was started anew
                kind = "job"
            return Failed(client, r.id, kind, str(told.get("reason"))[:1000])
        said, size = checks.told(told.get("told")), int(told.get("size", 0))
        if size > r.largest:
            raise ValueError(f"an upload of {size} bytes; at most {r.largest} can be one")
        path = self.folder / f"came-{client}-{r.id}.hkt"
        try:
            with path.open("wb") as f:
                at = f.write((body or b"")[: size + 1])
                while at < size:
                    head = {"op": "fetch", "run": self.run, "job": r.answer, "offset": at, "part": self.part}
                    more, body = self._say(node, head)
                    if "failed" in more or not body:
                        raise Gone(str(more.get("reason", "an upload ends before its end")))
                    at += f.write(body[: size - at + 1])
        except BaseException:  # it will come under another name
            path.unlink(missing_ok=True)
            raise
        return Answered(client, r.answer, said, path)

    def _upload(self, node: int, ask: Ask) -> None:
        """A packet in parts, each read when the one before has arrived."""
        size = ask.packet.stat().st_size
        with ask.packet.open("rb") as f:
            for offset in range(0, max(size, 1), self.part):
                head = {"op": "part", "run": self.run, "job": ask.job.id, "offset": offset}
                told = self._say(node, head | {"last": offset + self.part >= size}, f.read(self.part))[0]
                if "failed" in told:
                    raise Gone(str(told.get("reason")))

    def _say(
        self, node: int, head: dict[str, Any], body: bytes | None = None, patience: float | None = None
    ) -> tuple[dict[str, Any], bytes | None]:
        """Send one message and wait for its reply. Raises `Gone`."""
        now = time.monotonic()
        recent = now - self._paired.get(node, -math.inf) < self.patience  # the pair may still be in this message's way
        patience = (patience or self.patience) + (2 * self._pairing if recent else 0.0)
        message = Message(content(head, body), dst_node_id=node, message_type="train", ttl=patience)
        try:
            (key,) = list(self.grid.push_messages([message]))
        except Exception as error:
            raise Gone(f"cannot send: {error}") from error
        if not key:
            raise Gone("its node is not connected")
        until, late = now + patience, now + float(head.get("timeout", 0.0)) + self.patience / 4
        while (now := time.monotonic()) < until and not self._closed.is_set():
            if now > late and not recent and node in self._known:
                recent = True
                self._pair(node)
            try:
                found = list(self.grid.pull_messages([key]))
            except Exception as error:  # the SuperLink is restarting
                say(log, "no SuperLink", logging.WARNING, reason=str(error))
                found = []
            if found:
                if found[0].has_error():
                    raise Gone(str(found[0].error.reason))
                return read(found[0].content)
            time.sleep(self.poll)
        raise Gone("no answer in time")

    def _pair(self, node: int) -> None:
        """Two messages that bring a node into step, if it is out of it (see `courier.pair`); another waits for them."""
        say(log, "node is late", logging.WARNING, node=node, reason="no answer yet; it may hold one back")
        self._paired[node] = time.monotonic()
        head = {"op": "pair", "run": self.run, "key": secrets.randbits(60), "timeout": self._pairing}
        heads = [head | {"place": place} for place in (1, 2)]
        two = [Message(content(h), dst_node_id=node, message_type="train", ttl=self.patience) for h in heads]
        try:
            self.grid.push_messages(two)
        except Exception as error:  # the SuperLink is restarting
            say(log, "no SuperLink", logging.WARNING, reason=str(error))

    @property
    def _pairing(self) -> float:
        """Seconds that a pair takes at a node that is in step."""
        return min(self.patience / 8, 10.0)
