"""A deployed run in one folder: like `hocket.run`, with sites in place of simulated clients."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hocket import store
from hocket.data import apart
from hocket.data.encode import Encoded
from hocket.data.prepare import Prepared
from hocket.deploy.checks import Norms, Weights
from hocket.deploy.engine import Deployment
from hocket.deploy.nouns import Link
from hocket.errors import Interrupted, RecipeError, StoreError
from hocket.evaluations import Evaluations
from hocket.experiment import Experiment
from hocket.ledger import Ledger
from hocket.recipe import Recipe
from hocket.run import Stop

Listener = Callable[[dict[str, Any]], None]
IDENTITY = "identity"  # in a run's folder: what tells it from another of the same name


class Unusable(StoreError):
    """A run's checkpoints are not of this recipe or this hocket, or none is whole; trying again does not mend that."""


def name(folder: Path, recipe: Recipe) -> str:
    """What sites know a run by, from its folder, which `serve` has made: of letters, digits, - and _ alone."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", folder.name)[:60]
    return f"{plain}-{recipe.hash[:8]}-{(folder / IDENTITY).read_text().strip()}"


def check(recipe: Recipe) -> None:
    """Refuse what a deployment cannot do. Raises `RecipeError` naming the field."""
    names = recipe.deployment.sites
    if len(names) != recipe.clients.count or len(set(names)) != len(names):
        raise RecipeError(
            f"deployment.sites: {len(names)} names for clients.count = {recipe.clients.count}; give each site its own"
        )
    if recipe.build_codec("down").differences:
        raise RecipeError(
            "codec.down: differences to what a site holds are for simulations; use a codec of whole tensors"
        )
    if recipe.data.client_heldout:
        raise RecipeError("data.client_heldout: a site's rows stay there and are not scored; set it to 0")


def serve(
    recipe: Recipe, folder: Path, link: Callable[[Path], Link], listener: Listener | None = None,
    stop: Stop | None = None,
) -> Path:  # fmt: skip
    """Run a recipe over a link in `folder`, or go on with what is there.

    Raises:
        HocketError: bad input, or the run cannot go on; the folder can be gone on with.
        Interrupted: asked to stop; a checkpoint was written.
        Unusable: the folder's checkpoints cannot be gone on from.
    """
    check(recipe)
    stop = stop or Stop()
    old = any((folder / "checkpoint").glob("*.hkt"))
    run = store.RunFolder(folder, new=not old and not (folder / IDENTITY).exists())
    try:
        saved: dict[str, Any] | None = None
        if old:
            saved = _load(run, recipe)
            if saved["finished"]:
                _end(run)  # it may have been killed just before it did so itself
                raise StoreError(f"'{folder}' has finished; `hocket report {folder}` shows it")
        if not old:  # nothing of an attempt that died before its first checkpoint counts, here or at the sites
            shutil.rmtree(run.path / "packets", ignore_errors=True)
        if not old or not (run.path / IDENTITY).exists():
            store.put(run.path / IDENTITY, secrets.token_hex(4).encode())
        run.recipe.write_text(recipe.to_toml())
        return _go(recipe, run, link, listener, stop, saved)
    finally:
        run.close()


def _load(run: store.RunFolder, recipe: Recipe) -> dict[str, Any]:
    try:
        state, _ = store.load(run.checkpoints, recipe.hash)
    except StoreError as error:
        raise Unusable(str(error)) from error
    return dict(state)


def _end(run: store.RunFolder) -> None:
    """Say in the manifest that the run has ended and that its last checkpoint is there."""
    run.write_json(run.manifest, json.loads(run.manifest.read_text()) | {"finished": True})


def _go(
    recipe: Recipe, run: store.RunFolder, link: Callable[[Path], Link], listener: Listener | None, stop: Stop,
    saved: dict[str, Any] | None,
) -> Path:  # fmt: skip
    experiment = Experiment(recipe, stop, _held)
    ledger = Ledger(run.ledger, saved["engine"]["ledger"]["position"] if saved else 0, listener)
    server = experiment.server()
    e = recipe.evaluation
    judged = len(experiment.data.heldout) > 0
    evaluations = Evaluations(experiment.evaluate if judged else None, server, ledger, e.every, e.seconds, due=e.start)
    line = link(run.path)
    deployment = Deployment(
        server, line, experiment.down, experiment.up, run.path / "packets", ledger, evaluations,
        ready=recipe.deployment.ready or recipe.clients.count, patience=recipe.deployment.standstill,
        rejoin=recipe.deployment.rejoin, norms=Norms(recipe.deployment.norm_limit),
        weights=Weights(recipe.clients.weighting, recipe.training, recipe.data.max_length),
    )  # fmt: skip
    if saved:
        deployment.load_state_dict(saved["engine"])
    last = server.version

    def checkpoint() -> None:
        state = {"engine": deployment.state_dict(), "finished": deployment.finished}
        store.save(run.checkpoints, deployment.events, state, recipe.hash)
        deployment.saved()

    def on_event() -> None:
        nonlocal last
        if stop():
            raise Interrupted
        if server.version >= last + recipe.engine.checkpoint_every:
            checkpoint()
            last = server.version

    deployment.on_event = on_event
    run.write_json(run.manifest, _manifest(recipe, experiment, deployment.t))
    try:
        deployment.run()
        checkpoint()
    except Interrupted:
        checkpoint()
        raise
    finally:
        line.close()
        run.write_json(run.manifest, _manifest(recipe, experiment, deployment.t))
    ledger.close()
    _end(run)
    return run.path


def _manifest(recipe: Recipe, experiment: Experiment, wall: float) -> dict[str, Any]:
    import hocket
    from hocket.provenance import git_hash

    names = recipe.deployment.sites
    return {
        "name": recipe.name, "hocket": hocket.__version__, "git": git_hash(), "recipe_hash": recipe.hash,
        "clients": [{"id": i, "name": n} for i, n in enumerate(names)], "wall_seconds": round(wall, 3),
        "method": recipe.method["name"], "schedule": str(recipe.schedule["name"]), "codec": str(experiment.up),
        "model": recipe.model.source, "view": experiment.method.view, "trainable": experiment.view.trainable,
        "total": experiment.view.total, "device": str(experiment.view.device), "deployed": True,
    }  # fmt: skip


def _held(recipe: Recipe, tokenizer: Any) -> Prepared:
    """No client's rows; the server's held-out ones."""
    d = recipe.data
    held = apart.judged(
        d.heldout_source, tokenizer, task=recipe.model.task, template=d.template, fields=d.fields,
        max_length=d.max_length, limit=d.heldout_limit,
    )  # fmt: skip
    empty = Encoded([])
    n = recipe.clients.count
    return Prepared([empty] * n, held or empty, [], recipe.deployment.sites, {}, [{} for _ in range(n)], [])
