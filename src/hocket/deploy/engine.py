"""The engine on real machines: the same server, methods, schedules and codecs as on the virtual clock, over a link.

    a site joins, leaves, answers, fails  ->  the server hears of it, steps, and asks  ->  messages to sites

Every job's download is a packet in the spool, and every upload one in the inbox before the server hears of it, so a
process that was killed goes on from its last checkpoint without losing or counting twice what arrived since. Deadlines
are ours, from the moment of asking. The ledger has the rows of a simulated run, with seconds of the wall, and
`hocket.deploy.replay` makes the same model from the order of its events.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hocket import store, wire
from hocket.codecs import Codec
from hocket.deploy import saving
from hocket.deploy.again import again, renew
from hocket.deploy.checks import Fitting, Norms, Weights
from hocket.deploy.logs import say
from hocket.deploy.nouns import Answered, Event, Failed, Joined, Left, Link, Taken
from hocket.deploy.ways import Out, Way, due, fingerprint, same, uses
from hocket.errors import RunError, WireError
from hocket.evaluations import Evaluations
from hocket.ledger import Ledger
from hocket.methods import Job, Update
from hocket.server import Server
from hocket.tree import nbytes

log = logging.getLogger(__name__)
TRIES = 5  # of a message that the link could not carry, before its site's jobs are given up


class Deployment:
    """A run over a link.

    Args:
        server: at version 0, or with a saved state; all clients count as away until they join.
        link: to the sites.
        down, up: codecs of the two directions.
        folder: downloads (`out`) and uploads (`inbox`) as packets.
        ledger: the record.
        evaluations: when the model is measured.
        ready: how many sites must have joined before the first is asked.
        on_event: called after every event, when the state may be saved; may raise `Interrupted`.
        patience: seconds without any event or open job after which a run that cannot go on ends with an error.
        rejoin: seconds that sites have to come back, to this process or to the next one, before their jobs are lost.
        norms: refuses updates of a norm far from that of others.
        weights: what updates weigh; none: what their sites say.
    """

    def __init__(
        self, server: Server, link: Link, down: Codec, up: Codec, folder: Path, ledger: Ledger,
        evaluations: Evaluations, ready: int = 1, on_event: Callable[[], None] = lambda: None,
        patience: float = 600.0, rejoin: float = 120.0, norms: Norms | None = None,
        weights: Weights | None = None, now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.server, self.link, self.down, self.up = server, link, down, up
        self.ledger, self.evaluations, self.ready, self.on_event = ledger, evaluations, ready, on_event
        self.outbox, self.inbox = folder / "out", folder / "inbox"
        for f in (self.outbox, self.inbox):
            f.mkdir(parents=True, exist_ok=True)
        self.patience, self.rejoin, self.norms, self.now = patience, rejoin, norms or Norms(None), now
        self.weights = weights
        self.bounds: dict[int, int] = {}  # who may hold what the server went back on -> what it went back to
        self.first = 0  # job that was asked after that
        self.away: dict[int, float] = {}  # who has jobs and cannot be reached -> until when he may come back
        self.largest = (64 << 20) + 4 * nbytes(server.state["params"])  # bytes of an upload
        self.origin = now()
        self.out: dict[int, Out] = {}
        self.ways: dict[int, Way] = {}
        self.requests = self.events = 0
        self.begun = self.finished = False
        self._spent: list[Path] = []  # of the inbox; deleted once a checkpoint knows of them
        self.missed: set[int] = set()  # who was there before the server was started anew, and has not come back
        self.patient = 0.0
        for c in server.clients:
            server.left(c)

    @property
    def t(self) -> float:
        """Seconds since the run began, over all its processes."""
        return self.now() - self.origin

    # --- the loop -----------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Go on until the server has finished.

        Raises:
            RunError: nobody is left to ask and nothing is under way.
            Interrupted: `on_event` or an evaluation was asked to stop; the state is consistent and can be saved.
        """
        self.ledger.add("begin", t=self.t)
        saving.recover(self)
        quiet = self.t
        while True:
            self._settle()
            if self.server.finished:
                break
            event = self.link.next(self._timeout())
            if event is not None:
                quiet = self.t
                self._hear(event)
            self._expire()
            if not self.out and self.t - quiet > self.patience:
                raise RunError(f"stuck: no event for {self.patience:.0f} s; {self.server.standstill}")
            self.events += event is not None
            self.on_event()
        self.ledger.add("end", t=self.t, version=self.server.version)
        self.finished = True

    def _settle(self) -> None:
        self.begun = self.begun or len(self.server.online) >= self.ready
        while True:
            self.evaluations.settle(self.t)
            record = self.server.step()
            if record is None:
                break
            for job in record.pop("jobs"):
                self._spent += [self.upload(job), self.told(job)]
            self.ledger.add("step", t=self.t, **record, **self.ledger.bytes)
            self.evaluations.stepped()
        # asked too early, a turn would be of those alone who were quickest to come back
        waiting = self.missed and self.t < self.patient
        for job in self.server.poll() if self.begun and not waiting else ():
            self._ask(job)
        for client in list(self.ways):
            self._push(client)

    def _timeout(self) -> float:
        """Seconds until the next deadline, at most one: `on_event` wants to be asked."""
        due = [o.asked + o.job.deadline for o in self.out.values() if o.job.deadline is not None and not o.abandoned]
        return min(1.0, max(0.0, min(due, default=self.t + 1.0) - self.t))

    # --- asking -------------------------------------------------------------------------------------------------
    def _ask(self, job: Job) -> None:
        packet = self.outbox / f"{job.id}.hkt"
        store.put(packet, lambda f: self.down.write(f, job.payload))
        self.out[job.id] = Out(replace(job, payload={}), self.t, packet.stat().st_size)
        self.ways.setdefault(job.client, Way()).waiting.append(job.id)
        self.ledger.add("ask", t=self.t, client=job.client, job=job.id, turn=job.turn, version=job.version)

    def _push(self, client: int) -> None:
        """Send what the site lacks, if no message to it is open."""
        way = self.ways[client]
        if client not in self.server.online:
            return
        jobs = [self.out[j].job for j in way.sent + way.waiting]
        more = self.server.schedule.ahead + 1 - len(jobs) if all(j.turn + 1 < self.server.turns for j in jobs) else 0
        request = way.message(self.requests, client, self.out, self.outbox, self.largest, self.t, more)
        if request is not None:
            self.requests += 1
            self.link.send(request)

    # --- hearing ------------------------------------------------------------------------------------------------
    def _hear(self, event: Event) -> None:
        match event:
            case Joined(client, hello):
                self._joined(client, hello)
            case Left(client):
                self._left(client)
            case Answered():
                self._answered(event)
            case Taken(client, request):
                self.ways.get(client, Way()).taken(request)
            case Failed():
                self._failed(event)

    def _joined(self, client: int, hello: Mapping[str, Any]) -> None:
        if client not in self.server.clients:
            log.warning("a site that calls itself client %s is not of this run", client)
            return
        if client in self.server.online:  # it was away for less time than it takes to notice
            self._left(client)
        known = self.server.clients[client]
        rows, version = int(hello.get("rows", known.rows)), int(hello.get("version", -1))
        held = version if version <= self.bounds.get(client, version) else -1  # else it is of a history that is no more
        self.server.clients[client] = replace(known, rows=rows)
        self.server.holds(client, held)
        self.server.joined(client)
        self.away.pop(client, None)
        self.missed.discard(client)
        self.ledger.add("join", t=self.t, client=client, rows=rows, version=version, held=held)

    def _left(self, client: int) -> None:
        if client not in self.server.online:
            return
        self.server.left(client)
        way = self.ways.setdefault(client, Way())
        for j in [j for j in way.sent if self.out[j].abandoned]:
            way.sent.remove(j)
            self._lose(j, "deadline")
        again(self, way)
        self.away[client] = self.t + self.rejoin
        self.ledger.add("leave", t=self.t, client=client)

    def _drop(self, client: int, reason: str) -> None:
        """All of a site's jobs are lost."""
        way = self.ways.pop(client, Way())
        for j in (*way.sent, *way.waiting):
            self._lose(j, reason)

    def _lose(self, job: int, reason: str) -> None:
        out = self.out.pop(job)
        (self.outbox / f"{job}.hkt").unlink(missing_ok=True)
        if not out.abandoned or self.server.overdue.get(out.job.client) == job:  # its site is at it no more
            self.server.lost(out.job)
            self._note_lost(out.job, reason)

    def _note_lost(self, job: Job, reason: str, late: bool | None = None) -> None:
        """`late`: its site may still be at it."""
        self.ledger.add("lost", t=self.t, client=job.client, job=job.id, turn=job.turn, reason=reason, late=late)

    def _answered(self, event: Answered) -> None:
        way, out = self.ways.get(event.client), self.out.get(event.job)
        if way is not None and way.request is not None and way.request.answer == event.job:
            way.request = None
        known = way is not None and out is not None and event.job in way.sent
        if way is None or out is None or not known:
            event.packet.unlink(missing_ok=True)  # it came twice, or after its site was given up
            return
        if not same(event.told, out.job):
            event.packet.unlink(missing_ok=True)
            way.sent.remove(event.job)
            way.forget.append(event.job)
            self._lose(event.job, "rejected: it names another client, version or turn than its job")
            return
        if event.job >= self.first and out.job.whole:  # its site was sent the whole model, and has it
            self.bounds.pop(event.client, None)
        packet = self.upload(event.job)
        if event.packet != packet:
            event.packet.replace(packet)
        store.put(self.told(event.job), json.dumps(dict(event.told)).encode())
        self.take(way, out, dict(event.told), packet)

    def take(self, way: Way, out: Out, told: dict[str, Any], packet: Path) -> None:
        """Let the server hear of an upload that is in the inbox."""
        job = out.job
        way.sent.remove(job.id)
        way.forget.append(job.id)
        way.renewed = 0
        del self.out[job.id]
        (self.outbox / f"{job.id}.hkt").unlink(missing_ok=True)
        size = packet.stat().st_size
        rows = dict(uses(out, told, size, self.t))
        for what, row in rows.items():
            self.ledger.add(what, **row, **({"digest": fingerprint(packet)} if what == "up" else {}))
        due(way, rows)
        self.server.computed(job)
        refused: str | None = "late"
        if not out.abandoned:
            blank = Update(job.id, job.client, job.version, job.turn, {}, 0.0, bytes=size)
            try:
                payload = Fitting(self.up.decode(wire.Packet(packet)), self.server.state["params"])
                weight, metrics = float(told["weight"]), dict(told["metrics"])
                if self.weights is not None:
                    weight = self.weights.look(weight, self.server.clients[job.client].rows)
                norm = self.norms.look(payload)
                refused = self.server.receive(replace(blank, payload=payload, weight=weight, metrics=metrics))
                if refused is None:
                    self.norms.accept(norm)
            except Exception as error:  # what one site sent must not end the run, again at every start
                self.server.receive(blank)  # without weight: refused, as whatever it cannot take
                refused = f"rejected: {error}" if isinstance(error, WireError) else f"rejected: {error!r}"
                say(log, "rejected", logging.WARNING, client=job.client, job=job.id, reason=refused)
            if refused:
                self.server.lost(job)
                self._note_lost(job, refused)
        if refused:
            self._spent += [packet, self.told(job.id)]

    def _failed(self, event: Failed) -> None:
        way = self.ways.get(event.client)
        if way is None or way.request is None or way.request.id != event.request:
            return
        again = event.kind == "link" and way.tries < TRIES
        fields = {"client": event.client, "job": way.request.answer, "kind": event.kind, "reason": event.reason}
        say(log, "retry" if again else "failed", logging.WARNING, **fields, tries=way.tries)
        if again:
            way.tries += 1
            self.link.send(way.request)
        elif event.kind == "job":
            job, way.request = way.request.answer, None
            way.sent.remove(job)
            way.forget.append(job)
            self._lose(job, event.reason)
        else:
            if event.kind != "lost" or not renew(self, event.client, way):
                self._drop(event.client, event.reason)
            if event.kind == "lost":
                self.server.holds(event.client, -1)
                self.ledger.add("holds", t=self.t, client=event.client, version=-1)

    def _expire(self) -> None:
        """Jobs past their deadline, and those of sites that have not come back: not waited for any more."""
        for client in [c for c, until in self.away.items() if self.t >= until]:
            del self.away[client]
            self._drop(client, "offline")
        for out in list(self.out.values()):
            job = out.job
            if job.deadline is None or out.abandoned or self.t < out.asked + job.deadline:
                continue
            out.abandoned = True
            self._note_lost(job, "deadline", late=out.sent is not None or None)
            if out.sent is None:
                self.server.lost(job)
                self.ways[job.client].waiting.remove(job.id)
                self._lose(job.id, "deadline")
            else:
                self.server.late(job)

    # --- saving -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything between two events."""
        return saving.state(self)

    def saved(self) -> None:
        """A checkpoint of the state as it is now is on disk: what only an older one needed can go."""
        for path in self._spent:
            path.unlink(missing_ok=True)
        self._spent = []

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become the deployment that `state_dict` described. Nobody is there until he joins again, and jobs that were
        out still are: their sites may have done them."""
        saving.load(self, saved)

    def upload(self, job: int) -> Path:
        return self.inbox / f"{job}.hkt"

    def told(self, job: int) -> Path:
        return self.inbox / f"{job}.json"
