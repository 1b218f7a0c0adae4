"""The engine on the virtual clock: one process for all machines.

Each client has three serial lanes (down, compute, up). All arrivals of one instant are heard before the server steps,
and it steps before anyone is asked again. `state_dict` after any event resumes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hocket import wire
from hocket.client import beside_bytes
from hocket.clock import Clock, Device, Lane
from hocket.codecs import Codec
from hocket.downlink import make_downlink
from hocket.errors import Interrupted, RunError
from hocket.evaluations import Evaluations
from hocket.executors import Executor, Task
from hocket.flight import Flight, dump, requeue, restore
from hocket.ledger import Ledger
from hocket.methods import Job, Update
from hocket.server import Server
from hocket.store import Spool
from hocket.tree import Tree, generator

PATIENCE = 1000  # joins and leaves without anybody to ask before a run is called stuck


class Simulation:
    """A run on the virtual clock.

    Args:
        server: the same object that a deployment runs.
        devices, steps: one per client: machine and link, and local steps a job (these give its time).
        down, up: codecs of the two directions.
        executor: where clients really compute.
        ledger, spool: the record, and the place of packets in flight.
        evaluate: metrics of the exported view, or None; called at version 0 (unless `evaluate_start` is false), every
            `evaluate_every` versions or `evaluate_seconds` seconds if that is given, and last.
        on_event: called after every event, when the state may be saved; may raise `Interrupted`.
        seconds: virtual time after which the run ends even if the server has not finished; None: no limit.
        evaluate_clients: metrics of clients' own models (see `Evaluations`).
        catch_up: whether what a client missed before the last version costs time and counts as moved; it is written
            down either way.
    """

    def __init__(
        self, server: Server, devices: Sequence[Device], steps: Sequence[int], down: Codec, up: Codec,
        executor: Executor, ledger: Ledger | None = None, spool: Spool | None = None,
        evaluate: Callable[[Tree], dict[str, Any]] | None = None, evaluate_every: int = 1, evaluate_start: bool = True,
        on_event: Callable[[], None] = lambda: None, catch_up: bool = True, seconds: float | None = None,
        evaluate_seconds: float | None = None,
        evaluate_clients: Callable[[Callable[[int], Tree]], dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.server, self.devices, self.steps = server, devices, steps
        self.ledger, self.spool = ledger or Ledger(), spool or Spool()
        self.up, self.executor = up, executor
        self.evaluations = Evaluations(
            evaluate, server, self.ledger, evaluate_every, evaluate_seconds, evaluate_clients, self._remembered,
            seconds, evaluate_start,
        )  # fmt: skip
        self.on_event, self.catch_up = on_event, catch_up
        self.clock = Clock()
        self.flights: dict[int, Flight] = {}
        self.downlink = make_downlink(down, server, self.spool, self.flights)
        self.queues: dict[int, list[int]] = {}  # each client's jobs not yet computed, in order
        self.memory: dict[int, str] = {}  # where in the spool each client's private tensors are
        self.quiet = 0  # joins and leaves since anybody was asked
        self.events = 0
        self.begun = self.finished = False

    # --- the loop -----------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Go on until the server has finished.

        Raises:
            RunError: nobody is left to ask and nothing is under way.
            Interrupted: `on_event`, training or evaluation was asked to stop; the state is consistent and can be saved.
        """
        if not self.begun:
            self._begin()
        while True:
            if not self.clock or self.clock.peek() > self.clock.now:
                self._settle()
                if self.server.finished or not self._time_left():
                    break
            lonely = not self.flights and self.quiet > PATIENCE + 4 * len(self.devices)
            if lonely or not self.clock:
                raise RunError(f"stuck at second {self.clock.now:g}: {self.server.standstill}")
            kind, key = self.clock.pop()
            try:
                getattr(self, f"_on_{kind}")(key)
            except Interrupted:
                self.clock.unpop(kind, key)
                raise
            self.events += 1
            self.on_event()
        while self.flights:
            self._end_lanes(self.flights.pop(next(iter(self.flights))))
        self.ledger.add("end", t=self.clock.now, version=self.server.version)
        self.finished = True

    def _begin(self) -> None:
        self.begun = True
        for c, device in enumerate(self.devices):
            if not device.reachable(0.0):
                self.server.left(c)
            if change := device.next_change(0.0):
                self.clock.schedule(change[0], "join" if change[1] else "leave", c)

    def _time_left(self) -> bool:
        """Evaluate what comes before the next event; whether that event comes before the run's end."""
        following = self.clock.peek() if self.clock else self.clock.now
        over = self.evaluations.until(following)
        if over is not None:
            self.clock.now = over
        return over is None

    def _settle(self) -> None:
        """Everything of this instant has been heard: evaluate, step, ask."""
        while True:
            self.evaluations.settle(self.clock.now)
            record = self.server.step()
            if record is None:
                break
            for job in record.pop("jobs"):
                self.spool.drop(f"up/{job}")
            self.ledger.add("step", t=self.clock.now, **record, **self.ledger.bytes)
            self.evaluations.stepped()
        for job in self.server.poll():
            self._send(job)
            self.quiet = 0

    # --- asking -------------------------------------------------------------------------------------------------
    def _send(self, job: Job) -> None:
        device = self.devices[job.client]
        download = self.downlink.send(job, self.server)
        size = download.bytes - (0 if self.catch_up else download.catch_up)
        lane: Lane = "down" if device.duplex else "link"
        start, end = self.clock.occupy(job.client, lane, self.clock.now, device.down_seconds(size))
        seconds = self.steps[job.client] * device.step_seconds
        compute = self.clock.occupy(job.client, "compute", end + device.latency, seconds)
        draw = generator(self.server.seed, "loss", job.id)
        doomed = device.loss > 0 and bool(torch.rand((), generator=draw) < device.loss)
        self.flights[job.id] = Flight(
            replace(job, payload={}), download.view, size, download.catch_up, (start, end), compute,
            doomed, key=download.key, beside=beside_bytes(self.server.method, self.downlink.codec, job.payload),
        )  # fmt: skip
        self.clock.schedule(compute[1], "computed", job.id)
        if job.deadline is not None:
            self.clock.schedule(self.clock.now + job.deadline, "deadline", job.id)
        queue = self.queues.setdefault(job.client, [])
        queue.append(job.id)
        if len(queue) == 1:
            self._submit(job.client)

    def _submit(self, client: int) -> None:
        """Hand the client's next job to the executor; its memory is known now that the job before is done."""
        flight = self.flights[self.queues[client][0]]
        if flight.doomed:
            return
        view = dict(self.spool.get(flight.key)) if flight.key else flight.view
        assert view is not None  # kept until the job is computed
        memory = self.spool.get(self.memory[client]) if client in self.memory else None
        info = self.server.clients[client]
        self.executor.submit(Task(flight.job, view, memory, info.rows, info.traits, flight.compute[1]))

    def _remembered(self, client: int) -> Mapping[str, Tensor]:
        return self.spool.get(self.memory[client]) if client in self.memory else {}

    # --- hearing ------------------------------------------------------------------------------------------------
    def _on_computed(self, key: int) -> None:
        flight = self.flights.get(key)
        if flight is None or flight.up or self.clock.now != flight.compute[1]:  # gone, done, or at another time
            return
        client, device = flight.job.client, self.devices[flight.job.client]
        if flight.doomed:
            self._next(client)
            flight.view = None
            self.clock.schedule(self.clock.now + device.detect, "crashed", key)
            return
        result = self.executor.result(key)
        if result.memory or client in self.memory:
            if client in self.memory:
                self.spool.drop(self.memory[client])
            self.memory[client] = f"memory/{client}/{flight.job.id}"
            self.spool.put(self.memory[client], wire.pack(result.memory))
        self.spool.put(f"up/{key}", result.blob)
        flight.view, flight.up_bytes = None, result.size
        flight.weight, flight.metrics, flight.raw = result.weight, result.metrics, result.raw
        flight.up_beside = result.beside
        flight.encode = result.flops / (device.gflops * 1e9)
        end = self.clock.now + flight.encode
        if flight.encode:  # the processor is busy with it
            flight.compute = flight.compute[0], end
            self._requeue(client, self.queues[client][1:], end)
        self.server.computed(flight.job)
        lane: Lane = "up" if device.duplex else "link"
        flight.up = self.clock.occupy(client, lane, end, device.up_seconds(result.size))
        self.clock.schedule(flight.up[1] + device.latency, "arrived", key)
        self._next(client)

    def _next(self, client: int) -> None:
        self.queues[client].pop(0)
        if self.queues[client]:
            self._submit(client)

    def _on_arrived(self, key: int) -> None:
        flight = self.flights.pop(key, None)
        if flight is None:
            return
        self._end_lanes(flight)
        job = flight.job
        refused: str | None = "late"
        if not flight.abandoned:
            payload = self.up.decode(self.spool.get(f"up/{key}"))
            update = Update(job.id, job.client, job.version, job.turn, payload, flight.weight, flight.metrics or {})
            refused = self.server.receive(replace(update, bytes=flight.up_bytes))
            if refused:
                self.server.lost(job)
                self._lost(job, refused)
        if refused:
            self.spool.drop(f"up/{key}")

    def _on_crashed(self, key: int) -> None:
        if (flight := self.flights.pop(key, None)) is not None:
            self._end_lanes(flight)
            self.server.lost(flight.job)
            if not flight.abandoned:
                self._lost(flight.job, "injected")

    def _on_deadline(self, key: int) -> None:
        flight = self.flights.get(key)
        if flight is not None and not flight.abandoned:
            flight.abandoned = True
            self._lost(flight.job, "deadline")
            if key in self.queues.get(flight.job.client, [])[1:]:
                self.server.lost(flight.job)
                self._cancel(key)
            else:
                self.server.late(flight.job)

    def _cancel(self, key: int) -> None:
        """Drop a job that its client has not begun: nobody wants it, and those behind it start the sooner."""
        flight = self.flights.pop(key)
        self._end_lanes(flight)
        client = flight.job.client
        queue = self.queues[client]
        at = queue.index(key)
        queue.remove(key)
        self._requeue(client, queue[at:], self.flights[queue[at - 1]].compute[1])

    def _requeue(self, client: int, keys: Sequence[int], end: float) -> None:
        requeue(self.clock, [self.flights[k] for k in keys], self.devices[client].latency, client, end)

    def _on_join(self, client: int) -> None:
        self.server.joined(client)
        self._availability(client, "join")

    def _on_leave(self, client: int) -> None:
        self.server.left(client)
        for key in [k for k, f in self.flights.items() if f.job.client == client]:
            flight = self.flights.pop(key)
            self._end_lanes(flight)
            self.executor.forget(key)
            if flight.up is not None:
                self.spool.drop(f"up/{key}")
            if not flight.abandoned:
                self.server.lost(flight.job)
                self._lost(flight.job, "offline")
        self.queues.pop(client, None)
        self.clock.release(client)
        self._availability(client, "leave")

    def _availability(self, client: int, what: str) -> None:
        self.quiet += 1
        self.ledger.add(what, t=self.clock.now, client=client)
        if change := self.devices[client].next_change(self.clock.now):
            self.clock.schedule(change[0], "join" if change[1] else "leave", client)

    # --- writing down -------------------------------------------------------------------------------------------
    def _end_lanes(self, flight: Flight) -> None:
        """Record what this job used of its client's lanes until now."""
        for what, row in flight.uses(self.clock.now):
            self.ledger.add(what, **row)

    def _lost(self, job: Job, reason: str) -> None:
        self.ledger.add("lost", t=self.clock.now, client=job.client, job=job.id, turn=job.turn, reason=reason)

    # --- saving -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything between two events."""
        return {
            "server": self.server.state_dict(),
            "clock": self.clock.state_dict(),
            "flights": dump(self.flights.values()),
            "queues": self.queues,
            "memory": self.memory,
            "downlink": self.downlink.state_dict(),
            "quiet": self.quiet,
            "evaluations": self.evaluations.state_dict(),
            "events": self.events,
            "begun": self.begun,
            "ledger": self.ledger.state_dict(),
            "spool": self.spool.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become the simulation that `state_dict` described and hand its open jobs to the executor again."""
        self.spool.load_state_dict(saved["spool"])
        self.ledger.load_totals(saved["ledger"])
        self.server.load_state_dict(saved["server"], lambda job: self.up.decode(self.spool.get(f"up/{job}")))
        self.clock.load_state_dict(saved["clock"])
        self.flights.clear()
        self.flights.update(restore(saved["flights"]))
        self.queues, self.memory = saved["queues"], saved["memory"]
        self.downlink.load_state_dict(saved["downlink"])
        self.quiet = saved["quiet"]
        self.evaluations.load_state_dict(saved["evaluations"])
        self.events, self.begun = saved["events"], saved["begun"]
        for client, queue in self.queues.items():
            if queue:
                self._submit(client)
