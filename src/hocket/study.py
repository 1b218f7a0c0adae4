"""A comparison as a file: one recipe, its variants, seeds, and the rates to tune over.

    study = "math"
    seeds = [0, 1, 2]
    versus = "FedBCD"                       # differences and tests are against this variant
    [tune]                                  # rates are chosen on other rows than results are measured on
    set = { seed = 100, data = { heldout_source = "none" } }
    [recipe.model]                          # what the variants have in common: a recipe
    ...
    [[variant]]
    name = "FedIT"
    rates = [1e-4, 3e-4, 1e-3]              # one rate needs no tuning; none: as chosen for that name elsewhere
    set = { method = { name = "fedit" } }   # laid over the recipe; a table with another `name` replaces

Plain recipes make a study too, a variant each. Equal recipes are run once, whatever studies they are in.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from hocket.errors import RecipeError
from hocket.recipe import Recipe, load, parse
from hocket.registry import explain
from hocket.sections import Section


class Variant(Section):
    """One line of the comparison."""

    name: str = Field(min_length=1, description="what to call it")
    set: dict[str, Any] = Field(default_factory=dict, description="laid over the study's recipe")
    rates: list[float] = Field(default_factory=list, description="local rates to choose from")
    like: Annotated[str | None, Field(description="variant whose chosen rate it takes; none: of its own name")] = None


class Tune(Section):
    """How rates are chosen: the lowest held-out loss of one run each."""

    set: dict[str, Any] = Field(default_factory=dict, description="laid over every variant while tuning")


class Study(Section):
    """A comparison."""

    study: str = Field(min_length=1, pattern=r"^[\w-]+$", description="what to call it; names the result file")
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1, description="runs of every variant")
    versus: Annotated[str | None, Field(description="variant that the others are tested against; none: the first")] = (
        None
    )
    tune: Tune = Field(default_factory=Tune)
    recipe: dict[str, Any] = Field(description="what all variants have in common")
    variant: list[Variant] = Field(min_length=1)

    def tuning(self, variant: Variant) -> dict[float, Recipe]:
        """The runs that choose this variant's rate; none if there is no choice."""
        if len(variant.rates) < 2:
            return {}
        return {rate: self._build(variant, self.tune.set, rate) for rate in variant.rates}

    def runs(self, variant: Variant, rate: float | None) -> dict[int, Recipe]:
        """The runs of a variant at its rate, by seed."""
        return {seed: self._build(variant, {"seed": seed}, rate) for seed in self.seeds}

    def _build(self, variant: Variant, last: Mapping[str, Any], rate: float | None) -> Recipe:
        data = overlay(overlay(overlay(self.recipe, variant.set), {"name": variant.name}), last)
        if rate is not None:
            data = overlay(data, {"training": {"lr": rate}})
        try:
            return parse(data)
        except RecipeError as error:
            raise RecipeError(f"study '{self.study}', variant '{variant.name}': {error}") from error


def gather(paths: Sequence[Path], seeds: Sequence[int] | None = None) -> list[Study]:
    """The studies in these files; plain recipes among them make one study, a variant each.

    Args:
        seeds: for the plain recipes; none: the seed of the first.

    Raises:
        RecipeError: not TOML, an unknown field, two variants of one name, an unknown `versus`, or a wrong recipe.
    """
    files = {path: _read(path) for path in paths}
    studies = [_study(path, data) for path, data in files.items() if "study" in data]
    if plain := {path: load(path) for path, data in files.items() if "study" not in data}:
        names = [r.name for r in plain.values()]
        variants = [
            {"name": r.name if names.count(r.name) == 1 else path.stem, "set": files[path], "rates": [r.training.lr]}
            for path, r in plain.items()
        ]
        chosen = list(seeds or [next(iter(plain.values())).seed])
        data = {"study": "recipes", "seeds": chosen, "recipe": {}, "variant": variants}
        studies.append(_study(next(iter(plain)), data))
    elif seeds:
        raise RecipeError("--seeds: these are studies, which name their own; change `seeds` in the files")
    names = [s.study for s in studies]
    if twice := {n for n in names if names.count(n) > 1}:
        raise RecipeError(f"study: two files are called '{twice.pop()}'; results are named by it")
    return studies


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"'{path}': {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"'{path}' is not TOML: {error}") from error


def _study(path: Path, data: dict[str, Any]) -> Study:
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"'{path}': {explain(error)}") from error
    names = [v.name for v in study.variant]
    if len(set(names)) < len(names):
        raise RecipeError(f"'{path}': two variants have one name; names are {', '.join(names)}")
    if len(set(study.seeds)) < len(study.seeds):
        raise RecipeError(f"'{path}': seeds: {study.seeds} names one twice, which would count one run as two")
    if both := next((v.name for v in study.variant if v.rates and v.like), None):
        raise RecipeError(f"'{path}': variant '{both}' has rates of its own and is `like` another; leave one out")
    if study.versus is not None and study.versus not in names:
        raise RecipeError(f"'{path}': versus: there is no variant '{study.versus}'; there are {', '.join(names)}")
    for variant in study.variant:  # every recipe is built once before anything runs
        tuning, runs = study.tuning(variant), study.runs(variant, next(iter(variant.rates), None))
        if any(_same_rows(a, b) for a in tuning.values() for b in runs.values()):
            raise RecipeError(
                f"'{path}': tune: variant '{variant.name}' would be tuned on the rows that its results are of; give "
                f"tune.set a data.heldout_source of its own, or 'none' (a share of data.source) if the runs have one"
            )
    return study


def _same_rows(a: Recipe, b: Recipe) -> bool:
    """Whether two recipes are evaluated on the same held-out rows, or may be."""
    if a.data.heldout_source or b.data.heldout_source:
        return a.data.heldout_source == b.data.heldout_source
    return a.data.source == b.data.source and (a.seed == b.seed or a.data.source == "docstrings")


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table; a table whose `name` differs replaces, "none" removes."""
    out = dict(below)
    for key, value in above.items():
        under = out.get(key)
        if isinstance(under, str) and isinstance(value, Mapping) and key in ("method", "schedule"):
            under = {"name": under}  # the short form
        if value == "none":
            out.pop(key, None)
        elif (
            isinstance(value, Mapping) and isinstance(under, Mapping) and value.get("name") in (None, under.get("name"))
        ):
            out[key] = overlay(under, value)
        else:
            out[key] = value
    return out
