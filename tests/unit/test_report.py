"""Reading runs back: totals, partial ledgers, wrong folders, large ledgers, progress and TensorBoard."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from worlds import run_folder

from hocket.errors import StoreError
from hocket.report import Progress, TensorBoard, build, read
from hocket.report.tables import thin


def test_summaries_are_the_ledgers(tmp_path: Path) -> None:
    s = read(run_folder(tmp_path / "a", "overlap")).summary()
    rows = [json.loads(line) for line in (tmp_path / "a" / "ledger.jsonl").read_text().splitlines()]
    evals = [r["loss"] for r in rows if r["what"] == "eval"]
    assert (s["start_loss"], s["final_loss"]) == (evals[0], evals[-1])
    assert s["up_bytes"] == sum(r["bytes"] for r in rows if r["what"] == "up")
    assert s["virtual_seconds"] == rows[-1]["t"]
    assert s["finished"]
    assert 0 < s["busy"][0] <= 1
    run = read(tmp_path / "a")
    assert run.reached(min(evals)) == next(e["t"] for e in run.evals if e["loss"] == min(evals))
    assert run.reached(0.0) is None
    assert run.curve("bytes")[0][0] == 0
    assert run.curve("bytes")[-1][0] > 0


def test_a_ledger_still_being_written_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "a", "sync")
    ledger = path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    assert not read(path).summary()["finished"]
    assert "not finished" in build([path], tmp_path / "x.html").read_text()
    with ledger.open("ab") as f:
        f.write(b"\n")
    with pytest.raises(StoreError, match="line .*: not JSON"):
        read(path)


@pytest.mark.parametrize("gone", ["recipe.toml", "manifest.json", "ledger.jsonl"])
def test_a_folder_that_is_no_run_names_what_is_missing(tmp_path: Path, gone: str) -> None:
    path = run_folder(tmp_path / "a", "sync")
    (path / gone).unlink()
    with pytest.raises(StoreError, match=gone):
        read(path)


def test_a_large_ledger_gives_a_small_page_quickly_and_says_what_it_left_out(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "a", "sync")
    lane = '{"what":"compute","client":%d,"job":%d,"turn":0,"version":0,"start":%d,"end":%d,"bytes":0,"loss":1.0}\n'
    with (path / "ledger.jsonl").open("a") as f:
        f.writelines(lane % (i % 1000, i, i, i + 1) for i in range(100_000))
    began = time.monotonic()
    page = build([path], tmp_path / "x.html")
    assert time.monotonic() - began < 60
    assert page.stat().st_size < 15e6
    assert "Shown are the first 16 of 1000 clients" in page.read_text()


def test_names_are_escaped_and_the_page_needs_no_network(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "a", "sync", name="<script>alert(1)</script>")
    text = build([path], tmp_path / "x.html").read_text()
    assert "<script>alert(1)" not in text
    assert "<script src=" not in text
    assert "<link rel='stylesheet'" not in text
    with pytest.raises(StoreError, match="no run given"):
        build([], tmp_path / "y.html")


def test_runs_of_one_name_are_told_apart_by_folder(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / d, "sync", name="same") for d in ("one", "two")]
    text = build(runs, tmp_path / "x.html").read_text()
    assert "same (one)" in text
    assert "same (two)" in text


def test_thinning_keeps_the_ends() -> None:
    points = thin(list(range(10_000)), 100)
    assert len(points) == 100
    assert (points[0], points[-1]) == (0, 9_999)
    assert thin([1, 2], 100) == [1, 2]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_turn_time_loss_and_what_remains(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with Progress(2, console=console) as bar:
        bar.listen({"what": "eval", "version": 0, "loss": 3.25})
        bar.listen({"what": "step", "version": 1, "t": 90.0, "loss": 2.5, "down": 10**6, "up": 10**6})
        bar.listen({"what": "warning", "text": "checkpoint skipped"})
        bar.listen({"what": "step", "version": 2, "t": 180.0, "loss": 2.25, "down": 2 * 10**6, "up": 10**6})
    text = out.getvalue()
    for piece in ("2/2", "3.0 min", "2.250", "3.250", "3.0 MB", "checkpoint skipped"):
        assert piece in text


def test_tensorboard_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.listen({"what": "step", "version": 1, "t": 3.0, "loss": 2.0})
    board.listen({"what": "eval", "version": 1, "t": 3.0, "loss": 1.5})
    board.listen({"what": "up", "bytes": 3})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step/t", "step/loss", "eval/t", "eval/loss"}
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(1, 1.5)]


def test_a_run_that_diverged_is_still_shown(tmp_path: Path) -> None:
    from hocket.cli import _headline
    from hocket.ledger import Ledger

    path = run_folder(tmp_path / "a", "sync")
    seen: list[dict] = []
    ledger = Ledger(path / "ledger.jsonl", (path / "ledger.jsonl").stat().st_size, seen.append)
    bad = float("nan")
    ledger.add("eval", t=999.0, version=6, loss=bad, perplexity=float("inf"), loss_low=bad, loss_high=bad, n=1)
    ledger.close()
    out = io.StringIO()
    with Progress(6, console=Console(file=out)) as bar:
        bar.listen(seen[0])
    assert "nan" in out.getvalue()
    run = read(path)
    assert run.summary()["final_loss"] != run.summary()["final_loss"]
    assert "-> nan" in _headline(run)
    assert "nan" in build([path], tmp_path / "x.html").read_text()
