"""A run as it is seen while it goes on: the reader of ledgers, frames, logs, metrics."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hocket import recipe as recipes
from hocket.deploy import logs
from hocket.errors import HocketError, RunError, StoreError
from hocket.ledger import Ledger
from hocket.live import Follower
from hocket.watch import follow, frame

RECIPE = """
name = "clinic"
turns = {turns}
[model]
source = "tiny:llama"
[data]
source = "at the sites"
[method]
name = "fedavg"
[clients]
count = {count}
[deployment]
sites = [{sites}]
"""


def folder(tmp: Path, sites: tuple[str, ...] = ("berlin", "oslo"), count: int | None = None, turns: int = 3) -> Path:
    """A deployed run's folder, or a simulated one's if no site is named, without rows."""
    text = RECIPE.format(turns=turns, count=count or len(sites), sites=", ".join(f'"{s}"' for s in sites))
    (tmp / "recipe.toml").write_text(text)
    recipes.load(tmp / "recipe.toml")
    if sites:
        (tmp / "packets").mkdir()
    (tmp / "ledger.jsonl").touch()
    return tmp


def job(ledger: Ledger, client: int, turn: int, t: float, loss: float = 4.0, up: int = 1000) -> None:
    row: dict[str, Any] = {"client": client, "job": 10 * turn + client, "turn": turn, "version": turn}
    ledger.add("down", start=t, end=t + 1, bytes=500, **row)
    ledger.add("compute", start=t + 1, end=t + 2, bytes=0, loss=loss, **row)
    ledger.add("up", start=t + 2, end=t + 3, bytes=up, **row)


def step(ledger: Ledger, t: float, version: int, loss: float) -> None:
    ledger.add("step", t=t, version=version, updates=2, staleness=0.5, stalest=1, loss=loss, down=0, up=0)


def lines(run: Follower, rows: int = 20) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(frame(run, rows))
    return out.getvalue()


def test_rows_are_read_on_as_they_are_written(tmp_path: Path) -> None:
    run, ledger = folder(tmp_path), Ledger(tmp_path / "ledger.jsonl")
    seen = Follower(run)
    assert not seen.refresh()
    assert [c.state for c in seen.state.clients.values()] == ["away", "away"]
    ledger.add("join", t=1.0, client=0, rows=48)
    ledger.add("ask", t=2.0, client=0, job=0, turn=0, version=0, bytes=500)
    assert seen.refresh(), "a row is in the file as soon as it is added"
    berlin, oslo = seen.state.clients.values()
    assert (berlin.name, berlin.state, berlin.rows, berlin.since, oslo.state) == ("berlin", "asked", 48, 2.0, "away")
    job(ledger, 0, 0, 3.0, loss=4.5)
    step(ledger, 7.0, 1, 4.5)
    ledger.add("eval", t=7.0, version=1, loss=4.25)
    ledger.add("lost", t=8.0, client=1, job=1, turn=0, reason="rejected: tensor 'x' is not finite")
    ledger.add("leave", t=9.0, client=0)
    seen.refresh()
    s = seen.state
    assert (s.version, s.down, s.up, s.losses, s.held, s.heard) == (1, 500, 1000, [4.5], [(1, 4.25)], 6.0)
    assert (berlin.state, berlin.jobs, berlin.loss, oslo.lost) == ("away", 1, 4.5, 1)
    assert dict(s.refusals) == {"rejected": 1}
    text = lines(seen)
    for word in ("berlin", "oslo", "turn 1/3", "4.5000", "4.2500 at version 1", "1 rejected", "tensor 'x' is not finite"):
        assert word in text
    assert not s.ended
    ledger.add("end", t=9.5, version=1)
    seen.refresh()
    assert "finished" in lines(seen)


def test_a_late_job_is_lost_once(tmp_path: Path) -> None:
    """Its deadline is a row, and so is what became of it."""
    seen, ledger = Follower(folder(tmp_path)), Ledger(tmp_path / "ledger.jsonl")
    ledger.add("lost", t=5.0, client=0, job=1, turn=0, reason="deadline", late=True)
    ledger.add("lost", t=7.0, client=0, job=1, turn=0, reason="late")
    ledger.add("lost", t=8.0, client=0, job=2, turn=1, reason="offline")
    seen.refresh()
    assert seen.state.refusals == {"deadline": 1, "offline": 1}
    assert seen.state.clients[0].lost == 2


def test_a_torn_line_waits_for_its_rest(tmp_path: Path) -> None:
    run = folder(tmp_path)
    whole = b'{"what":"join","t":1.0,"client":1}\n'
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(whole[:-12])
    seen = Follower(run)
    assert not seen.refresh()
    assert seen.state.clients[1].state == "away"
    path.write_bytes(whole)
    assert seen.refresh()
    assert seen.state.clients[1].state == "here"


def test_a_ledger_that_was_cut_back_is_read_again(tmp_path: Path) -> None:
    """Also when it is longer by then than it was before."""
    run, path = folder(tmp_path), tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    job(ledger, 0, 0, 1.0, up=1000)
    there = ledger.position
    job(ledger, 0, 1, 5.0, up=7777)
    seen = Follower(run)
    seen.refresh()
    assert seen.state.up == 8777
    ledger.close()
    ledger = Ledger(path, there)
    for turn in (1, 2, 3):
        job(ledger, 0, turn, 6.0, up=10)
    seen.refresh()
    assert (seen.state.up, seen.state.clients[0].jobs) == (1030, 4)


def test_a_damaged_line_and_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder yet"):
        Follower(tmp_path / "absent")
    with pytest.raises(StoreError, match=r"recipe\.toml is missing"):
        Follower(tmp_path)
    (tmp_path / "hub").mkdir()  # a server has been started, its run not yet
    waiting = Follower(tmp_path)
    assert "not begun" in lines(waiting)
    run = folder(tmp_path)
    (run / "ledger.jsonl").write_bytes(b'{"what":"join","t":1.0,"client":1}\nnot json\n')
    with pytest.raises(StoreError, match="damaged line"):
        waiting.refresh()


def test_a_thousand_clients_are_summed_up(tmp_path: Path) -> None:
    """Those that want attention are shown."""
    run, ledger = folder(tmp_path, (), count=1000), Ledger(tmp_path / "ledger.jsonl")
    for c in range(900):
        job(ledger, c, 0, 1.0)
    ledger.add("lost", t=9.0, client=777, job=1, turn=0, reason="offline")
    ledger.add("leave", t=9.0, client=555)
    seen = Follower(run)
    seen.refresh()
    text = lines(seen, rows=5)
    assert "1,000 clients: 1 lost, 1 away, 100 here, 898 answered" in text
    assert "and 995 more" in text
    table = [line for line in text.splitlines() if line.startswith(("555 ", "777 "))]
    assert len(table) == 2
    assert len(text.splitlines()) < 20


def test_what_a_distant_machine_says_is_only_text(tmp_path: Path) -> None:
    """A reason comes from a site: neither a terminal nor rich's markup obeys it."""
    run, ledger = folder(tmp_path), Ledger(tmp_path / "ledger.jsonl")
    ledger.add("lost", t=1.0, client=0, job=0, turn=0, reason="\x1b[2J[bold]gone[/bold]\n\r" + "x" * 500)
    seen = Follower(run)
    seen.refresh()
    text = lines(seen)
    assert "\x1b" not in text
    assert "?[2J[bold]gone[/bold]??" in text
    assert "x" * 300 not in text.replace("\n", "")
    assert dict(seen.state.refusals) == {"failed": 1}


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    """Where there is no terminal, a frame a turn."""
    run, ledger = folder(tmp_path), Ledger(tmp_path / "ledger.jsonl")
    out = io.StringIO()
    step(ledger, 1.0, 1, 4.0)
    path = Follower(run)
    follow(path, Console(file=out, width=120), once=True)
    assert out.getvalue().count("turn 1/3") == 1
    step(ledger, 2.0, 2, float("nan"))
    step(ledger, 3.0, 3, 3.0)
    ledger.add("end", t=3.0, version=3)
    follow(path, Console(file=out, width=120), every=0.01)
    assert "training loss 4.0000 -> 3.0000 █!▁" in out.getvalue()
    assert out.getvalue().rstrip().count("finished") == 1


def test_metrics_are_what_a_scrape_reads(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    from hocket.deploy.metrics import Exporter

    def scrape() -> dict[tuple[str, tuple[str, ...]], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, tuple(sorted(s.labels.values()))): s.value for f in families for s in f.samples}

    exporter = Exporter(tmp_path / "run", 0)
    try:
        assert scrape() == {("hocket_run_up", ()): 0.0}, "the run has not begun"
        (tmp_path / "run").mkdir()
        run = folder(tmp_path / "run")
        ledger = Ledger(run / "ledger.jsonl")
        ledger.add("join", t=0.0, client=1)
        job(ledger, 1, 0, 1.0)
        step(ledger, 5.0, 1, 4.5)
        ledger.add("eval", t=5.0, version=1, loss=4.25)
        for c, reason in enumerate(("late: not waited for any more", "rejected: weight nan", "late: x")):
            ledger.add("lost", t=6.0, client=c % 2, job=c, turn=0, reason=reason)
        os.utime(run / "ledger.jsonl", (time.time() - 100,) * 2)
        found = scrape()
        expected = {
            "run_up": 1, "turn": 1, "turns": 3, "ended": 0, "staleness": 0.5, "staleness_most": 1, "sites": 2, "sites_joined": 1,
            "training_loss": 4.5, "heldout_loss": 4.25, "updates_total": 2, "run_seconds": 6,
        }  # fmt: skip
        assert {k: found[f"hocket_{k}", ()] for k in expected} == expected
        assert found["hocket_bytes_total", ("oslo", "up")] == 1000
        assert found["hocket_bytes_total", ("berlin", "up")] == 0
        reasons = {k[1][0]: v for k, v in found.items() if k[0] == "hocket_refusals_total"}
        assert reasons == {"late": 2, "rejected": 1, "deadline": 0, "offline": 0, "failed": 0}
        assert 101 < found["hocket_seconds_since_answer", ()] < 160
        with pytest.raises(RunError, match=f"--metrics {exporter.port}"):
            Exporter(run, exporter.port)
    finally:
        exporter.close()


def test_metrics_without_their_extra_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hocket.deploy.metrics import Exporter

    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(HocketError, match=r"hocket\[prometheus\]"):
        Exporter(tmp_path, 0)


@pytest.fixture
def logger() -> Any:
    log = logging.getLogger("hocket")
    before, level = list(log.handlers), log.level
    yield log
    for handler in set(log.handlers) - set(before):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


def test_events_are_lines_of_json_with_the_sites_names(tmp_path: Path, logger: Any) -> None:
    logs.into(tmp_path / "log.jsonl")
    ledger = Ledger(tmp_path / "ledger.jsonl", listener=logs.telling(["berlin", "oslo"]))
    ledger.add("join", t=1.0, client=1, rows=48)
    job(ledger, 1, 0, 2.0)
    ledger.add("lost", t=6.0, client=0, job=3, turn=0, reason="late: \x1b[2Jafter\nits turn")
    step(ledger, 7.0, 1, float("inf"))
    ledger.add("lost", t=8.0, client=0, job=4, turn=1, reason="offline")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["event"], r["level"], r.get("site")) for r in rows] == [
        ("joined", "info", "oslo"), ("answered", "info", "oslo"), ("refused", "warning", "berlin"), ("stepped", "info", None),
        ("lost", "warning", "berlin"),
    ]  # fmt: skip
    assert rows[0]["rows"] == 48
    assert rows[1]["bytes"] == 1000
    assert rows[2]["reason"].endswith("its turn")
    assert rows[3]["loss"] == "inf"
    assert all(r["time"].endswith("+00:00") for r in rows)


def test_the_form_of_logs_can_be_chosen(capsys: pytest.CaptureFixture[str], logger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORM, "auto")
    with pytest.raises(HocketError, match="none of auto, json, text"):
        logs.begin("xml")
    logs.begin("text")
    assert os.environ[logs.FORM] == "text", "for the processes that are started"
    logs.say(logging.getLogger("hocket.deploy.launch"), "ended", logging.WARNING, process="worker", code=1, log="a\x1b[2J\nb")
    line = capsys.readouterr().err
    assert "warning: ended  process=worker code=1 log=a [2J b\n" in line


def test_the_report_of_a_deployed_run_has_sites_rows_and_the_walls_seconds(tmp_path: Path) -> None:
    from hocket import report

    run, ledger = folder(tmp_path), Ledger(tmp_path / "ledger.jsonl")
    names = [{"id": 0, "name": "berlin"}, {"id": 1, "name": "oslo"}]
    (run / "manifest.json").write_text(json.dumps({"name": "clinic", "clients": names, "deployed": True}))
    for c, rows in ((0, 48), (1, 1234)):
        ledger.add("join", t=0.5, client=c, rows=rows)
        job(ledger, c, 0, 1.0)
    step(ledger, 5.0, 1, 4.5)
    ledger.close()
    page = report.build([run], run / "report.html").read_text()
    page = page[page.index("<body>") :]
    assert "wall time<b>5.0 s</b>" in page
    assert "virtual time" not in page
    assert "link down / up" not in page
    for cell in ("<td>berlin</td><td>48</td>", "<td>oslo</td><td>1,234</td>"):
        assert cell in page


def test_a_terminal_is_drawn_anew_until_the_end(tmp_path: Path) -> None:
    run, ledger = folder(tmp_path), Ledger(tmp_path / "ledger.jsonl")
    out = io.StringIO()
    console = Console(file=out, width=120, height=40, force_terminal=True, color_system=None, legacy_windows=False)
    seen = threading.Thread(target=follow, args=(Follower(run), console), kwargs={"every": 0.01})
    seen.start()
    for version in (1, 2, 3):
        step(ledger, float(version), version, 4.0 / version)
        end = time.monotonic() + 60
        while f"turn {version}/3" not in out.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    ledger.add("end", t=3.0, version=3)
    seen.join(60)
    assert not seen.is_alive()
    text = out.getvalue()
    assert all(f"turn {v}/3" in text for v in (1, 2, 3))
    assert "finished" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hocket import cli

    def hocket(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["hocket", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    run, ledger = folder(tmp_path), Ledger(tmp_path / "ledger.jsonl")
    step(ledger, 1.0, 1, 4.0)
    assert hocket("watch", run, "--once") == 0
    assert "turn 1/3" in capsys.readouterr().out
    assert hocket("watch", tmp_path / "absent") == 2
    assert "no such folder yet" in capsys.readouterr().err


def test_a_run_that_would_fail_again_says_so_in_its_log(tmp_path: Path, logger: Any) -> None:
    """`serve` reads there why its run's process ended, if that was after it was submitted."""
    from hocket.deploy.launch import failure

    assert failure(tmp_path, "") is None
    logs.into(tmp_path / "log.jsonl")
    log = logging.getLogger("hocket.deploy.server_app")
    logs.say(log, "run failed", logging.ERROR, kind="DataError", reason="no row can be used")
    found = failure(tmp_path, "2000-01-01T00:00:00.000+00:00")
    assert found is not None
    assert (found["kind"], found["reason"]) == ("DataError", "no row can be used")
    assert failure(tmp_path, "9999-01-01T00:00:00.000+00:00") is None
    logs.say(log, "joined", site="oslo")
    assert failure(tmp_path, "2000-01-01T00:00:00.000+00:00") is None
