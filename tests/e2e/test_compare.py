"""Comparisons end to end on the 260 K model: tuned, run over seeds, stopped, gone on with, never run twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_command_line import ENV, hocket, write_recipe


@pytest.fixture
def study(tmp_path: Path, stories: Path) -> Path:
    return write_study(tmp_path, stories)


def write_study(tmp_path: Path, stories: Path) -> Path:
    write_recipe(tmp_path, stories)
    path = tmp_path / "study.toml"
    path.write_text(
        'study = "small"\nseeds = [0, 1]\nversus = "waits"\n[tune]\nset = { seed = 7 }\n[recipe]\nturns = 3\n[recipe.model]\n'
        f'source = "{stories}"\n[recipe.data]\nsource = "{tmp_path / "rows.jsonl"}"\ntemplate = "plain"\nmax_length = 64\n'
        '[recipe.method]\nname = "fedbcd"\n[recipe.training]\nbatch_size = 2\nlocal_steps = 2\n[recipe.clients]\ncount = 3\n'
        'device = { down_mb_s = 0.1, up_mb_s = 0.1, duplex = false }\n[recipe.engine]\nthreads = 1\n[[variant]]\nname = "waits"\n'
        'rates = [1e-5, 1e-3]\n[[variant]]\nname = "does not"\nlike = "waits"\nset = { schedule = { name = "overlap" } }\n'
    )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A comparison that nobody stopped, in `out`, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    out = hocket("compare", write_study(folder, stories), "--out", folder / "out", "--results", folder / "results")
    (folder / "printed").write_text(out)
    return folder


def test_a_study_tunes_runs_and_sums_up(whole: Path) -> None:
    out = (whole / "printed").read_text()
    result = json.loads((whole / "results" / "small.json").read_text())
    waits, other = result["variants"]["waits"], result["variants"]["does not"]
    assert waits["rate"] == other["rate"] == min(waits["tuning"], key=waits["tuning"].get) or waits["rate"] == 1e-3
    assert len(waits["losses"]) == 2
    assert waits["loss"] < result["base_loss"]
    assert other["difference"]["low"] <= other["difference"]["mean"] <= other["difference"]["high"]
    assert other["virtual_seconds"] < waits["virtual_seconds"]
    assert other["local_steps"] == waits["local_steps"] == 3 * 3 * 2
    assert "| does not | 0.001 |" in out
    runs = {p.name: (p / "ledger.jsonl").stat().st_mtime_ns for p in (whole / "out" / "runs").iterdir()}
    assert len(runs) == 2 + 2 * 2
    assert not list((whole / "out").rglob("checkpoint"))
    again = hocket("compare", whole / "study.toml", "--out", whole / "out", "--results", whole / "results")
    assert "was there" in again
    assert runs == {p.name: (p / "ledger.jsonl").stat().st_mtime_ns for p in (whole / "out" / "runs").iterdir()}
    assert json.loads((whole / "results" / "small.json").read_text()) == result


@pytest.mark.parametrize("signal_group", [True, False])
def test_a_stopped_comparison_goes_on(whole: Path, study: Path, tmp_path: Path, signal_group: bool) -> None:
    """Ctrl-C reaches the whole group; a service manager tells the parent alone."""
    command = [sys.executable, "-m", "hocket", "compare", str(study), "--out", str(tmp_path / "cut"), "--jobs", "2"]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as p:
        assert p.stdout is not None
        assert "[1/2 tuning]" in p.stdout.readline()
        time.sleep(0.3)
        if signal_group:
            os.killpg(p.pid, signal.SIGINT)
        else:
            p.terminate()
        _, errors = p.communicate(timeout=120)
    assert p.returncode == 130
    assert "go on with the same command" in errors
    hocket("compare", study, "--out", tmp_path / "cut")
    a, b = (json.loads((f / "small.json").read_text()) for f in (whole / "results", tmp_path / "cut"))
    for name in a["variants"]:
        assert a["variants"][name]["losses"] == b["variants"][name]["losses"]


def test_a_study_without_a_rate_is_an_error_before_anything_runs(study: Path, tmp_path: Path) -> None:
    study.write_text(study.read_text().replace('like = "waits"', 'like = "nobody"'))
    out = hocket("compare", study, "--out", tmp_path / "out", ok=2)
    assert "no 'nobody' has" in out
    assert not (tmp_path / "out" / "runs").exists() or not list((tmp_path / "out" / "runs").iterdir())
