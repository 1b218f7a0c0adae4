"""The engine on real machines, over a link within this process: threads for sites, files for packets."""

from __future__ import annotations

import json
import os
import queue
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from worlds import World, language, quadratic

from hocket import store, wire
from hocket.client import Setting
from hocket.deploy import client_app, courier
from hocket.deploy.engine import Deployment
from hocket.deploy.flower import FlowerLink
from hocket.deploy.messages import content, read
from hocket.deploy.nouns import Answered, Event, Failed, Joined, Left, Request, Taken
from hocket.deploy.site import Lost, Site, plain
from hocket.deploy.ways import Out, Way, due
from hocket.deploy.worker import Worker
from hocket.errors import HocketError, RunError
from hocket.evaluations import Evaluations
from hocket.ledger import Ledger
from hocket.methods import Job
from hocket.tree import digest


class Threads:
    """A link to sites in this process."""

    def __init__(self, sites: dict[int, Site], folder: Path) -> None:
        self.sites, self.folder = sites, folder
        self.events: queue.Queue[Event] = queue.Queue()
        for c, site in sites.items():
            self.events.put(Joined(c, {"version": site.version}))

    def send(self, request: Request) -> None:
        threading.Thread(target=self._talk, args=(request,), daemon=True).start()

    def _talk(self, r: Request) -> None:
        site = self.sites[r.client]
        try:
            site.forget(*r.forget)
            for ask in r.asks:
                site.take(ask.job, ask.packet)
            found = site.answer(r.answer, None if r.wait else 0.0)
            if found is None:
                self.events.put(Taken(r.client, r.id))
                return
            told, path = found
            copy = self.folder / f"came-{r.client}-{r.id}.hkt"
            shutil.copy(path, copy)
            self.events.put(Answered(r.client, r.answer, told, copy))
        except Lost as error:
            self.events.put(Failed(r.client, r.id, "lost", str(error)))
        except HocketError as error:
            self.events.put(Failed(r.client, r.id, "job", str(error)))

    def next(self, timeout: float | None) -> Event | None:
        try:
            return self.events.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None:
        for site in self.sites.values():
            site.close()


def worlds(meth: Any = None, **more: Any) -> World:
    if meth is None:
        return quadratic(clients=3, weights=[1, 2, 3], **{"turns": 5, **more})
    training = {"optimizer": "sgd"} if meth["name"].startswith("fedkseed") else {}
    return language(meth=meth, layers=2, steps=2, training=training, **{"turns": 3, **more})


def site(folder: Path, c: int, rows: int, where: Path | None = None, **more: Any) -> Site:
    w = worlds(**more)
    server, executor = w.simulation.server, w.simulation.executor
    setting: Setting = executor.setting  # type: ignore[attr-defined]
    start = server.state["params"]
    return Site(setting, start, w.simulation.downlink.codec, server.clients[c], where or folder / f"site{c}", server.preloaded)


def deploy(tmp: Path, **more: Any) -> tuple[Deployment, Threads]:
    w = worlds(**more)
    server = w.simulation.server
    sites = {c: site(tmp, c, i.rows, **more) for c, i in server.clients.items()}
    link, ledger = Threads(sites, tmp), Ledger(tmp / "ledger.jsonl")
    sim = w.simulation
    return Deployment(
        server, link, sim.downlink.codec, sim.up, tmp, ledger, Evaluations(None, server, ledger), ready=3
    ), link


@pytest.mark.parametrize("preloaded", [True, False])
@pytest.mark.parametrize("sched", ["sync", "overlap"])
def test_a_deployed_run_makes_the_model_of_the_simulated_one(tmp_path: Path, sched: str, preloaded: bool) -> None:
    simulated = worlds(sched=sched, preloaded=preloaded)
    simulated.simulation.run()
    deployed, link = deploy(tmp_path, sched=sched, preloaded=preloaded)
    deployed.run()
    link.close()
    assert digest(deployed.server.state["params"]) == digest(simulated.simulation.server.state["params"])


METHODS: list[Any] = [
    {"name": "fedbcd", "layers_per_block": 1}, {"name": "fedit", "rank": 2}, {"name": "flora", "rank": 2},
    {"name": "fedex-lora", "rank": 2}, {"name": "hlora-delta", "rank": 4}, {"name": "fedsa-lora", "rank": 2},
    {"name": "slora", "rank": 2, "sparse_turns": 1}, {"name": "fedkseed", "directions": 8}, {"name": "fedkseed-pro", "directions": 8},
    {"name": "ferret", "k": 64}, {"name": "fedkrso", "rank": 2, "subspaces": 2, "interval": 1}, {"name": "gradualdiff"},
    {"name": "spafl"},
]  # fmt: skip


@pytest.mark.parametrize("meth", METHODS, ids=lambda m: m["name"])
def test_every_kind_of_method_is_deployed_as_it_is_simulated(tmp_path: Path, meth: Any) -> None:
    """News, scalars, stacks, cuts and private tensors reach sites that hold no server's tensors."""
    more: dict[str, Any] = {"ranks": [1, 2, 4]} if meth["name"] == "hlora-delta" else {}
    simulated = worlds(meth, **more)
    simulated.simulation.run()
    deployed, link = deploy(tmp_path, meth=meth, **more)
    deployed.run()
    link.close()
    assert digest(deployed.server.state["params"]) == digest(simulated.simulation.server.state["params"])


@pytest.mark.parametrize("up", ["half", {"name": "feedback", "codec": "int8"}], ids=str)
def test_codecs_and_what_they_remember(tmp_path: Path, up: Any) -> None:
    more = {"up": up, "down": "half", "meth": {"name": "fedavg"}}
    simulated = worlds(**more)
    simulated.simulation.run()
    deployed, link = deploy(tmp_path, **more)
    deployed.run()
    link.close()
    assert digest(deployed.server.state["params"]) == digest(simulated.simulation.server.state["params"])


@pytest.mark.parametrize("sched", ["fedasync", "fedbuff", "fedfa", "ca2fl", "safa"])
def test_a_deployed_run_needs_no_order(tmp_path: Path, sched: str) -> None:
    deployed, link = deploy(tmp_path, sched=sched, meth={"name": "fedit", "rank": 2})
    deployed.run()
    link.close()
    assert deployed.server.finished
    assert all(torch.isfinite(v).all() for v in deployed.server.state["params"].values())


class Slow(Threads):
    """Every message takes a while, both ways."""

    def __init__(self, sites: dict[int, Site], folder: Path) -> None:
        super().__init__(sites, folder)
        self.sent: list[Request] = []
        later = self.events.put
        self.events.put = lambda event: threading.Timer(0.1, later, [event]).start()  # type: ignore

    def send(self, request: Request) -> None:
        self.sent.append(request)
        super().send(request)

    def _talk(self, r: Request) -> None:
        time.sleep(0.1)
        super()._talk(r)


def test_under_overlap_no_message_waits_while_another_job_may_be_asked(tmp_path: Path) -> None:
    """One that waited would be open when the next job comes, and keep it from a site that could have it by then."""
    simulated = worlds(sched="overlap")
    simulated.simulation.run()
    deployed, link = deploy(tmp_path, sched="overlap")
    deployed.link = slow = Slow(link.sites, tmp_path)
    for c, s in link.sites.items():
        s.setting.trainer.interrupted = lambda c=c: bool(time.sleep((0.02, 0.08, 0.12)[c]))  # type: ignore
    deployed.run()
    slow.close()
    assert digest(deployed.server.state["params"]) == digest(simulated.simulation.server.state["params"])
    brought = [r for r in slow.sent if r.asks and r.asks[-1].job.turn < 4]
    for r in brought:  # with one job there, the next turn's may come; with two, an update must go first
        assert r.wait == (len({a.job.id for a in r.asks} | {r.answer}) == 2), r
    assert any(not r.wait for r in brought)


def test_a_way_asks_for_an_update_when_it_is_due(tmp_path: Path) -> None:
    jobs = [Job(i, 0, 0, turn=i) for i in range(2)]
    outs, way = {j.id: Out(j, 0.0, 10) for j in jobs}, Way(waiting=[0], took=5.0)
    ask = lambda now, more: way.message(int(now), 0, outs, tmp_path, 99, now, more)
    first = ask(1.0, 1)
    assert first is not None
    assert (first.answer, first.wait, [a.job.id for a in first.asks]) == (0, False, [0])
    assert ask(2.0, 1) is None  # it is open
    way.taken(7)
    assert ask(2.0, 1) is None  # another was
    way.taken(1)
    assert ask(3.0, 1) is None  # nothing to bring, and the update is due at 6
    way.waiting = [1]
    second = ask(4.0, 0)
    assert second is not None
    assert (second.answer, second.wait, [a.job.id for a in second.asks]) == (0, True, [1])
    way.request, way.sent = None, [1]
    due(way, {k: {"start": a, "end": b} for k, (a, b) in {"down": (1, 2), "compute": (2, 8), "up": (8, 9)}.items()})
    assert (way.took, way.hold) == (6.0, 13.0)  # computed from 8 to 14, and a message is about a second on its way
    assert ask(12.9, 1) is None
    last = ask(13.0, 1)
    assert last is not None
    assert (last.asks, last.wait) == ((), True)


class Flaky(Threads):
    """A link that loses, repeats and spoils what passes, as it is told to."""

    def __init__(self, sites: dict[int, Site], folder: Path, fault: str) -> None:
        super().__init__(sites, folder)
        self.fault, self.done, self.turn = fault, False, 1

    def next(self, timeout: float | None) -> Event | None:
        event = super().next(timeout)
        if isinstance(event, Answered) and event.client == 1 and event.told["turn"] >= self.turn and not self.done:
            self.done = True
            if self.fault == "link":
                return Failed(1, self.last, "link", "the courier died")
            if self.fault == "lost":
                return Failed(1, self.last, "lost", "the worker was started anew")
            if self.fault == "twice":
                again = self.folder / "again.hkt"
                shutil.copy(event.packet, again)
                self.events.put(Answered(1, event.job, event.told, again))
            if self.fault == "damaged":
                event.packet.write_bytes(event.packet.read_bytes()[:-7])
            if self.fault == "nan":
                old = wire.Packet(event.packet.read_bytes())
                event.packet.write_bytes(wire.pack({k: v * float("nan") for k, v in old.items()}, old.meta))
            if self.fault == "weight":
                return Answered(1, event.job, {**event.told, "weight": "many"}, event.packet)
            if self.fault == "another job":
                return Answered(1, event.job, {**event.told, "version": 0}, event.packet)
            if self.fault == "leaves":
                self.events.put(Joined(1, {"version": -1}))
                return Left(1)
        return event

    def send(self, request: Request) -> None:
        if request.client == 1:
            self.last = request.id
        super().send(request)


LOST = {"damaged": "rejected", "nan": "not finite", "weight": "rejected"}


@pytest.mark.parametrize("fault", ["link", "twice", "lost", "leaves", *LOST])
def test_nothing_hangs_and_what_is_refused_is_written_down(tmp_path: Path, fault: str) -> None:
    simulated = worlds()
    simulated.simulation.run()
    deployed, link = deploy(tmp_path)
    deployed.link = flaky = Flaky(link.sites, tmp_path, fault)
    rows: list[dict[str, Any]] = []
    deployed.ledger.listener = rows.append
    deployed.run()
    flaky.close()
    assert flaky.done
    reasons = [r["reason"] for r in rows if r["what"] == "lost"]
    if fault in LOST:
        assert len(reasons) == 1
        assert LOST[fault] in reasons[0]
    else:
        assert not reasons
        assert digest(deployed.server.state["params"]) == digest(simulated.simulation.server.state["params"])
    ups = [r["job"] for r in rows if r["what"] == "up"]
    assert len(ups) == len(set(ups))  # nothing counts twice


class Killed(Exception):
    pass


@pytest.mark.parametrize("sched", ["sync", "overlap"])
@pytest.mark.parametrize("at", [1, 4, 7, 10])
def test_a_server_that_was_killed_goes_on_from_checkpoint_and_inbox(tmp_path: Path, sched: str, at: int) -> None:
    """The checkpoint is of the event before, or of three events before; sites kept what they had done."""
    simulated = worlds(sched=sched)
    simulated.simulation.run()
    deployed, link = deploy(tmp_path, sched=sched)
    saved: list[Any] = []

    def on_event() -> None:
        if deployed.events in (max(at - 3, 0), at - 1) and (at % 2 or not saved):
            tensors, skeleton = store.flatten(deployed.state_dict())
            saved.append((({k: v.clone() for k, v in tensors.items()}), json.loads(json.dumps(skeleton))))
            deployed.saved()
        if deployed.events == at:
            raise Killed

    deployed.on_event = on_event
    with pytest.raises(Killed):
        deployed.run()
    again, fresh = deploy(tmp_path / "unused", sched=sched)
    fresh.close()
    again.outbox, again.inbox, again.ledger = deployed.outbox, deployed.inbox, Ledger()
    again.evaluations.ledger = again.ledger
    again.link = Threads(link.sites, tmp_path)
    if saved:
        again.load_state_dict(store.unflatten(*saved[-1]))
    again.run()
    link.close()
    assert again.server.finished
    if sched == "sync":  # under overlap, who is asked for what again depends on who came back first
        assert digest(again.server.state["params"]) == digest(simulated.simulation.server.state["params"])


def test_a_site_that_comes_back_with_a_version_that_the_server_went_back_on_is_sent_all(tmp_path: Path) -> None:
    """The server has passed that version again meanwhile, with other updates."""
    more: dict[str, Any] = {"meth": {"name": "fedbcd", "layers_per_block": 1}, "sched": "fedasync", "turns": 60}
    deployed, link = deploy(tmp_path, **more)
    saved: list[Any] = []

    def first() -> None:
        if deployed.server.version == 2 and not saved:
            tensors, skeleton = store.flatten(deployed.state_dict())
            saved.append(({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(skeleton))))
            for name in ("out", "inbox"):
                shutil.copytree(tmp_path / name, tmp_path / "then" / name)
        if deployed.server.version >= 4 and link.sites[0].version >= 3:
            raise Killed

    deployed.on_event = first
    with pytest.raises(Killed):
        deployed.run()
    again, fresh = deploy(tmp_path / "again", **more)
    fresh.close()
    again.link = Threads({c: s for c, s in link.sites.items() if c}, tmp_path)
    again.outbox, again.inbox = tmp_path / "then" / "out", tmp_path / "then" / "inbox"
    again.rejoin = 0.1  # seconds that are waited for site 0
    again.load_state_dict(store.unflatten(*saved[0]))
    held: list[int] = []

    def second() -> None:
        mine = link.sites[0].version
        if 0 not in again.server.online and again.server.version > mine:
            assert not held
            again.link.sites[0] = link.sites[0]  # type: ignore[attr-defined]
            again._joined(0, {"version": mine})
            held.append(again.server.held[0])
            again._left(0)  # its line flaps before it was sent anything
            again._joined(0, {"version": mine})
            held.append(again.server.held[0])
        if 0 not in again.bounds:
            again._left(0)
            held.append(link.sites[0].version)
            again._joined(0, {"version": held[-1]})
            held.append(again.server.held[0])
            raise Killed

    again.on_event = second
    with pytest.raises(Killed):
        again.run()
    assert held[:2] == [-1, -1]
    assert held[2] == held[3] >= 0  # it was sent all, and did a job on it
    link.close()


def test_a_job_that_comes_whole_is_loaded_though_it_is_done(tmp_path: Path) -> None:
    """Its server went back on what the site holds, and asks for the same job again."""
    more: dict[str, Any] = {"meth": {"name": "fedbcd", "layers_per_block": 1}}
    w = worlds(**more)
    job = next(j for j in w.simulation.server.poll() if j.client == 0)
    whole, codec = w.simulation.server.whole(0), w.simulation.downlink.codec
    blob, news = codec.encode(whole), codec.encode({k: v + 1 for k, v in list(whole.items())[:1]})
    here = site(tmp_path, 0, 3, **more)
    here.take(replace(job, since=-1), blob)
    assert here.answer(job.id)
    first = digest(dict(here._held))
    here.take(replace(job, id=job.id + 1, version=4, turn=1, since=0), news)
    assert here.answer(job.id + 1)
    assert (here.version, digest(dict(here._held)) == first) == (4, False)
    here.take(replace(job, since=-1), blob)
    assert (here.version, digest(dict(here._held)) == first) == (job.version, True)
    here.close()


def test_a_site_that_was_started_anew_says_so_and_is_sent_the_model(tmp_path: Path) -> None:
    simulated = worlds()
    simulated.simulation.run()
    deployed, link = deploy(tmp_path)

    def on_event() -> None:
        if deployed.server.version == 2 and link.sites[2].version == 2:
            old, rows = link.sites[2], deployed.server.clients[2].rows
            link.sites[2] = site(tmp_path, 2, rows)
            threading.Thread(target=old.close).start()
            link.events.put(Left(2))
            link.events.put(Joined(2, {"version": -1}))

    deployed.on_event = on_event
    deployed.run()
    link.close()
    assert deployed.server.finished


def test_a_late_site_is_not_waited_for(tmp_path: Path) -> None:
    deployed, link = deploy(tmp_path, sched={"name": "sync", "deadline": 0.4})
    slow = link.sites[1]
    take = slow.take
    slow.take = lambda job, packet: (time.sleep(1.0 if job.turn == 1 else 0), take(job, packet))[1]  # type: ignore
    rows: list[dict[str, Any]] = []
    deployed.ledger.listener = rows.append
    deployed.run()
    link.close()
    assert [r["reason"] for r in rows if r["what"] == "lost"].count("deadline") >= 1
    assert deployed.server.finished


def test_a_site_whose_late_job_fails_is_asked_again(tmp_path: Path) -> None:
    """Under a schedule without rounds nobody asks a site that may still be at something; it must be heard that it is not."""
    deployed, link = deploy(tmp_path, sched={"name": "fedasync", "deadline": 0.4}, meth={"name": "fedit", "rank": 2}, turns=40)
    slow, failed = link.sites[1], []

    def take(job: Any, packet: Any) -> None:
        if failed:
            return type(slow).take(slow, job, packet)
        time.sleep(1.0)
        failed.append(job.id)
        raise HocketError("no room")

    slow.take = take  # type: ignore[method-assign]
    rows: list[dict[str, Any]] = []
    deployed.ledger.listener = rows.append
    answered = lambda: any(r["what"] == "up" and r["client"] == 1 for r in rows)
    for other in (0, 2):  # so that the run is not over before
        site = link.sites[other]
        site.take = lambda job, packet, site=site: (time.sleep(0.1), type(site).take(site, job, packet))[1]  # type: ignore
    deployed.run()
    link.close()
    assert [r["reason"] for r in rows if r["what"] == "lost" and r["job"] == failed[0]] == ["deadline", "no room"]
    assert answered()


def test_nobody_at_all_is_an_error_after_a_while(tmp_path: Path) -> None:
    deployed, link = deploy(tmp_path)
    link.close()
    deployed.link = Threads({}, tmp_path)
    deployed.patience = 0.2
    with pytest.raises(RunError, match="stuck"):
        deployed.run()


def test_memory_and_updates_outlive_a_worker(tmp_path: Path) -> None:
    """Killed after a job, before its update was fetched: the next process has both, and does not do the job again."""
    w = worlds({"name": "fedsa-lora", "rank": 2})
    server = w.simulation.server
    job = next(j for j in server.poll() if j.client == 0)
    first = site(tmp_path, 0, 3, meth={"name": "fedsa-lora", "rank": 2})
    first.take(job, w.simulation.downlink.codec.encode(job.payload))
    told, path = first.answer(job.id) or ({}, Path())
    blob, memory = path.read_bytes(), {k: v.clone() for k, v in first.memory().items()}
    second = site(tmp_path, 0, 3, meth={"name": "fedsa-lora", "rank": 2})
    assert second.has(job)
    second.take(job, b"")  # known: not even looked at
    found = second.answer(job.id, 0)
    assert found is not None
    assert found[1].read_bytes() == blob
    assert memory
    assert all(torch.equal(second.memory()[k], v) for k, v in memory.items())
    with pytest.raises(Lost):
        second.answer(99, 0)
    with pytest.raises(Lost, match="builds on version 7"):
        second.take(replace(job, id=5, since=7), b"")
    first.close()
    second.close()


def test_worker_and_courier_talk_json_over_a_socket_of_the_owners_own(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    opened: list[str] = []

    def opens(recipe: str, client: int, where: Path) -> Site:
        opened.append(recipe)
        return site(tmp_path, client, 2, where)

    worker = Worker(folder, opens)
    threading.Thread(target=worker.serve, daemon=True).start()
    assert stat.S_IMODE((folder / courier.SOCKET).stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / courier.KEY).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    hello = {"op": "hello", "run": "r1", "recipe": 'name = "x"', "client": 1}
    assert client_app.handle({"op": "hello", "run": "r1"}, None, folder, "b") == ({"name": "b"}, None)
    told, _ = client_app.handle(hello, None, folder, "b")
    assert told == {"rows": 2, "version": 0, "name": "b"}
    client_app.handle(hello, None, folder, "b")
    assert len(opened) == 1  # asked again, it is the same run
    w = worlds()
    job = next(j for j in w.simulation.server.poll() if j.client == 1)
    blob = w.simulation.downlink.codec.encode(job.payload)
    do = {"op": "do", "run": "r1", "job": job.id, "timeout": 30, "part": 100, "forget": []}
    for _ in range(2):  # the courier died after the first time
        told, body = client_app.handle({**do, "asks": [plain(job)], "packets": [[job.id, len(blob)]]}, blob, folder, "b")
        assert "told" in told, told
        assert told["told"]["client"] == 1
        rest, at = body or b"", 100
        while at < told["size"]:
            _, more = client_app.handle({"op": "fetch", "run": "r1", "job": job.id, "offset": at, "part": 100}, None, folder, "b")
            rest += more or b""
            at += 100
        assert set(wire.Packet(rest)) == {"layers.3.w"}  # the block of this turn
    for bad in ({"op": "fly", "run": "r1"}, {"op": "do", "run": "r1"}, {"op": "do", "run": "../x"}, {}):
        assert client_app.handle(bad, None, folder, "b")[0]["failed"] == "job"
    assert client_app.handle({**do, "run": "r2", "asks": [], "packets": []}, None, folder, "b")[0]["failed"] == "lost"
    (folder / courier.KEY).write_bytes(b"another key")
    assert client_app.handle(hello, None, folder, "b")[0]["failed"] == "link"
    worker.close()
    assert client_app.handle(hello, None, folder, "b")[0]["failed"] == "link"


@pytest.mark.parametrize("error", [RuntimeError("no room in '/data/berlin/x'"), FileNotFoundError(2, "gone", "/data/berlin/x")], ids=repr)
def test_whatever_fails_at_a_site_is_answered_without_its_paths(tmp_path: Path, error: Exception) -> None:
    def opens(recipe: str, client: int, where: Path) -> Site:
        raise error

    worker = Worker(tmp_path / "s", opens)
    threading.Thread(target=worker.serve, daemon=True).start()
    hello = {"op": "hello", "run": "r", "recipe": "", "client": 1}
    told, _ = client_app.handle(hello, None, tmp_path / "s", "b")
    assert told["failed"] == ("link" if isinstance(error, OSError) else "job")
    assert type(error).__name__ in told["reason"]
    missing, _ = client_app.handle({"op": "fetch", "run": "r", "job": 1, "offset": 0, "part": 1}, None, tmp_path / "s", "b")
    worker.close()
    gone, _ = client_app.handle(hello, None, tmp_path / "s", "b")
    for said in (told, missing, gone):
        assert said["failed"]
        assert "berlin" not in said["reason"]
        assert str(tmp_path) not in said["reason"]
    kept = "see https://x.org/a/b, org/model, 3/4 s, data.source"
    assert courier.unplaced(kept) == kept
    assert courier.unplaced("'/a b/c' and /d/e.f: x, ~/g") == "'[a path]' and [a path]: x, [a path]"


def test_what_a_site_remembers_is_of_its_last_job_whatever_its_number(tmp_path: Path) -> None:
    """A server that went back gives numbers anew: the last job may have a smaller one than an old update that is here."""
    more: dict[str, Any] = {"meth": {"name": "fedsa-lora", "rank": 2}}
    w = worlds(**more)
    job = next(j for j in w.simulation.server.poll() if j.client == 0)
    blob = w.simulation.downlink.codec.encode(job.payload)
    first = site(tmp_path, 0, 3, **more)
    for number, turn in ((7, job.turn), (2, job.turn + 1)):
        first.take(replace(job, id=number, turn=turn, since=-1), blob)
        assert first.answer(number)
    first.close()
    memory = {k: v.clone() for k, v in first.memory().items()}
    second = site(tmp_path, 0, 3, **more)
    assert {k: v.tolist() for k, v in second.memory().items()} == {k: v.tolist() for k, v in memory.items()}
    second.close()
    (tmp_path / "site0" / "memory.json").write_text("7")  # as if killed between an update and its note
    at = (tmp_path / "site0" / "update-7.json").stat().st_mtime_ns
    os.utime(tmp_path / "site0" / "memory.json", ns=(at, at))
    third = site(tmp_path, 0, 3, **more)
    assert third.memory().keys() == memory.keys()
    assert json.loads((tmp_path / "site0" / "memory.json").read_text()) == 2
    third.version = 5
    with pytest.raises(Lost, match="version 5 is what is here"):  # and a difference between older versions is no use
        third.take(replace(job, id=9, version=4, since=3), b"")
    third.close()


class Nodes:
    """A grid whose nodes say their names and have the run open at once; an upload ends too early."""

    def __init__(self, names: dict[int, str]) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as in a task's process
        self.names, self.replies = names, dict[str, Any]()

    def get_node_ids(self) -> list[int]:
        return list(self.names)

    def push_messages(self, messages: list[Any]) -> list[str]:
        (message,) = messages
        node, head = message.metadata.dst_node_id, read(message.content)[0]
        told: dict[str, Any] = {"name": self.names[node], "rows": 2, "version": node}
        if head["op"] == "do":
            zero = dict.fromkeys(("client", "version", "turn", "visit"), 0)
            told = {"told": {**zero, "weight": 1.0, "metrics": {}}, "size": 9}
        if head["op"] == "fetch":
            told = {"failed": "job", "reason": "FileNotFoundError"}
        self.replies[str(node)] = SimpleNamespace(has_error=lambda: False, content=content(told, b"abc"))
        return [str(node)]

    def pull_messages(self, keys: list[str]) -> list[Any]:
        return [self.replies.pop(k) for k in keys if k in self.replies]


def test_a_node_whose_name_is_taken_is_met_again_once_it_is_free(tmp_path: Path) -> None:
    grid: Any = Nodes({1: "berlin"})
    link = FlowerLink(grid, "r", "", ["berlin"], tmp_path / "arriving", poll=0.01, pause=0.05)
    assert link.next(60) == Joined(0, {"rows": 2, "version": 1})
    link.send(Request(5, 0, (), 0))
    failed = link.next(60)
    assert isinstance(failed, Failed)
    assert failed.kind == "link"
    assert not any((tmp_path / "arriving").iterdir())  # nothing is left of what did not arrive whole
    grid.names[2] = "berlin"  # its SuperNode was started anew, and the old one is not missed yet
    assert link.next(3) is None
    del grid.names[1]
    assert link.next(60) == Left(0)
    assert link.next(60) == Joined(0, {"rows": 2, "version": 2})
    link.close()


class Behind(Nodes):
    """A grid with one node, whose SuperNode hands out the next message when any reply is there to be sent.

    Args:
        stray: whether a reply of an earlier run is there from the start.
        delay: seconds that the first message takes; then, by kind.
    """

    def __init__(self, folder: Path, stray: bool, delay: float = 0.0) -> None:
        super().__init__({1: "berlin"})
        self.folder, self.delay, self.heads = folder, {"first": delay}, list[dict[str, Any]]()
        self.came, self.ready = queue.Queue[tuple[str, Any]](), queue.Queue[tuple[str, Any]]()
        if stray:
            self.ready.put(("of another run", None))
        threading.Thread(target=self.supernode, daemon=True).start()

    def push_messages(self, messages: list[Any]) -> list[str]:
        for message in messages:
            self.heads.append(read(message.content)[0])
            self.came.put((f"{len(self.heads)}", self.heads[-1]))
        return [f"{len(self.heads)}"]

    def supernode(self) -> None:
        while True:
            key, head = self.came.get()
            early = not self.ready.empty()  # a reply that nobody waited for leaves before this message's can be there
            replies = [self.ready.get()] if early else []
            threading.Thread(target=self.client_app, args=(key, head), daemon=True).start()
            self.replies.update(replies or [self.ready.get()])

    def client_app(self, key: str, head: dict[str, Any]) -> None:
        time.sleep(self.delay.get("first" if key == "1" else head["op"], 0.0))
        try:
            told, body = client_app.handle(head, None, self.folder, "berlin")
        except courier.Unanswered:
            return
        if head["op"] == "hello":
            told = {"name": "berlin", "rows": 2, "version": 0}
        self.ready.put((key, SimpleNamespace(has_error=lambda: False, content=content(told, body))))


@pytest.mark.parametrize(("stray", "delay"), [(True, 0.0), (False, 3.0)], ids=["behind", "slow"])
def test_a_node_whose_replies_leave_with_the_message_after_them_is_brought_into_step(tmp_path: Path, stray: bool, delay: float) -> None:
    grid: Any = Behind(tmp_path / "site", stray, delay)
    link = FlowerLink(grid, "r", "", ["berlin"], tmp_path / "arriving", poll=0.01, pause=0.05, patience=8.0)
    assert link.next(60) == Joined(0, {"rows": 2, "version": 0})
    for number in range(5):  # no worker is here: an answer, too
        grid.delay["do"] = delay if number == 2 else 0.0  # late again, and it is no use to pair again
        link.send(Request(number, 0, (), 0))
        failed = link.next(60)
        assert isinstance(failed, Failed)
        assert "no worker" in failed.reason
    link.close()
    assert [h["op"] for h in grid.heads] == ["hello", "pair", "pair", "hello", "do", "do", "do", "do", "do"]
    assert not any(tmp_path.glob("site/runs/r/pair-*"))


def test_parts_of_a_packet_may_come_twice_but_not_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "in" / "down-1.hkt"
    courier.store(path, 0, b"abc", last=False)
    courier.store(path, 0, b"abc", last=False)
    with pytest.raises(ValueError, match="3 bytes"):
        courier.store(path, 5, b"f", last=True)
    courier.store(path, 3, b"de", last=True)
    courier.store(path, 3, b"xx", last=True)
    assert path.read_bytes() == b"abcde"
    assert courier.fetch(path, 2, 2) == b"cd"
    courier.store(path, 0, b"vw", last=False)  # another packet of that name
    assert not path.exists()
    courier.store(path, 2, b"x", last=True)
    assert path.read_bytes() == b"vwx"


def test_a_job_sent_whole_after_its_worker_died_is_not_mixed_up_with_what_came_before(tmp_path: Path) -> None:
    """Under a method that ships part of the model, the old packet is a difference to what the new worker has not."""
    more: dict[str, Any] = {"meth": {"name": "fedbcd", "layers_per_block": 1}}
    w, folder = worlds(**more), tmp_path / "s"
    server, codec = w.simulation.server, w.simulation.downlink.codec
    jobs = {j.client: j for j in server.poll()}
    job, whole = jobs[1], server.whole(1)
    diff = codec.encode({k: v + 1 for k, v in list(job.payload.items())[:1]})
    handle = lambda head, body: client_app.handle({"run": "r", **head}, body, folder, "b")[0]
    do = {"op": "do", "job": job.id, "timeout": 60, "part": 1 << 20, "forget": []}
    asked = lambda job, blob: {**do, "asks": [plain(job)], "packets": [[job.id, len(blob)]]}
    assert handle(asked(replace(job, since=0), diff), diff)["failed"] == "link"  # its packet is here; its worker is not
    opened: list[Site] = []

    def opens(recipe: str, client: int, where: Path) -> Site:
        opened.append(site(tmp_path, client, 2, where, **more))
        return opened[-1]

    worker = Worker(folder, opens)
    threading.Thread(target=worker.serve, daemon=True).start()
    handle({"op": "hello", "recipe": "", "client": 1}, None)
    assert handle(asked(replace(job, since=7), diff), diff)["failed"] == "lost"
    assert not worker.path("r", job.id).exists()
    blob = codec.encode(whole)
    told = handle(asked(replace(job, since=-1), blob), blob)
    assert "told" in told, told
    assert digest(opened[0]._held) == digest(dict(whole))
    worker.close()


def test_the_courier_knows_no_torch() -> None:
    code = "import sys, hocket.deploy.client_app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
