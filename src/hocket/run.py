"""One run in one folder: start, resume, stop cleanly, write down what happened."""

from __future__ import annotations

import datetime
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import hocket
from hocket import needs, store
from hocket.errors import Interrupted, RecipeError, StoreError, need
from hocket.executors import Executor, Inline, Pool
from hocket.experiment import Experiment, setting_of
from hocket.ledger import Ledger
from hocket.provenance import git_hash
from hocket.ray_executor import RayExecutor
from hocket.recipe import Recipe
from hocket.recipe import load as load_recipe
from hocket.simulate import Simulation

Listener = Callable[[dict[str, Any]], None]


class Stop:
    """Becomes true at the first SIGINT or SIGTERM; a second one ends the process at once (its checkpoints stay)."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside the block. Outside the main thread nothing is caught."""

        def heard(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

        try:
            # one that is ignored stays so: in the background of a shell, and in workers whose parent decides
            heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            before = {n: signal.signal(n, heard) for n in heeded}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)


def start(recipe: Recipe, out: Path, listener: Listener | None = None, stop: Stop | None = None) -> Path:
    """Run a recipe in a new folder.

    Raises:
        HocketError: bad input; the message says what to change.
        Interrupted: stopped by a signal; a checkpoint was written.
    """
    folder = store.RunFolder(out, new=True)
    try:
        folder.manifest.unlink(missing_ok=True)  # of a run that was stopped before it began
        folder.recipe.write_text(recipe.to_toml())
        return _go(recipe, folder, listener, stop or Stop())
    finally:
        folder.close()


def resume(
    out: Path, listener: Listener | None = None, stop: Stop | None = None, workers: int | None = None,
    executor: str | None = None,
) -> Path:  # fmt: skip
    """Go on with a run from its newest whole checkpoint, or from the start if it has none yet.

    Raises:
        StoreError: the folder is no run, is in use, has finished, or none of its checkpoints is whole.
    """
    if not (out / "recipe.toml").exists():
        raise StoreError(f"'{out}' holds no run: recipe.toml is missing; use `hocket run RECIPE --out {out}`")
    other = {"workers": workers, "executor": executor}
    recipe = load_recipe(out / "recipe.toml", [f"engine.{k}={v}" for k, v in other.items() if v is not None])
    folder = store.RunFolder(out, new=False)
    try:
        return _go(recipe, folder, listener, stop or Stop())
    finally:
        folder.close()


def _go(recipe: Recipe, folder: store.RunFolder, listener: Listener | None, stop: Stop) -> Path:
    if recipe.engine.executor == "ray":  # said before minutes are spent on loading
        need("ray", "ray")
    saved: dict[str, Any] | None = None
    warnings: list[str] = []
    spool = store.Spool(folder.spool, recipe.engine.spool_mb << 20)
    if any(folder.checkpoints.glob("*.hkt")):
        saved, warnings = store.load(folder.checkpoints, recipe.hash, spool)
        if saved["finished"]:
            raise StoreError(f"'{folder.path}' has finished; `hocket report {folder.path}` shows it")
    if listener:
        for line in warnings:
            listener({"what": "warning", "text": line})
    began = time.monotonic()
    with stop.listening():
        experiment = Experiment(recipe, stop)
        if stop():
            raise Interrupted
        created, before = _before(folder)
        _write_manifest(folder, experiment, created, before)
        if listener:
            listener({"what": "data", "table": experiment.data.table()})
        needs.note(recipe, experiment.rows, folder, listener)
        ledger = Ledger(folder.ledger, saved["engine"]["ledger"]["position"] if saved else 0, listener)
        executor = _executor(experiment, stop, listener)
        finished = None
        try:
            simulation = _simulation(experiment, spool, ledger, executor, saved)
            _loop(simulation, recipe, folder, stop)
            finished = _now()
        finally:
            executor.close()
            _write_manifest(folder, experiment, created, before + time.monotonic() - began, finished)
        ledger.close()
    return folder.path


def _executor(experiment: Experiment, stop: Stop, listener: Listener | None) -> Executor:
    engine = experiment.recipe.engine
    threads, text = engine.threads or torch.get_num_threads(), experiment.recipe.to_toml()
    if engine.executor == "ray":
        if experiment.view.device.type == "cuda" and not engine.gpus:
            raise RecipeError(
                "engine.gpus: 0 hides GPUs from Ray's workers; give each a share, or set model.device=cpu"
            )

        def warn(text: str) -> None:
            if listener:
                listener({"what": "warning", "text": text})

        return RayExecutor(engine.workers, setting_of, (text,), threads, stop, engine.gpus, engine.address, warn)
    if not engine.workers:
        return Inline(experiment.setting())
    return Pool(engine.workers, setting_of, (text,), threads, stop)


def _simulation(
    experiment: Experiment, spool: store.Spool, ledger: Ledger, executor: Executor, saved: dict[str, Any] | None
) -> Simulation:
    recipe = experiment.recipe
    simulation = Simulation(
        experiment.server(), recipe.devices(), experiment.steps, experiment.down, experiment.up, executor, ledger,
        spool, experiment.evaluate, recipe.evaluation.every, recipe.evaluation.start,
        catch_up=recipe.clients.catch_up == "charged", seconds=recipe.seconds,
        evaluate_seconds=recipe.evaluation.seconds, evaluate_clients=experiment.evaluate_clients,
    )  # fmt: skip
    if saved is not None:
        simulation.load_state_dict(saved["engine"])
    spool.sweep()
    return simulation


def _loop(simulation: Simulation, recipe: Recipe, folder: store.RunFolder, stop: Stop) -> None:
    """Run to the end with a checkpoint every few turns, and one when asked to stop."""
    last = simulation.server.version

    def checkpoint() -> None:
        state = {"engine": simulation.state_dict(), "finished": simulation.finished}
        store.save(folder.checkpoints, simulation.events, state, recipe.hash, simulation.spool)

    def on_event() -> None:
        nonlocal last
        if stop():
            raise Interrupted
        if simulation.server.version >= last + recipe.engine.checkpoint_every:
            checkpoint()
            last = simulation.server.version

    simulation.on_event = on_event
    try:
        simulation.run()
    except Interrupted:
        checkpoint()
        raise
    checkpoint()


def _before(folder: store.RunFolder) -> tuple[str, float]:
    """When the run was first started, and the seconds it has taken until now."""
    try:
        manifest = json.loads(folder.manifest.read_text())
        return str(manifest["created"]), float(manifest["wall_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return _now(), 0.0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write_manifest(
    folder: store.RunFolder, experiment: Experiment, created: str, wall: float, finished: str | None = None
) -> None:
    recipe, view = experiment.recipe, experiment.view
    clients = [
        {
            "id": i, "name": name, "rows": rows, "step_seconds": d.step_seconds, "down_mb_s": d.down_mb_s,
            "up_mb_s": d.up_mb_s, "latency": d.latency, "local_steps": steps,
            "heldout": len(experiment.data.own[i]) if experiment.data.own else 0,
            **{k: experiment.data.summary[i][k] for k in ("cut", "lost", "corrupted")},
        }
        for i, (name, rows, d, steps) in enumerate(
            zip(experiment.data.names, experiment.rows, recipe.devices(), experiment.steps, strict=True)
        )
    ]  # fmt: skip
    folder.write_json(
        folder.manifest,
        {
            "name": recipe.name,
            "hocket": hocket.__version__,
            "git": git_hash(),
            "created": created,
            "finished": finished,
            "recipe_hash": recipe.hash,
            "clients": clients,
            "skipped": {k: len(v) for k, v in experiment.data.skipped.items()},
            "heldout_rows": len(experiment.data.heldout),
            "heldout_cut": int((experiment.data.heldout.cut > 0).sum()),
            "classes": experiment.data.classes,
            "wall_seconds": round(wall, 3),
            "method": recipe.method["name"],
            "schedule": str(recipe.schedule["name"]),
            "codec": str(experiment.up),
            "model": recipe.model.source,
            "view": experiment.method.view,
            "trainable": view.trainable,
            "total": view.total,
            "device": str(view.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    )
