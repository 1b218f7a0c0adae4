"""The server: a deterministic state machine that does no I/O and reads no clock.

    poll() -> jobs              whom to ask now, and what to ship to them
    computed(job)               that client has the job's payload for certain
    receive(update) -> refusal  an update is here
    lost(job), late(job)        that update will not come; is not waited for any more, but its client may be at it
    joined(c), left(c)          a client can or cannot be asked
    step() -> record            the next aggregation, if the schedule is ready for it

Engines own time and transport. Everything the server knows is in `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hocket.combine import against, difference
from hocket.errors import RecipeError, WireError
from hocket.methods import Client, Job, Method, State, Update
from hocket.schedules import Schedule
from hocket.tree import Tree, generator, held


class Server:
    """Method and schedule at work on one state.

    Args:
        method, schedule: frozen values; all state is here.
        params: the trainable view of the start model; not copied, never written into.
        clients: everybody who may ever be asked.
        turns: number of aggregations in the run.
        seed: the run's seed.
        preloaded: clients hold the start model already (a hub's weights and a seeded adapter), so that version 0 costs
            no bytes; otherwise a client's first download is the whole view.

    Raises:
        RecipeError: the method cannot run under the schedule.
    """

    def __init__(
        self, method: Method, schedule: Schedule, params: Tree, clients: Sequence[Client], turns: int, seed: int,
        preloaded: bool = True,
    ) -> None:  # fmt: skip
        if reason := schedule.refuses(method):
            raise RecipeError(reason)
        self.method, self.schedule, self.seed = method, schedule, seed
        self.turns = method.prelude + turns
        self.clients = {c.id: c for c in clients}
        self.preloaded = preloaded
        self.state: State = method.init(params, seed)
        self.version = 0
        self.next_id = 0
        self.buffer: list[Update] = []
        self.outstanding: dict[int, Job] = {}  # asked and neither arrived nor lost, without payloads
        self.rounds: dict[int, dict[str, Any]] = {}  # the schedule's notes, a record a turn
        self.notes: dict[str, Any] = {}  # its other notes: tensors and plain data
        self.kept: list[Update] = []  # updates that it needs again, oldest first
        self.versions: dict[int, Tree] = {}  # views of past versions that something still refers to
        self.heard: dict[int, int] = {}  # the visit of each client's last accepted update
        self.at_work: dict[int, set[int]] = {}  # ids of `outstanding` by client
        self.overdue: dict[int, int] = {}  # the job a client may still be at though it is not waited for
        self.silence = 0  # jobs lost or refused since the last accepted update
        self.online: set[int] = set(self.clients)
        self.visits: dict[int, int] = {}
        self.held: dict[int, int] = {}  # version each client holds once all its downloads are in
        self.confirmed: dict[int, int] = {}  # version each client holds for certain
        self.changed: dict[str, int] = {}  # version in which each tensor of the state last changed, if ever

    # --- asking -------------------------------------------------------------------------------------------------
    def sample(self, pool: Sequence[int], n: int, *salt: int | str) -> list[int]:
        """`n` of `pool` without replacement, keyed by the run's seed and `salt`."""
        order = torch.randperm(len(pool), generator=generator(self.seed, "sample", *salt))
        return [pool[i] for i in order[: max(n, 0)].tolist()]

    def arrived(self, turn: int) -> set[int]:
        """Clients whose update for `turn` waits in the buffer."""
        return {u.client for u in self.buffer if u.turn == turn}

    @property
    def finished(self) -> bool:
        """Whether every aggregation has been made."""
        return self.version >= self.turns

    def poll(self) -> list[Job]:
        """The jobs to send now. Call it after every change; it is cheap when there is nothing to ask."""
        return [] if self.finished else [self._ask(c, turn) for c, turn in self.schedule.at(self).wants(self)]

    def _ask(self, client: int, turn: int) -> Job:
        since = self.held.get(client, 0 if self.preloaded else -1)
        payload = self._ship(client, since)
        visit = self.visits.get(client, 0)
        own: tuple[int, ...] = ()
        if self.schedule.ahead:
            turns = {j.turn for j in self._jobs(client)}
            turns |= {u.turn for u in self.buffer if u.client == client}
            own = tuple(sorted(t for t in turns if self.version <= t < turn))
        heard, patience = self.heard.get(client, -1), self.schedule.at(self).patience
        follows = max([heard, *(j.visit for j in self._jobs(client))])
        job = Job(self.next_id, client, self.version, turn, visit, {}, since, patience, own, heard, follows)
        if self.anchored:
            self.versions[self.version] = self.state["params"]
        self.next_id += 1
        self.visits[client] = visit + 1
        self.held[client] = self.version
        self.outstanding[job.id] = job
        self.at_work.setdefault(client, set()).add(job.id)
        if (r := self.rounds.get(turn)) is not None:
            r["asked"][client] = r["asked"].get(client, 0) + 1
            r["open"] += 1
        return replace(job, payload=payload)

    def _ship(self, client: int, since: int) -> Tree:
        return self.method.ship(self.state, self.clients[client], self.version, since, self.changed)

    def whole(self, client: int) -> Tree:
        """What a client that holds nothing would be sent now."""
        return self._ship(client, -1)

    def latest(self, job: Job) -> Tree | None:
        """What the job's client would have been sent had it held the version before; the rest of its payload is
        catching up. None if it did hold that version, or nothing yet. Ask right after `poll`."""
        since = job.version - 1
        behind = job.since is not None and 0 <= job.since < since and not self.method.rebuilds
        return self._ship(job.client, since) if behind else None

    # --- hearing ------------------------------------------------------------------------------------------------
    def computed(self, job: Job) -> None:
        """The client has done the job, so it holds the job's payload."""
        self.confirmed[job.client] = max(job.version, self.confirmed.get(job.client, -1))
        self._free(job)

    def late(self, job: Job) -> None:
        """The job's update is not waited for any more, but its client may still be at it."""
        self.lost(job)
        self.overdue[job.client] = job.id

    def _free(self, job: Job) -> None:
        if self.overdue.get(job.client) == job.id:
            del self.overdue[job.client]

    def lost(self, job: Job) -> None:
        """The job's update will not come."""
        self._free(job)
        if self._settle(job.id) is not None:
            self.silence += 1
            self._prune()
            # what is not certain is sent again: a diff against an older version is never wrong, only larger
            self.held[job.client] = self.confirmed.get(job.client, 0 if self.preloaded else -1)

    def receive(self, update: Update) -> str | None:
        """Take an update in; None, or why it is refused (late, foreign, unusable). A refused one changes no
        model and nobody waits for its job any more."""
        job = self.outstanding.get(update.job)
        if job is None:
            return "late: not waited for any more"
        if (update.client, update.version, update.turn) != (job.client, job.version, job.turn):
            return "rejected: it names another client, version or turn than its job"
        reason = self._unusable(update)
        read = None if reason else self._read(update)  # if it raises, nothing has changed
        self._settle(job.id)
        if read is None:
            self.silence += 1
            self._prune()
            return reason
        self.silence = 0
        self.heard[job.client] = max(job.visit, self.heard.get(job.client, -1))
        self.buffer.append(read)
        if (r := self.rounds.get(update.turn)) is not None:
            r["arrived"] += 1
        return None

    def _unusable(self, update: Update) -> str | None:
        if reason := self.schedule.at(self).late(self, update):
            return f"late: {reason}"
        if not 0 < update.weight < float("inf"):
            return f"rejected: weight {update.weight}"
        try:
            known = replace(update, traits=self.clients[update.client].traits)
            reason = self.method.check(self.state, known)
        except WireError as error:
            reason = str(error)
        return f"rejected: {reason}" if reason else None

    @property
    def anchored(self) -> bool:
        """Whether the versions that clients started from are kept."""
        return self.schedule.anchored or self.method.anchored

    def _read(self, update: Update) -> Update:
        then = self.versions[update.version] if self.method.anchored else self.state["params"]
        return replace(update, payload=self.method.accept(then, update.payload))

    def joined(self, client: int) -> None:
        """The client can be asked from now on."""
        self.online.add(client)

    def holds(self, client: int, version: int) -> None:
        """The client says which version it holds; below 0, or one that there is not: nothing."""
        self.held[client] = self.confirmed[client] = version if 0 <= version <= self.version else -1

    def left(self, client: int) -> list[Job]:
        """The client cannot be reached any more; its open jobs, which the engine should report lost."""
        self.online.discard(client)
        self.overdue.pop(client, None)
        return self._jobs(client)

    def _jobs(self, client: int) -> list[Job]:
        """The client's open jobs."""
        return [self.outstanding[i] for i in sorted(self.at_work.get(client, ()))]

    def _settle(self, job: int) -> Job | None:
        settled = self.outstanding.pop(job, None)
        if settled is not None:
            self.at_work[settled.client].discard(job)
            if not self.at_work[settled.client]:
                del self.at_work[settled.client]
        if settled and (r := self.rounds.get(settled.turn)) is not None:
            r["open"] -= 1
        return settled

    # --- stepping -----------------------------------------------------------------------------------------------
    def step(self) -> dict[str, Any] | None:
        """Aggregate once if the schedule is ready; what the step was made of, or None. Call until it gives None.

        Its `jobs` are those whose updates are not needed any more.
        """
        schedule = self.schedule.at(self)
        if self.finished or not schedule.ready(self):
            return None
        batch = schedule.takes(self)
        taken = {u.job for u in batch}
        staleness = [self.version - u.version for u in batch]
        terms, read = schedule.terms(self, batch), (*self.kept, *self.buffer)
        holding = {  # past versions, kept updates, bytes of tensors, bytes of packets that an engine may have on disk
            "versions": sum(1 for v in self.versions if v != self.version), "kept": len(self.kept),
            "memory": held(self.state, self.notes, self.versions), "packets": sum(u.bytes for u in read),
        }  # fmt: skip
        before, method = self.state, self.method.at(schedule.rate(self, batch))
        summed = [t.update for t in terms], [t.weight for t in terms], [t.share for t in terms]
        self.state = method.step(before, *summed)
        layers = method.layers(before, *summed, self.state)
        self.version += 1
        for k, v in self.state["params"].items():
            if v is not before["params"].get(k):
                self.changed[k] = self.version
        self.buffer = [u for u in self.buffer if u.job not in taken]
        self.rounds = {t: r for t, r in self.rounds.items() if t >= self.version}
        known = taken | {u.job for u in self.kept}
        self.kept = schedule.remember(self, batch)
        self.versions[self.version] = self.state["params"]
        self._prune()
        losses = [(u.metrics["loss"], u.weight) for u in batch if "loss" in u.metrics]
        total = sum(w for _, w in losses)
        return {
            "version": self.version,
            "jobs": sorted(known - {u.job for u in self.kept}),
            "updates": len(batch),
            "weight": sum(t.weight for t in terms),
            "staleness": sum(staleness) / len(staleness),
            "stalest": max(staleness),
            "loss": sum(x * w for x, w in losses) / total if total else None,
            **holding,
            **({"layers": layers} if layers else {}),
        }

    def against(self, update: Update) -> Update:
        """The update as a whole model's difference to the current one, for the tensors it moves."""
        delta, model = self.method.effect(update.payload), self.method.model
        return replace(
            update, payload=against(delta, model(self.versions[update.version]), model(self.state["params"]))
        )

    def difference(self, names: Iterable[str], version: int) -> Mapping[str, Tensor]:
        """theta_version - theta_now of these tensors, each when it is asked for."""
        return difference(self.method.model(self.versions[version]), self.model, names)

    @property
    def model(self) -> Mapping[str, Tensor]:
        """The tensors of which effects are differences, as they are now."""
        return self.method.model(self.state["params"])

    def _prune(self) -> None:
        """Forget versions that nothing refers to."""
        if self.anchored:
            wanted = {j.version for j in self.outstanding.values()} | {u.version for u in (*self.buffer, *self.kept)}
            wanted |= {self.version} | self.schedule.pins(self)
            self.versions = {v: tree for v, tree in self.versions.items() if v in wanted}
        else:
            self.versions = {}

    @property
    def standstill(self) -> str:
        """Why nothing goes on any more, if so, and what to do about it."""
        r = self.rounds.get(self.version, {})
        asked = sum(r["asked"].values()) if r else self.next_id
        arrived = r.get("arrived", len(self.buffer))
        return (
            f"turn {self.version}: {asked} jobs asked, {arrived} updates arrived, {self.silence} lost or refused "
            f"since one last counted, {len(self.online)} of {len(self.clients)} clients online, nobody left to ask: "
            f"lower what the schedule waits for, raise its deadline, or mend the clients' loss and online settings"
        )

    # --- saving -------------------------------------------------------------------------------------------------
    PLAIN = (
        "version", "next_id", "rounds", "notes", "versions", "visits", "heard", "held", "confirmed", "changed",
        "overdue", "silence",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything but method, schedule and the buffered payloads, which the engine keeps by job."""
        return {
            "state": self.state,
            "online": sorted(self.online),
            "outstanding": [vars(j) for j in self.outstanding.values()],
            **{
                name: [{k: v for k, v in vars(u).items() if k != "payload"} for u in updates]
                for name, updates in (("buffer", self.buffer), ("kept", self.kept))
            },
            **{k: getattr(self, k) for k in self.PLAIN},
        }

    def load_state_dict(self, saved: dict[str, Any], payload: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Become the server that `state_dict` described; `payload(job)` gives back a buffered update's payload."""
        for k in self.PLAIN:
            setattr(self, k, saved[k])
        self.state = saved["state"]
        self.online = set(saved["online"])
        self.outstanding = {j["id"]: Job(**{**j, "own": tuple(j["own"])}) for j in saved["outstanding"]}
        self.at_work = {}
        for job in self.outstanding.values():
            self.at_work.setdefault(job.client, set()).add(job.id)
        self.buffer, self.kept = (
            [self._read(Update(**u, payload=payload(u["job"]))) for u in saved[name]] for name in ("buffer", "kept")
        )
