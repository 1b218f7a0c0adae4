"""Actors of a Ray cluster give the bits of the inline executor, and fail like the process pool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hocket import ray_executor, run, store
from hocket.client import Setting
from hocket.codecs import codec
from hocket.errors import DataError, HocketError, Interrupted, RecipeError, RunError
from hocket.executors import Task
from hocket.methods import Job, method
from hocket.ray_executor import AHEAD, RayExecutor, room
from hocket.ray_objects import Shared, flat, whole
from hocket.ray_worker import Worker, versions
from hocket.recipe import load, parse
from hocket.tree import Tree, digest

WORLDS: dict[str, dict[str, Any]] = {
    "fedavg": {"meth": "fedavg"},
    "fedit": {"meth": "fedit", "down": "half"},
    "memory": {  # own updates in flight, residuals, optimizer state, lost jobs
        "meth": "fedbcd", "sched": {"name": "overlap", "staleness": 1}, "up": {"name": "feedback", "codec": "int8"},
        "training": {"optimizer_state": "keep"}, "loss": 0.2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster for the whole module, to which this process is connected; its token is for it alone."""
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    before, token = signal.getsignal(signal.SIGTERM), tmp_path_factory.mktemp("ray") / "token"
    token.write_text(uuid.uuid4().hex)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")  # so that it is put back as it was
        patch.delenv("RAY_AUTH_MODE")  # Ray sets it for a cluster of its own, and forgets what it knew
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # actors import this module
        ray.init(
            address="local", num_cpus=3, num_gpus=0, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", _system_config={"worker_niceness": 0},
        )  # fmt: skip
        signal.signal(signal.SIGTERM, before)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


# --- what runs in the actors ----------------------------------------------------------------------------------------
def world(name: str) -> Any:
    from worlds import language  # here: what it imports takes an actor seconds

    return language(clients=4, turns=3, **WORLDS[name])


def factory(name: str) -> Setting:
    setting: Setting = world(name).simulation.executor.setting
    return setting


def light(fit: Any) -> Setting:
    trainer: Any = SimpleNamespace(fit=fit)
    return Setting(method.build("fedavg"), codec.build("raw"), 0, 1, 7, "rows", trainer)


def noting(folder: str) -> Setting:
    """Jobs that write down that they began, and wait while there is a file `shut`."""

    def fit(local: Any, start: Tree, *_: Any) -> Tree:
        with open(f"{folder}/log", "a") as f:
            f.write(f"{local.client}\n")
        while os.path.exists(f"{folder}/shut"):
            time.sleep(0.02)
        if local.client == 9:
            raise TimeoutError("from the job itself")
        return {k: v + local.client for k, v in start.items()}

    return light(fit)


def missing() -> Setting:
    raise DataError("no rows here")


def task(number: int, view: Tree | None = None, due: float = 0.0) -> Task:
    return Task(Job(number, number, 0, 0), view or {"w": torch.zeros(2)}, None, 3, due=due)


def log(folder: Path, lines: int, seconds: float = 120.0) -> list[int]:
    """Clients whose jobs have begun, once there are that many."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = (folder / "log").read_text().split() if (folder / "log").exists() else []
        if len(found) >= lines:
            return [int(x) for x in found]
        time.sleep(0.05)
    raise AssertionError(f"{lines} jobs should have begun, {found} have")


# --- with a cluster -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "workers"), [("fedavg", 1), ("fedit", 2), ("memory", 2)])
def test_any_number_of_actors_gives_the_inline_bits(cluster: str, name: str, workers: int) -> None:
    w, inline = world(name), world(name)
    inline.simulation.run()
    w.simulation.executor = executor = RayExecutor(workers, factory, (name,), threads=torch.get_num_threads())
    try:
        w.simulation.run()
        assert not executor._shared._held  # nothing is kept once no job needs it
    finally:
        executor.close()
    assert len(executor.processes) <= workers
    assert digest(w.final) == digest(inline.final)
    if name == "memory":
        assert w.simulation.memory.keys() == inline.simulation.memory.keys()


@pytest.mark.timeout(200)
def test_what_is_needed_soonest_is_done_first_and_not_too_much_ahead(cluster: str, tmp_path: Path) -> None:
    """And all the jobs of one version share one object; an error in a job is that job's alone."""
    (tmp_path / "shut").touch()
    executor = RayExecutor(1, noting, (str(tmp_path),), threads=1)
    puts: list[int] = []
    put = executor._shared._put
    executor._shared._put = lambda tensors: puts.append(len(tensors)) or put(tensors)
    view = {"w": torch.arange(3.0).to(torch.bfloat16), "b": torch.tensor(1.5)}
    try:
        for job in (5, 1, 2, 3, 4, 6, 7, 8, 9):
            executor.submit(task(job, view, due=job))
        began = log(tmp_path, 1)
        (tmp_path / "shut").unlink()
        executor.forget(2)
        rest = [j for j in range(1, 9) if j not in (2, *began)]
        first = began + rest[: AHEAD - 1]
        assert log(tmp_path, AHEAD) == first
        time.sleep(0.5)
        assert log(tmp_path, AHEAD) == first  # the others wait until results are asked for
        with pytest.raises(TimeoutError, match="from the job itself"):
            executor.result(9)
        found = codec.build("raw").decode(executor.result(8).blob)
        assert {k: found[k].dtype for k in found} == {"w": torch.bfloat16, "b": torch.float32}
        assert found["w"].tolist() == [8.0, 9.0, 10.0]
        executor.forget(9)
        for job in (1, 3, 4, 5, 6, 7):
            executor.result(job)
        assert puts == [2]
        assert not executor._shared._held
    finally:
        executor.close()


@pytest.mark.timeout(200)
def test_interruption_is_quick_and_a_killed_actor_loses_nothing_done(cluster: str, tmp_path: Path) -> None:
    stop = False
    executor = RayExecutor(1, noting, (str(tmp_path),), 1, lambda: stop)
    try:
        executor.submit(task(0))
        log(tmp_path, 1)
        while not executor._done:
            time.sleep(0.02)
        (tmp_path / "shut").touch()
        executor.submit(task(1))
        log(tmp_path, 2)
        stop, began = True, time.monotonic()
        with pytest.raises(Interrupted):
            executor.result(1)
        assert time.monotonic() - began < 1
        stop = False
        os.kill(executor.processes[0][1], signal.SIGKILL)
        with pytest.raises(RunError, match=r"worker process died; use fewer workers .* then resume \(process \d+ on"):
            executor.result(1)
        executor.submit(task(2))  # said when its result is asked for
        assert executor.result(0).weight == 3
        with pytest.raises(RunError, match="worker process died"):
            executor.result(2)
    finally:
        executor.close()


def test_an_actor_that_cannot_begin_says_why(cluster: str) -> None:
    executor = RayExecutor(1, missing, (), threads=1)
    try:
        executor.submit(task(0))
        with pytest.raises(RunError, match="cannot begin: no rows here"):
            executor.result(0)
    finally:
        executor.close()


def test_a_cluster_without_room_says_what_to_change(cluster: str) -> None:
    for more, message in (({"gpus": 0.5}, r"1 CPU and 0.5 GPU .*engine.gpus"), ({"threads": 64}, "64 CPUs .*engine.threads")):
        with pytest.raises(RunError, match=message):
            RayExecutor(1, missing, (), **{"threads": 1, **more})


def hocket(*args: object, **env: str) -> subprocess.Popen[str]:
    """A command in a process group of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **env}
    command = [sys.executable, "-m", "hocket", *map(str, args)]
    out = subprocess.PIPE
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)


def small(folder: Path) -> Path:
    rows = [{"text": f"Once upon a time there was a {w} number {i}."} for i in range(8) for w in ("dog", "cat")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = folder / "recipe.toml"
    path.write_text(
        f'name = "small"\nturns = 40\n[model]\nsource = "tiny:llama"\n[data]\nsource = "{folder / "rows.jsonl"}"\n'
        'max_length = 16\n[method]\nname = "fedavg"\n[training]\nlocal_steps = 1\n[clients]\ncount = 3\n[evaluation]\nevery = 40\n'
        "[engine]\nthreads = 1\n"
    )
    return path


def final(run: Path) -> str:
    return digest(store.load(run / "checkpoint")[0]["engine"]["server"]["state"]["params"])


def test_runs_through_the_command_line(cluster: str, tmp_path: Path) -> None:
    """On a running cluster, which goes on; and on one of its own, stopped by a signal that reaches all its processes."""
    import ray

    recipe = small(tmp_path)
    own = hocket("run", recipe, "--out", tmp_path / "own", "-q", "--set", "engine.executor=ray", "--set", "engine.workers=2")
    joined = hocket("run", recipe, "--out", tmp_path / "joined", "-q", "--executor", "ray", RAY_ADDRESS=cluster)
    run.start(load(recipe), tmp_path / "inline")
    until, ledger = time.monotonic() + 200, tmp_path / "own" / "ledger.jsonl"
    while not (ledger.exists() and '"step"' in ledger.read_text()) and own.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(own.pid, signal.SIGTERM)
    said = own.communicate(timeout=60)[0]
    assert "go on with: hocket resume" in said
    assert own.returncode == 128 + signal.SIGTERM
    run.resume(tmp_path / "own", workers=0, executor="processes")
    said = joined.communicate(timeout=200)[0]
    assert joined.returncode == 0, said
    assert final(tmp_path / "own") == final(tmp_path / "joined") == final(tmp_path / "inline")
    assert [n["Alive"] for n in ray.nodes()] == [True]


# --- without --------------------------------------------------------------------------------------------------------
def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(HocketError, match=r"'ray' is not installed: pip install 'hocket\[ray\]'"):
        run.start(load(small(tmp_path), ["engine.executor=ray"]), tmp_path / "run")
    with pytest.raises(HocketError, match=r"hocket\[ray\]"):
        RayExecutor(1, missing, (), threads=1)


def test_where_jobs_run_is_no_part_of_a_recipes_hash() -> None:
    plain = {"model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}, "method": {"name": "fedavg"}}
    other = {"executor": "ray", "workers": 8, "gpus": 0.5, "address": "auto"}
    assert parse(plain).hash == parse(plain | {"engine": other}).hash
    for engine, message in (({"gpus": 1.5}, "neither a share"), ({"executor": "rays"}, "engine.executor")):
        with pytest.raises(RecipeError, match=message):
            parse(plain | {"engine": engine})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("own", [True, False])
def test_tensors_travel_as_bytes(dtype: torch.dtype, own: bool) -> None:
    for t in (torch.arange(6).reshape(2, 3).T, torch.tensor(3), torch.zeros(0, 4), torch.arange(100)):
        back = whole(flat(t.to(dtype)), own)
        assert back.dtype == dtype
        assert back.shape == t.shape
        assert torch.equal(back, t.to(dtype))
        assert back.numel() == 0 or back.data_ptr() % 64 == 0 or not own


def test_a_tensor_that_is_not_aligned_like_torchs_own_is_copied() -> None:
    import numpy as np

    data = np.zeros(200, np.uint8)
    odd = data[(1 - data.ctypes.data) % 64 :][:40]
    odd.flags.writeable = False
    assert whole(("float32", [10], odd), own=False).data_ptr() % 64 == 0


def test_tensors_are_put_once_while_a_job_holds_them() -> None:
    puts: list[list[Any]] = []
    shared = Shared(lambda tensors: puts.append(tensors) or len(puts))
    common = {"a": torch.ones(2), "b": torch.ones(3)}
    other = common | {"b": torch.zeros(3), "c": common["a"]}
    for view in (common, common, other):
        shared.hold(view)
    assert shared.place(common) == ({"a": (0, 0), "b": (0, 1)}, [1])
    assert shared.place(common) == ({"a": (0, 0), "b": (0, 1)}, [1])
    assert shared.place(other) == ({"a": (0, 0), "b": (1, 0), "c": (0, 0)}, [1, 2])
    assert [len(p) for p in puts] == [2, 1]
    for view in (common, other, common):
        assert shared._held
        shared.release(view)
    assert not shared._held


@pytest.mark.parametrize(
    ("cards", "gpus", "fits"), [(0, 0, 8), (4, 1, 4), (4, 0.5, 8), (4, 0.4, 8), (2, 0.1, 16), (4, 2, 2), (3, 2, 1), (0, 0.5, 0)]
)
def test_room(cards: int, gpus: float, fits: int) -> None:
    alive = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": float(cards)}}
    assert room([alive, {"Alive": False, "Resources": {"CPU": 99.0}}], 2 if not gpus else 1, gpus) == fits


def test_workers_that_would_not_give_the_same_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(1.0)
    with pytest.raises(RunError, match="install the same on all machines"):
        worker.build(missing, (), 1, ".", {"hocket": "0"})
    monkeypatch.setattr(ray_executor.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="install a torch with CUDA"):
        worker.build(missing, (), 1, ".", versions())


def test_a_proxy_is_refused() -> None:
    ray = SimpleNamespace(is_initialized=lambda: False)
    with pytest.raises(RunError, match="engine.address"):
        ray_executor.connect(ray, "ray://head:10001", 1, 1, 0.0)
