"""A server that dies, a site that lies: the run goes on, and its folder says when it has ended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deploy import Threads, deploy
from worlds import AT_SITES

from hocket import recipe as recipes
from hocket import store, wire
from hocket.deploy import launch, serving
from hocket.deploy.checks import Norms, Weights, told
from hocket.deploy.nouns import Answered, Event, Joined
from hocket.deploy.serving import Unusable, serve
from hocket.deploy.sites import opener, read, shared
from hocket.errors import HocketError, RunError, StoreError, WireError
from hocket.recipe import Recipe
from hocket.sections import Training

RECIPE = f"""turns = 2
[training]
batch_size = 2
local_steps = 1
{AT_SITES}"""


def written(tmp: Path, text: str = RECIPE) -> Recipe:
    (tmp / "recipe.toml").write_text(text)
    return recipes.load(tmp / "recipe.toml")


def fleet(tmp: Path, recipe: Recipe) -> Any:
    """Two sites that are opened anew for each link, by the name that the run has by then."""

    def link(folder: Path) -> Threads:
        opened = {}
        for c, name in enumerate(recipe.deployment.sites):
            where = tmp / name
            where.mkdir(exist_ok=True)
            (where / "rows.jsonl").write_text(
                "".join(json.dumps({"text": f"{name} says {i}"}) + "\n" for i in range(5))
            )
            (where / "site.toml").write_text(f'name = "{name}"\n[data]\nsource = "rows.jsonl"\n')
            kept = where / serving.name(folder, recipe)
            opened[c] = opener(read(where / "site.toml"), where)(shared(recipe), c, kept)
        line = Threads(opened, tmp)
        line.events.queue.clear()
        for c, s in opened.items():
            line.events.put(Joined(c, {"version": s.version, "rows": s.client.rows}))
        return line

    return link


def dying(link: Any) -> Any:
    """The same, and the server dies with the first update."""

    def opens(folder: Path) -> Threads:
        line: Threads = link(folder)
        following = line.next

        def next(timeout: float | None) -> Event | None:
            event = following(timeout)
            if event is not None and not isinstance(event, Joined):
                raise RuntimeError("killed")
            return event

        line.next = next  # type: ignore[method-assign]
        return line

    return opens


def test_a_server_that_died_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    recipe, run = written(tmp_path), tmp_path / "a run, no. 2"
    link = fleet(tmp_path, recipe)
    with pytest.raises(RuntimeError, match="killed"):
        serve(recipe, run, dying(link))
    first = serving.name(run, recipe)
    stale = run / "packets" / "inbox" / "99.json"
    stale.write_text("{}")
    assert not launch.ended(run)
    assert launch.progress(run) == -1
    serve(recipe, run, link)
    assert launch.ended(run)
    assert launch.progress(run) > 0
    assert not stale.exists()
    second = serving.name(run, recipe)
    assert first != second, "sites would answer from what they kept of the first attempt"
    assert all((c.isalnum() and c.isascii()) or c in "-_" for c in second)
    with pytest.raises(StoreError, match="has finished"):
        serve(recipe, run, link)


def test_a_server_killed_before_its_last_checkpoint_is_gone_on_with(tmp_path: Path, monkeypatch: Any) -> None:
    recipe, run = written(tmp_path), tmp_path / "run"
    link, save = fleet(tmp_path, recipe), store.save

    def saves(folder: Path, step: int, state: Any, *more: Any) -> Path:
        if state["finished"]:
            raise RuntimeError("killed")
        return save(folder, step, state, *more)

    with monkeypatch.context() as m:
        m.setattr(store, "save", saves)
        with pytest.raises(RuntimeError, match="killed"):
            serve(recipe, run, link)
    assert (run / "ledger.jsonl").read_bytes().splitlines()[-1].startswith(b'{"what":"end"')
    assert not launch.ended(run), "its last checkpoint is missing"
    name = serving.name(run, recipe)
    serve(recipe, run, link)
    assert launch.ended(run)
    assert serving.name(run, recipe) == name
    (run / "manifest.json").write_text("{}")  # killed between its last checkpoint and saying so
    with pytest.raises(StoreError, match="has finished"):
        serve(recipe, run, link)
    assert launch.ended(run)
    other = written(tmp_path, RECIPE.replace("turns = 2", "turns = 3"))
    with pytest.raises(Unusable, match="another recipe"):
        serve(other, run, link)
    assert Unusable.__name__ in launch.FINAL


def test_a_run_of_another_kind_is_not_written_over(tmp_path: Path) -> None:
    recipe, run = written(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(HocketError, match="already holds a run"):
        serve(recipe, run, fleet(tmp_path, recipe))


class Hub(launch.Hub):
    """Takes every run, of which each ends after more or fewer rows, without a checkpoint."""

    run: Path
    sizes = (900, 100, 800, 200)
    submitted = 0

    def submit(self, app: Path, recipe: Path, run: Path) -> str:
        (self.run / "ledger.jsonl").write_bytes(b" " * self.sizes[self.submitted % 4])
        self.submitted += 1
        return "1"


def test_a_run_without_new_checkpoints_is_given_up(tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    hub = Hub(tmp_path / "hub", 1, 1)
    hub.run = run
    monkeypatch.setattr(launch, "listening", lambda port: None)
    kept = launch.Process("superlink", ["sleep", "60"], tmp_path / "log")
    try:
        with pytest.raises(RunError, match="does not go on"):
            launch.drive(hub, [kept], tmp_path, tmp_path, run, lambda: hub.submitted > 50, 0.0, 0.0, 0.001, tries=4)
    finally:
        kept.stop()
    assert hub.submitted == 4


def test_a_command_of_flower_that_hangs_is_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    def hangs(*_: Any, **more: Any) -> None:
        raise launch.subprocess.TimeoutExpired("flwr", more["timeout"])

    monkeypatch.setattr(launch.subprocess, "run", hangs)
    with pytest.raises(RunError, match="did not end within 300 s"):
        launch.Hub(tmp_path, 1, 1).flwr("run")


class Lying(Threads):
    """Site 1 answers turn 1 with what `lie` makes of its update."""

    def __init__(self, sites: dict[int, Any], folder: Path, lie: Any) -> None:
        super().__init__(sites, folder)
        self.lie = lie

    def next(self, timeout: float | None) -> Event | None:
        event = super().next(timeout)
        if isinstance(event, Answered) and event.client == 1 and event.told["turn"] == 1:
            return self.lie(event)  # type: ignore[no-any-return]
        return event


def huge(event: Answered) -> Answered:
    old = wire.Packet(event.packet.read_bytes())
    event.packet.write_bytes(wire.pack({k: v.double() * 0 + 1e200 for k, v in old.items()}, old.meta))
    return event


def heavy(event: Answered) -> Answered:
    return Answered(event.client, event.job, {**event.told, "weight": 1e300}, event.packet)


def odd(event: Answered) -> Answered:
    return Answered(event.client, event.job, {**event.told, "weight": 10**400}, event.packet)


WEIGHTS = Weights("examples", Training(batch_size=2, local_steps=3), 16)


@pytest.mark.parametrize("norm_limit", [None, 1e3])
@pytest.mark.parametrize(("lie", "reason"), [(huge, "1e.200|norm inf"), (heavy, "at most"), (odd, "OverflowError")])
def test_what_a_site_tells_neither_ends_the_run_nor_moves_the_model(
    tmp_path: Path, lie: Any, reason: str, norm_limit: float | None
) -> None:
    deployed, link = deploy(tmp_path, meth={"name": "fedit", "rank": 2})
    deployed.link, deployed.norms, deployed.weights = Lying(link.sites, tmp_path, lie), Norms(norm_limit), WEIGHTS
    rows: list[dict[str, Any]] = []
    deployed.ledger.listener = rows.append
    deployed.run()
    link.close()
    lost = [r for r in rows if r["what"] == "lost"]
    assert [r["client"] for r in lost] == [1]
    assert re.search(reason, lost[0]["reason"]), lost
    assert all(torch.isfinite(v).all() for v in deployed.server.state["params"].values())


def test_a_weight_is_the_sites_word_only_where_the_server_cannot_know_it() -> None:
    training = WEIGHTS.training
    assert Weights("uniform", training, 16).look(1e300, 5) == 1.0
    assert Weights("rows", training, 16).look(1e300, 5) == 5.0
    assert WEIGHTS.look(6.0, 5) == 6.0
    with pytest.raises(WireError, match="at most 6 examples"):
        WEIGHTS.look(7.0, 5)
    with pytest.raises(WireError, match="at most 3 examples"):  # a batch is no larger than what there is
        WEIGHTS.look(4.0, 1)
    assert Weights("tokens", training, 16).look(96.0, 5) == 96.0
    epochs = Training(batch_size=2, local_epochs=2.0)
    assert Weights("examples", epochs, 16).look(10.0, 5) == 10.0


def test_whole_numbers_without_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="weight: not a finite number"):
        told({"client": 0, "version": 0, "turn": 0, "visit": 0, "weight": 10**400})


def test_a_torn_note_in_the_inbox_does_not_keep_a_server_from_starting(tmp_path: Path) -> None:
    deployed, link = deploy(tmp_path)
    (deployed.inbox / "0.json").write_text('{"client": 0, "ver')
    (deployed.inbox / "0.hkt").write_bytes(b"torn")
    deployed.run()
    link.close()
    assert deployed.server.finished
