"""The typed experiment: one TOML file is one result.

Unknown keys, wrong types and impossible combinations are refused with the field's path and the nearest name.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from hocket.clock import Device
from hocket.codecs import Codec
from hocket.codecs.base import codec as codecs
from hocket.errors import RecipeError, nearest
from hocket.methods import Client, Method
from hocket.methods import method as methods
from hocket.methods.lora import LoRA
from hocket.methods.unequal import Unequal
from hocket.registry import explain
from hocket.schedules import Schedule
from hocket.schedules import schedule as schedules
from hocket.sections import (
    ClientsSection,
    CodecSection,
    DataSection,
    DeploymentSection,
    EngineSection,
    EvaluationSection,
    ModelSection,
    Section,
    Training,
    entry,
)  # fmt: skip
from hocket.tree import generator

PRESETS: dict[str, dict[str, Any]] = {
    "parablock": {"method": {"name": "fedbcd"}, "schedule": {"name": "overlap", "staleness": 1}},
    "fedcybgd": {"method": {"name": "fedcybgd"}, "schedule": {"name": "cyclic"}},
    # the lowest loss of the combinations tried in docs/asynchronous.md
    "async": {
        "schedule": {"name": "fedfa", "window": 4},
        "codec": {"up": {"name": "feedback", "codec": "int4"}},
    },
}
"""Published systems as points in the space; what a recipe sets itself wins."""


class Recipe(Section):
    """A whole experiment."""

    name: str = Field("run", min_length=1, description="what to call it")
    seed: int = Field(0, ge=0, description="keys every random draw")
    turns: int = Field(8, ge=1, description="aggregations (rounds)")
    seconds: Annotated[
        float | None,
        Field(gt=0, description="virtual seconds after which the run ends, whatever its turns; none: any"),
    ] = None
    preset: Annotated[str | None, Field(description="a published system: " + ", ".join(PRESETS))] = None
    model: ModelSection
    data: DataSection
    method: Annotated[dict[str, Any], entry(methods, "method")]
    schedule: Annotated[dict[str, Any], entry(schedules, "schedule")] = Field(default_factory=lambda: {"name": "sync"})
    codec: CodecSection = Field(default_factory=CodecSection)
    training: Training = Field(default_factory=lambda: Training.model_validate({}))
    clients: ClientsSection = Field(default_factory=lambda: ClientsSection.model_validate({}))
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection.model_validate({}))
    engine: EngineSection = Field(default_factory=lambda: EngineSection.model_validate({}))
    deployment: DeploymentSection = Field(default_factory=lambda: DeploymentSection.model_validate({}))

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        """Refuse what cannot work together before anything is loaded."""
        m, s = self.build_method(), self.build_schedule()
        own = methods.build(self.method)
        for key in self.method.keys() - {"name"}:
            if getattr(own, key) != getattr(m, key):
                raise ValueError(f"method.{key}: schedule '{s.name}' sets it itself; leave it out here")
        if reason := s.refuses(m):
            raise ValueError(f"schedule: {reason}")
        if reason := m.unfit(self.training):
            raise ValueError(f"training.{reason}")
        if s.carries and self.build_codec("up").remembers:
            raise ValueError("codec.up: what clients send under schedule.caches = 'clients' is feedback already")
        if not m.increments and self.build_codec("up").remembers:
            raise ValueError(f"codec.up: '{m.name}' sends new factors each time, to which an old error does not belong")
        if not m.increments and self.training.optimizer_state == "keep":
            raise ValueError(f"training.optimizer_state: '{m.name}' starts new factors each time; use 'reset'")
        if (
            self.data.partition in ("dirichlet", "natural")
            and not self.data.column
            and self.data.source != "docstrings"
        ):
            raise ValueError(f"data.column: partition '{self.data.partition}' needs a label column")
        if self.model.adapter and not isinstance(m, LoRA):
            raise ValueError(
                f"model.adapter: '{m.name}' has no LoRA factors; merge the adapter into a model, or use method 'fedit'"
            )
        if m.personal and not self.data.client_heldout:
            raise ValueError(
                f"data.client_heldout: '{m.name}' leaves each client a model of its own, which is scored on rows that "
                "the client keeps from training; say how many"
            )
        asked = next((key for key in ("gsm8k", "rouge") if getattr(self.evaluation, key) is not None), None)
        if m.personal and asked:
            raise ValueError(f"evaluation.{asked}: '{m.name}' leaves each client a model of its own, and none to ask")
        if self.model.task == "classification" and self.data.packing:
            raise ValueError("data.packing: rows of a classification task are not joined; set it to false")
        if self.model.task == "classification" and asked:
            raise ValueError(f"evaluation.{asked}: a classification model writes no answers; use model.task = 'causal'")
        cohort = getattr(s, "cohort", None)
        if isinstance(cohort, int) and cohort > self.clients.count:
            raise ValueError(f"schedule.cohort: {cohort} clients a turn, but clients.count is {self.clients.count}")
        if getattr(s, "minimum", 1) > (cohort if isinstance(cohort, int) else self.clients.count):
            raise ValueError(f"schedule.minimum: {getattr(s, 'minimum', 1)} arrivals can never come from the cohort")
        if (getattr(s, "concurrency", None) or 0) > self.clients.count:
            raise ValueError(f"schedule.concurrency: more clients at work than clients.count = {self.clients.count}")
        if len(self.clients.each) > self.clients.count:
            raise ValueError(f"clients.each: {len(self.clients.each)} entries for {self.clients.count} clients")
        if self.build_codec("down").remembers:
            raise ValueError("codec.down: error feedback keeps a model per client on the server; use it in codec.up")
        if m.verbatim and not self.build_codec("down").lossless:
            raise ValueError(f"codec.down: '{self.codec.down['name']}' loses bits, and {m.verbatim}")
        if self.training.precision != "fp32" and self.model.device == "cpu":
            raise ValueError(f"training.precision: '{self.training.precision}' is for GPUs; use 'fp32' on the CPU")
        self.devices()
        return self

    def build_method(self) -> Method:
        """The method as a value, as the schedule runs it."""
        return self.build_schedule().adapt(methods.build(self.method))

    def build_schedule(self) -> Schedule:
        """The schedule as a value."""
        return schedules.build(self.schedule)

    def build_codec(self, direction: Literal["up", "down"]) -> Codec:
        """The codec of one direction."""
        return codecs.build(self.codec.up if direction == "up" else self.codec.down, f"codec.{direction}")

    def devices(self) -> list[Device]:
        """Each client's machine and link. Raises `ValueError` naming the entry that is wrong."""
        known = set(Device.__dataclass_fields__)
        base = {k: getattr(self.clients.device, k) for k in known}
        out = []
        for c in range(self.clients.count):
            values = dict(base)
            for key, factor in sorted(self.clients.spread.items()):
                if key not in known or not isinstance(base[key], float | int):
                    raise ValueError(f"clients.spread.{key}: not a number of a device{nearest(key, known)}")
                if factor <= 0:
                    raise ValueError(f"clients.spread.{key}: {factor} is not a factor; use a number above 0")
                u = float(torch.rand((), generator=generator(self.seed, "spread", key, c)))
                values[key] = base[key] * factor**u
            for key, value in (self.clients.each[c] if c < len(self.clients.each) else {}).items():
                if key not in known:
                    raise ValueError(f"clients.each.{c}.{key}: a device has no such field{nearest(key, known)}")
                values[key] = value
            try:
                out.append(TypeAdapter(Device).validate_python(values))
            except ValidationError as error:
                raise ValueError(explain(error, f"clients.each.{c}")) from error
        return self._ranked(out)

    def _ranked(self, devices: list[Device]) -> list[Device]:
        """Devices with ranks out of `clients.ranks`, where they have none of their own, by how fast they are."""
        ranks, n = sorted(self.clients.ranks), len(devices)
        order = sorted(range(n), key=lambda c: (-devices[c].step_seconds, devices[c].up_mb_s, devices[c].down_mb_s, c))
        due = {c: ranks[place * len(ranks) // n] for place, c in enumerate(order)} if ranks else {}
        out = [replace(d, rank=d.rank or due.get(c)) for c, d in enumerate(devices)]
        method = methods.build(self.method)
        top = max(d.rank or 0 for d in out)
        if isinstance(method, Unequal) and top > method.rank:
            raise ValueError(f"clients.ranks: a client has rank {top}, the server keeps method.rank = {method.rank}")
        return out

    def server_clients(self, rows: Sequence[int]) -> list[Client]:
        """What the server knows of each client, given the rows they hold."""
        return [
            Client(c, n, {"rank": d.rank} if d.rank else {})
            for c, (n, d) in enumerate(zip(rows, self.devices(), strict=True))
        ]

    @property
    def hash(self) -> str:
        """16 hex digits of everything that can change a result."""
        engine = {"executor", "workers", "gpus", "address", "checkpoint_every", "tensorboard"}
        plain = self.model_dump(mode="json", exclude={"name": True, "deployment": True, "engine": engine})
        if not self.clients.device.message_seconds:  # recipes from before there was this field keep their hashes
            del plain["clients"]["device"]["message_seconds"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        """The effective recipe, defaults filled in."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set a.b=value` overrides (values are TOML; a bare word is a string).

    Raises:
        RecipeError: the file is missing or not TOML, or a field is wrong; the message names file and field.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"recipe '{path}': {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe '{path}' is not TOML: {error}") from error
    for item in overrides:
        _override(data, item)
    try:
        return parse(data)
    except RecipeError as error:
        raise RecipeError(f"recipe '{path}': {error}") from error


def parse(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data. Raises `RecipeError` with a line for each wrong field."""
    filled = dict(data)
    if (name := filled.get("preset")) is not None:
        if name not in PRESETS:
            raise RecipeError(f"preset: there is no '{name}'{nearest(str(name), PRESETS)}")
        for section, values in PRESETS[name].items():
            given = filled.get(section, {})
            given = {"name": given} if isinstance(given, str) else given
            same = given.get("name", values.get("name")) == values.get("name")
            filled[section] = {**values, **given} if same else given
    _unknown(filled, Recipe, "")
    try:
        return Recipe.model_validate(filled)
    except ValidationError as error:
        raise RecipeError(explain(error)) from error


def _unknown(data: Mapping[str, Any], section: type[BaseModel], path: str) -> None:
    """Name the first unknown key, with the nearest known one; pydantic alone would not suggest."""
    for key, value in data.items():
        if key not in section.model_fields:
            raise RecipeError(f"{path}{key}: unknown{nearest(key, section.model_fields)}")
        inner = section.model_fields[key].annotation
        if isinstance(inner, type) and isinstance(value, Mapping):
            if issubclass(inner, BaseModel):
                _unknown(value, inner, f"{path}{key}.")
            elif inner is Device and (odd := sorted(set(value) - set(Device.__dataclass_fields__))):
                raise RecipeError(f"{path}{key}.{odd[0]}: unknown{nearest(odd[0], Device.__dataclass_fields__)}")


def _override(data: dict[str, Any], item: str) -> None:
    key, sign, text = item.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {item}: write it as field.path=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word
    *path, last = key.strip().split(".")
    here = data
    for part in path:
        below = here.get(part, {})
        here[part] = {"name": below} if isinstance(below, str) else below
        here = here[part]
        if not isinstance(here, dict):
            raise RecipeError(f"--set {item}: '{part}' is not a table")
    here[last] = value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value
