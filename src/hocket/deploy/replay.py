"""A deployed run once more, from its record: the same model, whatever the order in which things really happened.

The ledger has all that the server heard, in order: who joined and left (`join`, `leave`, `holds`), what was asked
(`ask`), what arrived (`up`, with a fingerprint of the packet and the job whose memory its site began with), what was
lost or refused (`lost`), and when it stepped. A fresh server is told the same in that order; its jobs are done again
by the sites' own code, with their rows, one after the other. No clock is read. The bits are those of the run on the
same kind of processor with the same number of torch threads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hocket import recipe as recipes
from hocket import store, wire
from hocket.codecs import Codec
from hocket.data.prepare import Prepared
from hocket.deploy import sites as described
from hocket.deploy.site import Lost, Site
from hocket.deploy.ways import fingerprint
from hocket.errors import HocketError, RunError, StoreError
from hocket.experiment import Experiment
from hocket.methods import Job, Update
from hocket.recipe import Recipe
from hocket.server import Server
from hocket.tree import digest

Row = dict[str, Any]
Opens = Callable[[int, Path], Site]
"""(client, folder) to a site of that client that was just started."""


class Replay:
    """A record, heard again.

    Args:
        server: at version 0.
        down, up: codecs of the two directions.
        opens: how a site is started.
        folder: for what sites keep.
        strict: whether a record that does not fit what is computed is an error.
    """

    def __init__(
        self, server: Server, down: Codec, up: Codec, opens: Opens, folder: Path, strict: bool = True
    ) -> None:  # fmt: skip
        self.server, self.down, self.up, self.opens, self.folder, self.strict = server, down, up, opens, folder, strict
        self.sites: dict[int, Site] = {}
        self.jobs: dict[int, Job] = {}  # by the record's id, with payloads, until a later one of their client is done
        self.polled: list[Job] = []  # asked by the server, not yet found in the record
        self.abandoned: set[int] = set()
        self.last: dict[int, int | None] = {}  # the job whose memory each client has
        self.before: dict[int, Site] = {}  # clients' sites until they were last started anew
        self.blank: dict[int, int] = {}  # how often a client began without memory

    def run(self, rows: Sequence[Row]) -> None:
        """Hear all rows.

        Raises:
            RunError: what is computed is not what was recorded, or the record lacks what this needs.
        """
        if not rows or not any(r["what"] == "begin" for r in rows):
            raise RunError("this ledger is no record of a deployed run, or one of an older hocket: it lacks `begin`")
        try:
            at = 0
            while at < len(rows):
                row, following = rows[at], rows[at + 1] if at + 1 < len(rows) else {}
                refused = row["what"] == "up" and following.get("what") == "lost" and following["job"] == row["job"]
                if row["what"] == "up":
                    self._up(row, refused)
                elif (hear := getattr(self, f"_{row['what']}", None)) is not None:
                    hear(row)
                at += 2 if refused else 1
        except KeyError as error:
            raise RunError(f"line {at + 1} of the ledger cannot be replayed: {error} is missing") from error
        finally:
            for site in self.sites.values():
                site.close()

    # --- what the server heard ------------------------------------------------------------------------------------
    def _begin(self, row: Row) -> None:
        for c in self.server.clients:
            self.server.left(c)

    def _join(self, row: Row) -> None:
        c, version = row["client"], row["version"]
        self.server.clients[c] = replace(self.server.clients[c], rows=row["rows"])
        if c not in self.sites or 0 <= version < self.sites[c].version or version < 0:
            self._start(c)
        else:
            self._bring(c, version)
        self.server.holds(c, version if row.get("held") is None else row["held"])
        self.server.joined(c)

    def _leave(self, row: Row) -> None:
        self.server.left(row["client"])

    def _holds(self, row: Row) -> None:
        """A site has lost what it held: those of its jobs that are of the version in force were made whole."""
        c = row["client"]
        for name, job in self.jobs.items():
            if job.client == c and job.version == self.server.version:
                self.jobs[name] = replace(job, since=-1, payload=self.server.whole(c))
        self.server.holds(c, row["version"])

    def _ask(self, row: Row) -> None:
        self.polled = self.polled or self.server.poll()
        job = next((j for j in self.polled if j.client == row["client"]), None)
        if job is None:
            raise RunError(f"the record asks client {row['client']} for job {row['job']}, and the server did not")
        self.polled.remove(job)
        self._same(f"job {row['job']}", row, {"job": job.id, "turn": job.turn, "version": job.version})
        self.jobs[row["job"]] = job

    def _lost(self, row: Row) -> None:
        job = self.jobs[row["job"]]
        if row.get("late"):
            self.abandoned.add(row["job"])
            self.server.late(job)
        else:
            self.server.lost(job)

    def _up(self, row: Row, refused: bool) -> None:
        job = self.jobs[row["job"]]
        told, packet = self._again(row, job)
        self.server.computed(job)
        if row["job"] in self.abandoned:
            return
        update = Update(job.id, job.client, job.version, job.turn, {}, 0.0, bytes=packet.stat().st_size)
        if refused:  # for what reason does not matter: an update without weight is refused to the same effect
            self.server.receive(update)
            self.server.lost(job)
            return
        self._same(f"the update of job {row['job']}", row, {"digest": fingerprint(packet)})
        payload = self.up.decode(wire.Packet(packet.replace(self._upload(job.id))))  # read when it is needed
        reason = self.server.receive(
            replace(update, payload=payload, weight=told["weight"], metrics=dict(told["metrics"]))
        )
        if reason and self.strict:
            raise RunError(f"the update of job {row['job']} was taken in, and is refused now: {reason}")

    def _step(self, row: Row) -> None:
        made = self.server.step()
        if made is None:
            raise RunError(f"the record has a step to version {row['version']} that the server does not make")
        for job in made["jobs"]:
            self._upload(job).unlink(missing_ok=True)
        self._same("a step", row, {k: made[k] for k in ("version", "updates", "staleness")})

    def _upload(self, job: int) -> Path:
        return self.folder / f"up-{job}.hkt"

    # --- what sites did -------------------------------------------------------------------------------------------
    def _start(self, client: int, blank: bool = False) -> None:
        """A site that was started; with `blank`, it remembers nothing."""
        if client in self.sites:
            self.sites[client].close()
            self.before[client] = self.sites[client]
        if blank:
            self.blank[client], self.last[client] = self.blank.get(client, 0) + 1, None
        self.sites[client] = self.opens(client, self.folder / f"site-{client}-{self.blank.get(client, 0)}")

    def _again(self, row: Row, job: Job) -> tuple[Row, Path]:
        """Do a job from where its site began with it."""
        client, after = job.client, row.get("after")
        if self.last.get(client) != after:
            if after is None:
                self._start(client, blank=True)
            elif after in self.jobs and self.jobs[after].client == client:
                self._work(after, self.jobs[after])  # its update was lost, but not what it left behind
            elif self.strict:
                raise RunError(f"job {row['job']} began with what job {after} had left, of which the record knows not")
        done = self._work(row["job"], job)
        self.jobs = {i: j for i, j in self.jobs.items() if j.client != client or j.visit > job.visit}
        return done

    def _work(self, name: int, job: Job) -> tuple[Row, Path]:
        site = self.sites[job.client]
        blob = self.down.encode(job.payload)
        try:
            site.take(job, blob)
        except Lost:
            self._bring(job.client, job.since or 0, job.visit)
            if site.version < (job.since or 0) and job.client in self.before:  # it was done before the site was
                site.adopt(self.before[job.client])  # started anew, and answered from its disk
            site.take(job, blob)
        done = site.answer(job.id)
        assert done is not None  # it was waited for
        if (before := self.last.get(job.client)) is not None and before != job.id:
            site.forget(before)
        self.last[job.client] = name
        return done

    def _bring(self, client: int, version: int, visit: int | None = None) -> None:
        """Let a site have what it must have been sent to hold `version`: jobs that were lost after they had come."""
        lost = [(i, j) for i, j in self.jobs.items() if j.client == client and (visit is None or j.visit < visit)]
        for name, job in sorted(lost, key=lambda x: x[1].visit):
            if self.sites[client].version >= version:
                return
            try:
                self._work(name, job)
            except Lost:
                return
            except HocketError:  # it failed then, too
                continue

    def _same(self, what: str, row: Row, found: Row) -> None:
        odd = {k: (row[k], v) for k, v in found.items() if row[k] != v} if self.strict else {}
        if odd:
            told = "; ".join(f"{k} was {a}, is {b}" for k, (a, b) in odd.items())
            raise RunError(f"{what} is not the one recorded: {told}")


@dataclass(frozen=True)
class Outcome:
    """A replay beside its run: the last version, and the hashes of its tensors as recorded and as replayed."""

    version: int
    recorded: str
    replayed: str


def read(ledger: Path, position: int) -> Iterator[Row]:
    """The rows of a ledger up to a checkpoint's place in it."""
    yield from map(json.loads, ledger.read_bytes()[:position].splitlines())


def replay(run: Path, files: Sequence[Path]) -> Outcome:
    """Replay a run's folder up to its newest checkpoint.

    Args:
        files: the `site.toml` of every site, with its rows in reach.

    Raises:
        HocketError: bad input, a site is missing, or what is computed is not what was recorded.
    """
    if not (run / "recipe.toml").exists():
        raise StoreError(f"'{run}' holds no run: recipe.toml is missing")
    recipe = recipes.load(run / "recipe.toml")
    saved, _ = store.load(run / "checkpoint", recipe.hash)
    own = {str(s["name"]): (s, f.parent) for s, f in ((described.read(f), f) for f in files)}
    if missing := [n for n in recipe.deployment.sites if n not in own]:
        raise StoreError(f"site files of {', '.join(missing)} are missing; every site's rows are needed for a replay")
    experiment = Experiment(recipe, prepare=lambda r, tokenizer: _rows(r, tokenizer, own))
    server, start, setting = experiment.server(), experiment.trainer.start(), experiment.setting()
    clients = dict(server.clients)

    def opens(client: int, folder: Path) -> Site:
        return Site(setting, start, experiment.down, clients[client], folder, recipe.clients.preloaded)

    with tempfile.TemporaryDirectory() as folder:
        again = Replay(server, experiment.down, experiment.up, opens, Path(folder))
        again.run(list(read(run / "ledger.jsonl", saved["engine"]["ledger"]["position"])))
    recorded = saved["engine"]["server"]
    if server.version != recorded["version"]:
        raise RunError(f"the run's checkpoint is of version {recorded['version']}, the replay ends at {server.version}")
    return Outcome(server.version, digest(recorded["state"]["params"]), digest(server.state["params"]))


def _rows(recipe: Recipe, tokenizer: Any, own: dict[str, tuple[Row, Path]]) -> Prepared:
    """Every site's rows as its worker prepares them."""
    parts = []
    for client, name in enumerate(recipe.deployment.sites):
        site, beside = own[name]
        parts.append(described.rows(recipe, tokenizer, client, site, described.place(site, beside)))
    clients = [part.clients[c] for c, part in enumerate(parts)]
    return replace(parts[0], clients=clients, names=recipe.deployment.sites, summary=[p.summary[0] for p in parts])
