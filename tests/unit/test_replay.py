"""A deployed run's record is enough to make its model again, to the bit, whatever order things happened in."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_deploy import Flaky, Threads, deploy, site, worlds
from typer.testing import CliRunner
from worlds import AT_SITES

from hocket import recipe as recipes
from hocket.cli import app
from hocket.deploy import saving
from hocket.deploy.engine import Deployment
from hocket.deploy.nouns import Joined, Left
from hocket.deploy.replay import Replay, replay
from hocket.deploy.serving import serve
from hocket.deploy.sites import opener, read, shared
from hocket.errors import Interrupted, RunError, StoreError
from hocket.run import Stop
from hocket.tree import digest

LORA = {"name": "fedit", "rank": 2}


def record(deployed: Deployment, tmp: Path) -> list[dict[str, Any]]:
    """Run to the end; the ledger's lines as they are on disk."""
    deployed.run()
    deployed.link.close()
    deployed.ledger.close()
    return [json.loads(line) for line in (tmp / "ledger.jsonl").read_text().splitlines()]


def again(rows: list[dict[str, Any]], folder: Path, strict: bool = True, **more: Any) -> str:
    """The hash of the replayed model."""
    w = worlds(**more)
    server, counts = w.simulation.server, {c: i.rows for c, i in w.simulation.server.clients.items()}
    replay = Replay(
        server, w.simulation.downlink.codec, w.simulation.up,
        lambda c, where: site(folder, c, counts[c], where, **more), folder / "replay", strict,
    )  # fmt: skip
    replay.run(rows)
    return digest(server.state["params"])


def uneven(link: Threads) -> None:
    """Client 0 is quick, 2 slow, so that arrivals are in no order of asking."""
    for c, s in link.sites.items():
        take = s.take
        s.take = lambda job, packet, c=c, take=take: (time.sleep(0.02 * c), take(job, packet))[1]  # type: ignore


ASYNC: list[Any] = ["fedfa", "fedbuff", "fedasync", "ca2fl", "safa"]


@pytest.mark.parametrize("sched", ASYNC)
def test_an_asynchronous_run_is_replayed_to_the_same_model(tmp_path: Path, sched: Any) -> None:
    more = {"sched": sched, "meth": LORA, "turns": 8}
    deployed, link = deploy(tmp_path, **more)
    uneven(link)
    rows = record(deployed, tmp_path)
    assert again(rows, tmp_path, **more) == digest(deployed.server.state["params"])


MORE: list[dict[str, Any]] = [
    {"sched": "overlap"},
    {"sched": "sync", "preloaded": False},
    {"sched": "fedfa", "meth": {"name": "fedavg"}, "up": {"name": "feedback", "codec": "int8"}, "down": "half"},
    {"sched": "fedbuff", "meth": {"name": "fedsa-lora", "rank": 2}},
    {"sched": "fedasync", "meth": {"name": "flora", "rank": 2}},
]


@pytest.mark.parametrize("more", MORE, ids=lambda m: f"{m['sched']}-{m.get('meth', {}).get('name', 'fedbcd')}")
def test_what_sites_hold_and_remember_is_replayed_too(tmp_path: Path, more: dict[str, Any]) -> None:
    deployed, link = deploy(tmp_path, **more)
    uneven(link)
    rows = record(deployed, tmp_path)
    assert again(rows, tmp_path, **more) == digest(deployed.server.state["params"])


@pytest.mark.parametrize("sched", ["fedfa", "fedbuff", "overlap"])
@pytest.mark.parametrize("fault", ["lost", "damaged", "nan", "weight", "leaves"])
def test_lost_and_refused_updates_are_lost_and_refused_again(tmp_path: Path, sched: str, fault: str) -> None:
    more: dict[str, Any] = {"sched": sched, "meth": {"name": "fedavg"}, "up": {"name": "feedback", "codec": "int8"}}
    more |= {"turns": 6}
    deployed, link = deploy(tmp_path, **more)
    deployed.link = flaky = Flaky(link.sites, tmp_path, fault)
    flaky.turn = 0
    uneven(link)
    rows = record(deployed, tmp_path)
    assert flaky.done
    if fault in ("damaged", "nan", "weight"):  # others are asked for again, where the model has not moved on
        assert sum(r["what"] == "lost" for r in rows) == 1
    assert again(rows, tmp_path, **more) == digest(deployed.server.state["params"])


def test_a_deadline_a_late_arrival_and_a_site_started_anew(tmp_path: Path) -> None:
    more: dict[str, Any] = {"sched": {"name": "sync", "deadline": 0.4}, "meth": {"name": "fedsa-lora", "rank": 2}, "turns": 6}
    deployed, link = deploy(tmp_path, **more)
    take = link.sites[1].take
    link.sites[1].take = lambda job, packet: (time.sleep(0.8 if job.turn == 1 else 0), take(job, packet))[1]  # type: ignore
    seen: list[int] = []

    def on_event() -> None:
        if deployed.server.version == 3 and not seen:
            seen.append(link.sites[2].version)
            old, rows = link.sites[2], deployed.server.clients[2].rows
            threading.Thread(target=old.close).start()
            link.sites[2] = site(tmp_path, 2, rows, meth=more["meth"], sched=more["sched"], turns=6)
            link.events.put(Left(2))
            link.events.put(Joined(2, {"version": link.sites[2].version, "rows": rows}))

    deployed.on_event = on_event
    rows = record(deployed, tmp_path)
    assert any(r.get("late") for r in rows)
    assert sum(r["what"] == "join" for r in rows) == 4
    assert again(rows, tmp_path, **more) == digest(deployed.server.state["params"])


RECIPE = f"""turns = 5
[schedule]
name = "fedfa"
[codec]
up = {{name = "feedback", codec = "int8"}}
[training]
optimizer_state = "keep"
batch_size = 2
local_steps = 2
{AT_SITES}"""


@pytest.mark.parametrize("doubted", [False, True])
def test_a_runs_folder_and_the_sites_files_are_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubted: bool) -> None:
    """Stopped after the second step, and gone on with; `doubted`: by a server that went back, so all is sent anew."""
    if doubted:
        load = saving.load
        monkeypatch.setattr(saving, "load", lambda d, saved: (load(d, saved), d.bounds.update(dict.fromkeys(d.bounds, -1))))
    files = []
    for name in ("a", "b"):
        where = tmp_path / name
        where.mkdir()
        texts = [f"{name} says {i * 7 % 5} and {i}" for i in range(5 + len(files))]
        (where / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        (where / "site.toml").write_text(f'name = "{name}"\n[data]\nsource = "rows.jsonl"\n')
        files.append(where / "site.toml")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe = recipes.load(tmp_path / "recipe.toml")
    opened: dict[int, Any] = {}

    def link(folder: Path) -> Threads:
        for c, file in enumerate(files):
            opened[c] = opener(read(file), file.parent)(shared(recipe), c, tmp_path / f"kept-{c}")
        line = Threads(opened, tmp_path)
        line.events.queue.clear()
        for c, s in opened.items():
            line.events.put(Joined(c, {"version": s.version, "rows": s.client.rows}))
        return line

    stop = Stop()

    def listen(row: dict[str, Any]) -> None:
        if row["what"] == "step" and row["version"] == 2:
            stop.signal = signal.SIGINT

    with pytest.raises(Interrupted):
        serve(recipe, tmp_path / "run", link, listen, stop)
    serve(recipe, tmp_path / "run", link)
    found = CliRunner().invoke(app, ["replay", str(tmp_path / "run"), *map(str, files)])
    assert found.exit_code == 0, found.output
    assert "the same model" in found.output
    said = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert any(r["what"] == "join" and r["held"] < r["version"] for r in said) == doubted
    rows = (files[0].parent / "rows.jsonl").read_text()
    (files[0].parent / "rows.jsonl").write_text(rows.replace("says", "said"))
    with pytest.raises(RunError, match="not the one recorded: digest"):
        replay(tmp_path / "run", files)
    with pytest.raises(StoreError, match="site files of b are missing"):
        replay(tmp_path / "run", files[:1])


def blocks(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows from one arrival up to the next; the first block is what comes before any."""
    out: list[list[dict[str, Any]]] = [[]]
    for row in rows:
        if row["what"] == "down":
            out.append([])
        out[-1].append(row)
    return out


def test_another_order_of_arrivals_makes_another_model(tmp_path: Path) -> None:
    """So the hash depends on the order, and the record of it is what makes them equal."""
    more: dict[str, Any] = {"sched": "fedasync", "meth": LORA, "turns": 6}
    deployed, link = deploy(tmp_path, **more)
    rows = record(deployed, tmp_path)
    parts = blocks(rows)
    at = next(i for i in range(2, len(parts) - 2) if parts[i][0]["client"] != parts[i + 1][0]["client"])
    parts[at], parts[at + 1] = parts[at + 1], parts[at]
    swapped = [r for part in parts for r in part]
    assert again(swapped, tmp_path / "other", strict=False, **more) != digest(deployed.server.state["params"])
    with pytest.raises(RunError, match="not the one recorded"):
        again(swapped, tmp_path / "strict", **more)


def test_an_update_that_cannot_be_made_again_is_named(tmp_path: Path) -> None:
    more: dict[str, Any] = {"sched": "fedbuff", "meth": LORA}
    deployed, _ = deploy(tmp_path, **more)
    rows = record(deployed, tmp_path)
    up = [r for r in rows if r["what"] == "up"][1]
    up["digest"] = "0" * 16
    with pytest.raises(RunError, match=f"the update of job {up['job']} is not the one recorded: digest"):
        again(rows, tmp_path, **more)
    with pytest.raises(RunError, match="begin"):
        again([r for r in rows if r["what"] != "begin"], tmp_path, **more)
    with pytest.raises(RunError, match="version.*missing"):
        again([{k: v for k, v in r.items() if k != "version"} for r in rows], tmp_path, **more)
