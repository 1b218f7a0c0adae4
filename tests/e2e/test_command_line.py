"""The command line on a real 260 K model and real text: run, stop, resume, plan, report, export, and bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hocket import cli, store
from hocket.tree import digest

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


def hocket(*args: object, ok: int = 0) -> str:
    """What the command prints, in this process: a process of its own takes seconds to load what is here already."""
    out, before = io.StringIO(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    argv = patch.object(sys, "argv", ["hocket", *map(str, args)])
    try:
        with argv, patch.dict(os.environ, ENV), redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert (stop.value.code or 0) == ok, out.getvalue()
    return out.getvalue()


def apart(*args: object, ok: int = 0, **more: object) -> str:
    """The same, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "hocket", *map(str, args)], capture_output=True, text=True, env=ENV, timeout=280, **more
    )
    assert done.returncode == ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def recipe(tmp_path: Path, stories: Path) -> Path:
    return write_recipe(tmp_path, stories)


def write_recipe(tmp_path: Path, stories: Path) -> Path:
    """Three sites with their own words."""
    rows = [
        {
            "site": "abc"[i % 3],
            "instruction": f"Tell a story about {w}.",
            "output": f"Once upon a time there was a {w} who liked to play.",
        }
        for i, w in enumerate(
            f"{a} {b}" for a in ("red", "big", "small", "happy") for b in ("dog", "cat", "ball", "tree", "boy", "girl")
        )
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'name = "small"\nturns = 4\n[model]\nsource = "{stories}"\n[data]\nsource = "{tmp_path / "rows.jsonl"}"\n'
        'partition = "natural"\ncolumn = "site"\ntemplate = "plain"\nmax_length = 64\n[method]\nname = "fedbcd"\n'
        '[schedule]\nname = "overlap"\n[training]\nlr = 1e-3\nbatch_size = 2\nlocal_steps = 2\n[clients]\ncount = 3\n'
        "spread = { step_seconds = 4.0 }\ndevice = { down_mb_s = 0.1, up_mb_s = 0.1 }\n[engine]\nthreads = 1\n"
    )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A run of twenty turns that nobody stopped; its recipe lies beside it."""
    folder = tmp_path_factory.mktemp("whole")
    sets = ["--set", "turns=20", "--set", "evaluation.every=20"]
    hocket("run", write_recipe(folder, stories), "--out", folder / "run", "-q", *sets)
    return folder


def final(run: Path) -> str:
    return digest(store.load(run / "checkpoint")[0]["engine"]["server"]["state"]["params"])


def test_run_writes_everything_and_learns(recipe: Path, tmp_path: Path) -> None:
    out = apart("run", recipe, "--out", tmp_path / "run", "--set", "engine.tensorboard=true")
    start, end = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", out).groups())  # type: ignore[union-attr]
    assert end < start - 0.1
    for name in ("recipe.toml", "manifest.json", "ledger.jsonl", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [c["name"] for c in manifest["clients"]] == ["a", "b", "c"]
    assert manifest["wall_seconds"] > 0
    assert "has finished" in apart("resume", tmp_path / "run", ok=2)
    assert "already holds a run" in hocket("run", recipe, "--out", tmp_path / "run", ok=2)


def test_workers_and_a_second_run_give_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    hocket("run", recipe, "--out", tmp_path / "a", "-q")
    hocket("run", recipe, "--out", tmp_path / "b", "-q", "--set", "engine.workers=2")
    assert final(tmp_path / "a") == final(tmp_path / "b")
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == (tmp_path / "b" / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes_to_the_same_bits(whole: Path, tmp_path: Path, number: int, code: int) -> None:
    sets = ["--set", "turns=20", "--set", "evaluation.every=20"]
    command = [sys.executable, "-m", "hocket", "run", str(whole / "recipe.toml"), "--out", str(tmp_path / "cut"), *sets]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("checkpoint/*.hkt")) and time.monotonic() < wait:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    if number != signal.SIGKILL:
        assert f"hocket resume {tmp_path / 'cut'}" in errors
    assert final(tmp_path / "cut") != final(whole / "run")
    hocket("resume", tmp_path / "cut", "-q")
    assert final(tmp_path / "cut") == final(whole / "run")
    assert (tmp_path / "cut" / "ledger.jsonl").read_bytes() == (whole / "run" / "ledger.jsonl").read_bytes()


def test_a_checkpoint_cut_in_half_falls_back_and_ends_the_same(recipe: Path, tmp_path: Path) -> None:
    hocket("run", recipe, "--out", tmp_path / "run", "-q")
    whole = final(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoint").glob("*.hkt"))[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert "checkpoint skipped" in hocket("resume", tmp_path / "run")
    assert final(tmp_path / "run") == whole


def test_a_full_disk_stops_the_run_and_loses_nothing(recipe: Path, tmp_path: Path) -> None:
    """A real small file system where root may mount one, else a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode
        == 0
    )
    try:
        if mounted:
            out = hocket("run", recipe, "--out", disk / "run", "-q", ok=2)
        else:
            import resource

            limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
            out = apart("run", recipe, "--out", disk / "run", "-q", ok=2, preexec_fn=limit)
        assert re.search("No space left on device|File too large", out), out
        assert "error:" in out
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        hocket("resume", disk / "run", "-q")
        hocket("run", recipe, "--out", tmp_path / "whole", "-q")
        assert final(disk / "run") == final(tmp_path / "whole")
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=False)


def test_plan_agrees_with_the_run(recipe: Path, tmp_path: Path) -> None:
    planned = hocket("plan", recipe, "--set", "codec.up=int8")
    hocket("run", recipe, "--out", tmp_path / "run", "-q", "--set", "codec.up=int8")
    seconds = float(re.search(r"virtual time ([\d.]+) s", planned).group(1))  # type: ignore[union-attr]
    last = json.loads((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["what"] == "end"
    assert seconds == pytest.approx(last["t"], rel=2e-3)
    assert "memory of the client that needs most" in planned


@pytest.mark.parametrize("method", ["fedit", "ffa-lora"])
def test_an_exported_adapter_opens_and_gives_the_runs_model(
    recipe: Path, tmp_path: Path, stories: Path, method: str
) -> None:
    sets = ["--set", f"method.name={method}", "--set", "method.rank=2", "--set", "training.lr=0.01"]
    hocket("run", recipe, "--out", tmp_path / "run", "-q", *sets)
    assert "adapter" in hocket("export", tmp_path / "run", "--out", tmp_path / "adapter")
    assert "model" in hocket("export", tmp_path / "run", "--out", tmp_path / "merged", "--merge")
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(stories)
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)
    assert not torch.allclose(adapted(ids).logits, plain, atol=1e-3)
    params = store.load(tmp_path / "run" / "checkpoint")[0]["engine"]["server"]["state"]["params"]
    loaded = {k.replace(".default.", "."): v for k, v in adapted.named_parameters() if "lora_" in k}
    assert digest(params) == digest({k: v.detach() for k, v in loaded.items()})


def test_an_exported_full_model_opens(recipe: Path, tmp_path: Path) -> None:
    hocket("run", recipe, "--out", tmp_path / "run", "-q", "--set", "method=fedavg")
    hocket("export", tmp_path / "run", "--out", tmp_path / "model")
    params = store.load(tmp_path / "run" / "checkpoint")[0]["engine"]["server"]["state"]["params"]
    opened = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert digest({k: opened[k].detach() for k in params}) == digest(params)
    assert "already there" in hocket("export", tmp_path / "run", "--out", tmp_path / "model", ok=2)


def test_reports_side_by_side(recipe: Path, tmp_path: Path) -> None:
    for schedule in ("sync", "overlap"):
        hocket("run", recipe, "--out", tmp_path / schedule, "-q", "--set", f"schedule.name={schedule}")
    out = hocket("report", tmp_path / "sync", tmp_path / "overlap", "--out", tmp_path / "page.html")
    ratio = float(re.search(r"([\d.]+) x the time of sync", out).group(1))  # type: ignore[union-attr]
    assert ratio < 0.9
    assert (tmp_path / "page.html").stat().st_size > 1e6


def test_bad_input_is_one_line_that_names_the_field_or_file(recipe: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text("{}")
    for value, message in [
        ("method.name=fedbdc", "did you mean 'fedbcd'"),
        ("turns=none", "turns: "),
        (f"data.source={tmp_path / 'none.jsonl'}", "does not exist"),
        (f"data.source={empty}", "is empty"),
        (f"model.source={hollow}", "hollow"),
        ("clients.count=9", "has 3 values"),
        ("data.min_rows=20", "fewer than data.min_rows"),
        ("data.template=chat", "no chat template"),
        ("model.device=cuda", "no usable GPU"),
    ]:
        if message == "no usable GPU" and torch.cuda.is_available():
            continue
        out = hocket("run", recipe, "--out", tmp_path / "bad", "-q", "--set", value, ok=2)
        assert "error: " in out
        assert message in out
        assert not list((tmp_path / "bad").glob("checkpoint/*"))
    for args, message in [
        (["run", tmp_path / "none.toml"], "No such file"),
        (["resume", tmp_path / "nothing"], "recipe.toml is missing"),
        (["export", tmp_path / "nothing", "--out", tmp_path / "x"], "recipe.toml is missing"),
        (["report", tmp_path / "nothing"], "is missing"),
        (["models", "pull", "smollm2-135m"], "did you mean"),
    ]:
        assert message in hocket(*args, ok=2)


@pytest.mark.parametrize("delay", [1.0, 3.5, 5.0])
def test_stopped_at_any_moment_a_run_can_be_resumed_or_begun_again(recipe: Path, tmp_path: Path, delay: float) -> None:
    """Also before the first checkpoint: while libraries, model or data are being loaded."""
    command = [sys.executable, "-m", "hocket", "run", str(recipe), "--out", str(tmp_path / "cut"), "-q"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT), errors  # the last one: before or after Python could listen
    assert "Traceback" not in errors
    ledger = tmp_path / "cut" / "ledger.jsonl"
    if not ledger.exists() or '"what":"end"' not in ledger.read_text():
        hocket(*(("resume", tmp_path / "cut") if "hocket resume" in errors else ("run", recipe, "--out", tmp_path / "cut")), "-q")
    assert json.loads(ledger.read_text().splitlines()[-1])["version"] == 4


def test_lists() -> None:
    methods = hocket("methods")
    for name in (
        "method fedavg",
        "method fedit",
        "method ffa-lora",
        "method fedbcd",
        "schedule overlap",
        "codec feedback",
        "preset parablock",
    ):
        assert name in methods
    assert "smollm2-135m-instruct" in hocket("models", "list")


def test_classification_runs_scores_and_exports(recipe: Path, tmp_path: Path) -> None:
    """A random tiny encoder on labels it can learn: pairs of words, label by the first."""
    rows = [{"sentence": f"{'ab'[i % 2]} {i % 7}", "label": i % 2, "site": "xyz"[i % 3]} for i in range(90)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = [
        "model.source=tiny:bert", "model.task=classification", f"data.source={tmp_path / 'labels.jsonl'}", "method.name=fedit",
        "turns=6", "training.lr=0.02", "training.local_steps=8", "data.template=auto",
    ]  # fmt: skip
    out = hocket("run", recipe, "--out", tmp_path / "run", *[x for s in sets for x in ("--set", s)])
    accuracy = float(re.search(r"accuracy ([\d.]+)%", out).group(1))  # type: ignore[union-attr]
    assert accuracy > 80, out
    assert re.search(r"accuracy .*\(n = 9, 95 % ", out)
