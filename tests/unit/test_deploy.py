"""The engine on real machines, over a link within this process: threads for sites, files for packets."""

from __future__ import annotations

import queue
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import World, language, quadratic

from hocket.client import Setting
from hocket.deploy.engine import Deployment
from hocket.deploy.nouns import Answered, Event, Failed, Joined, Request
from hocket.deploy.site import Lost, Site
from hocket.errors import HocketError
from hocket.evaluations import Evaluations
from hocket.ledger import Ledger
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
            found = site.answer(r.answer)
            assert found is not None
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
        return quadratic(clients=3, turns=5, weights=[1, 2, 3], **more)
    training = {"optimizer": "sgd"} if meth["name"].startswith("fedkseed") else {}
    return language(meth=meth, layers=2, steps=2, training=training, **{"turns": 3, **more})


def site(folder: Path, c: int, rows: int, **more: Any) -> Site:
    w = worlds(**more)
    server, executor = w.simulation.server, w.simulation.executor
    setting: Setting = executor.setting  # type: ignore[attr-defined]
    start = server.state["params"]
    return Site(setting, start, w.simulation.downlink.codec, server.clients[c], folder / f"site{c}", server.preloaded)


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
