"""How a site opens a run: the recipe's model, method and training, with this site's own rows."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hocket.data import apart
from hocket.data.prepare import Prepared
from hocket.deploy.site import Site
from hocket.deploy.worker import Opener
from hocket.errors import HocketError, RecipeError
from hocket.experiment import Experiment
from hocket.methods import Client
from hocket.recipe import Recipe, parse

OWN = ("source", "fields", "limit")
"""What a site says of its data; the rest (template, lengths) is the recipe's, the same for all."""


def read(path: Path) -> dict[str, Any]:
    """A site's file: `name`, `superlink`, its private section `[data]`, and where the model lies here if elsewhere.

    Raises:
        RecipeError: it is missing, not TOML, or a field is unknown or missing.
    """
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"site file '{path}': {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"site file '{path}' is not TOML: {error}") from error
    known: dict[str, tuple[str, ...]] = {"data": OWN, "model": ("source", "device"), "engine": ("threads",)}
    plain = ("name", "superlink", "certificate", "key", "port", "folder")
    for key, value in found.items():
        if key not in (*known, *plain):
            raise RecipeError(f"site file '{path}': {key}: unknown; there are {', '.join((*plain, *known))}")
        for inner in value if key in known else ():
            if inner not in known[key]:
                raise RecipeError(f"site file '{path}': {key}.{inner}: unknown; there are {', '.join(known[key])}")
    for need in ("name", "data"):
        if need not in found:
            raise RecipeError(f"site file '{path}': {need}: missing")
    if "source" not in found["data"]:
        raise RecipeError(f"site file '{path}': data.source: missing; the file or folder of this site's rows")
    return found


def opener(site: Mapping[str, Any], beside: Path) -> Opener:
    """Opens runs with the site's own data, and its own place of the model, where it has one. Paths are as seen from
    `beside`, the folder of the site's file."""
    source = place(site, beside)

    def opens(toml: str, client: int, folder: Path) -> Site:
        recipe = parse(tomllib.loads(toml))
        for section in ("model", "engine"):
            if section in site:
                changed = getattr(recipe, section).model_copy(update=dict(site[section]))
                recipe = recipe.model_copy(update={section: changed})
        experiment = Experiment(recipe, pace(), lambda r, tokenizer: rows(r, tokenizer, client, site, source))
        held = len(experiment.data.clients[client])
        setting = experiment.setting()
        who = recipe.server_clients([held] * recipe.clients.count)[client]
        start = experiment.trainer.start()
        return Site(setting, start, experiment.down, who, folder, recipe.clients.preloaded)

    return opens


def pace() -> Callable[[], bool]:
    """What a site's trainer asks before each local step. For benchmarks: HOCKET_STEP_SECONDS in a worker's environment
    makes it wait that long first, so that a site is slow and its machine idle."""
    seconds = float(os.environ.get("HOCKET_STEP_SECONDS", "0"))

    def ask() -> bool:
        time.sleep(seconds)
        return False

    return ask


def place(site: Mapping[str, Any], beside: Path) -> str:
    """Where a site's rows are, as seen from `beside`, the folder of its file, if they are there."""
    source = str(site["data"]["source"])
    return str(beside / source) if (beside / source).exists() else source


def rows(recipe: Recipe, tokenizer: Any, client: int, site: Mapping[str, Any], source: str) -> Prepared:
    """A site's rows as the recipe wants them, as those of client `client`; the others have none here."""
    d = recipe.data
    try:
        return apart.alone(
            source, tokenizer, client, str(site["name"]), task=recipe.model.task, template=d.template,
            fields=site["data"].get("fields") or d.fields, max_length=d.max_length, packing=d.packing,
            limit=site["data"].get("limit"), seed=recipe.seed,
        )  # fmt: skip
    except HocketError as error:
        # the server hears that something is wrong, not what is in this site's files
        raise type(error)(str(error).replace(source, "the site's data")) from error


def shared(recipe: Recipe) -> str:
    """What sites are told of a recipe: all but the server's own data."""
    data = recipe.data.model_copy(update={"heldout_source": None, "source": "at the sites"})
    return recipe.model_copy(update={"data": data}).to_toml()


__all__ = ["Client", "opener", "place", "read", "rows", "shared"]
