"""The typed experiment: one TOML file is one result.

Unknown keys, wrong types and impossible combinations are refused with the field's path and the nearest name.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hocket.client import Weighting
from hocket.clock import Device
from hocket.codecs import Codec
from hocket.codecs.base import codec as codecs
from hocket.errors import RecipeError, nearest
from hocket.methods import Method
from hocket.methods import method as methods
from hocket.registry import explain
from hocket.schedules import Schedule
from hocket.schedules import schedule as schedules
from hocket.training import Training

PRESETS: dict[str, dict[str, Any]] = {
    "parablock": {"method": {"name": "fedbcd"}, "schedule": {"name": "overlap", "staleness": 1}},
    "fedcybgd": {"method": {"name": "fedcybgd"}, "schedule": {"name": "cyclic"}},
}
"""Published systems as points in the space; what a recipe sets itself wins."""


def _entry(registry: Any, field: str) -> BeforeValidator:
    """Keep the plain data (it is what gets saved), once it has been shown to build."""

    def check(value: Any) -> Any:
        registry.build(value, field)
        return {"name": value} if isinstance(value, str) else value

    return BeforeValidator(check)


class Section(BaseModel):
    """A table of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """Which model."""

    source: str = Field(description="hub id, folder, .gguf file, a name from `hocket models list`, or tiny:llama")
    task: Literal["causal", "classification"] = Field("causal", description="next token, or one label a row")
    num_labels: int = Field(2, ge=2, description="labels of a classification head")
    gradient_checkpointing: bool = Field(False, description="trade a second forward pass for activation memory")
    device: str = Field("auto", description="auto (GPU if there is one), cpu, cuda, cuda:1")


class DataSection(Section):
    """Whose data, and how it is split."""

    source: str = Field(description="file (.jsonl, .jsonl.gz, .parquet), folder, hub id, or the built-in docstrings")
    heldout_source: Annotated[str | None, Field(description="held-out rows; none: a share of `source`")] = None
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share of rows held out if there is no heldout_source")
    heldout_limit: Annotated[int | None, Field(ge=1, description="most held-out rows")] = None
    limit: Annotated[int | None, Field(ge=1, description="most rows of `source`, drawn by the seed")] = None
    fields: dict[str, str] = Field(default_factory=dict, description="role = column, where names differ")
    template: Literal["auto", "chat", "alpaca", "plain"] = Field("auto", description="how a row becomes text")
    max_length: int = Field(256, ge=8, description="tokens of a row; longer ones are cut, keeping an answer token")
    packing: bool = Field(False, description="join rows up to max_length")
    partition: Literal["iid", "dirichlet", "natural", "clusters"] = Field("iid", description="how rows go to clients")
    column: Annotated[str | None, Field(description="label column of dirichlet and natural")] = None
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is unequal")
    clusters: int = Field(8, ge=2, description="text clusters of partition `clusters`")
    min_rows: int = Field(1, ge=1, description="fewest rows a client may get")
    fill: bool = Field(False, description="clients with fewer rows than min_rows take some from whoever has most")
    packages: list[str] = Field(default_factory=list, description="packages of `docstrings`; empty: a default list")


class ClientsSection(Section):
    """How many clients, and what machines and links they have."""

    count: int = Field(4, ge=1, description="number of clients")
    weighting: Weighting = Field("examples", description="an update weighs examples trained on, rows held, or 1")
    preloaded: bool = Field(True, description="clients hold the start model before the run, so it costs no bytes")
    catch_up: Literal["charged", "free"] = Field(
        "charged", description="a client's downloads of what it missed: charged as they are, or free (still listed)"
    )
    device: Device = Field(default=Device(), description="machine and link of every client")
    spread: dict[str, float] = Field(
        default_factory=dict,
        description="field of device = factor f; a client's value is multiplied by f^u, u in [0, 1]",
    )
    each: list[dict[str, Any]] = Field(default_factory=list, description="changes to device for client 0, 1, ...")


class CodecSection(Section):
    """How packets are encoded."""

    up: Annotated[dict[str, Any], _entry(codecs, "codec.up")] = Field(
        default_factory=lambda: {"name": "raw"}, description="clients to server"
    )
    down: Annotated[dict[str, Any], _entry(codecs, "codec.down")] = Field(
        default_factory=lambda: {"name": "raw"}, description="server to clients"
    )


class EvaluationSection(Section):
    """What is measured on the global model."""

    every: int = Field(1, ge=1, description="turns between evaluations; the end always is one")
    start: bool = Field(True, description="evaluate the start model too")
    batch_size: int = Field(8, ge=1, description="rows in one forward pass")
    gsm8k: Annotated[str | None, Field(description="GSM8K test file or hub id; none: not scored")] = None
    gsm8k_limit: int = Field(100, ge=1, description="problems scored")
    gsm8k_tokens: int = Field(256, ge=1, description="most new tokens of an answer")


class EngineSection(Section):
    """How this machine does the work; nothing here changes a result, except `threads` in the last bits."""

    workers: int = Field(0, ge=0, description="worker processes; 0 trains in this one")
    threads: int = Field(0, ge=0, description="torch threads of each process; 0: torch's own choice")
    checkpoint_every: int = Field(1, ge=1, description="turns between checkpoints")
    spool_mb: int = Field(256, ge=0, description="packets in flight kept in memory before they go to disk")
    tensorboard: bool = Field(False, description="log scalars for TensorBoard (extra 'tensorboard')")


class Recipe(Section):
    """A whole experiment."""

    name: str = Field("run", min_length=1, description="what to call it")
    seed: int = Field(0, ge=0, description="keys every random draw")
    turns: int = Field(8, ge=1, description="aggregations (rounds)")
    preset: Annotated[str | None, Field(description="a published system: " + ", ".join(PRESETS))] = None
    model: ModelSection
    data: DataSection
    method: Annotated[dict[str, Any], _entry(methods, "method")]
    schedule: Annotated[dict[str, Any], _entry(schedules, "schedule")] = Field(default_factory=lambda: {"name": "sync"})
    codec: CodecSection = Field(default_factory=CodecSection)
    training: Training = Field(default_factory=lambda: Training.model_validate({}))
    clients: ClientsSection = Field(default_factory=lambda: ClientsSection.model_validate({}))
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection.model_validate({}))
    engine: EngineSection = Field(default_factory=lambda: EngineSection.model_validate({}))

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        """Refuse what cannot work together before anything is loaded."""
        m, s = self.build_method(), self.build_schedule()
        if s.ahead and not m.additive:
            raise ValueError(
                f"schedule: '{s.name}' needs an additive step, method.server_optimizer = '{m.server_optimizer}' has "
                f"none; use method.server_optimizer = 'sgd' or schedule.name = 'sync'"
            )
        if (
            self.data.partition in ("dirichlet", "natural")
            and not self.data.column
            and self.data.source != "docstrings"
        ):
            raise ValueError(f"data.column: partition '{self.data.partition}' needs a label column")
        if self.model.task == "classification" and self.data.packing:
            raise ValueError("data.packing: rows of a classification task are not joined; set it to false")
        if self.model.task == "classification" and self.evaluation.gsm8k:
            raise ValueError("evaluation.gsm8k: a classification model cannot write answers; use model.task = 'causal'")
        cohort = getattr(s, "cohort", None)
        if isinstance(cohort, int) and cohort > self.clients.count:
            raise ValueError(f"schedule.cohort: {cohort} clients a turn, but clients.count is {self.clients.count}")
        if getattr(s, "minimum", 1) > (cohort if isinstance(cohort, int) else self.clients.count):
            raise ValueError(f"schedule.minimum: {getattr(s, 'minimum', 1)} arrivals can never come from the cohort")
        if len(self.clients.each) > self.clients.count:
            raise ValueError(f"clients.each: {len(self.clients.each)} entries for {self.clients.count} clients")
        if "feedback" in str(self.build_codec("down")):
            raise ValueError("codec.down: error feedback keeps a model per client on the server; use it in codec.up")
        if self.training.precision != "fp32" and self.model.device == "cpu":
            raise ValueError(f"training.precision: '{self.training.precision}' is for GPUs; use 'fp32' on the CPU")
        self.devices()
        return self

    def build_method(self) -> Method:
        """The method as a value."""
        return methods.build(self.method)

    def build_schedule(self) -> Schedule:
        """The schedule as a value."""
        return schedules.build(self.schedule)

    def build_codec(self, direction: Literal["up", "down"]) -> Codec:
        """The codec of one direction."""
        return codecs.build(self.codec.up if direction == "up" else self.codec.down, f"codec.{direction}")

    def devices(self) -> list[Device]:
        """Each client's machine and link. Raises `ValueError` naming the entry that is wrong."""
        import torch
        from pydantic import TypeAdapter

        from hocket.tree import generator

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
        return out

    @property
    def hash(self) -> str:
        """16 hex digits of everything that can change a result."""
        plain = self.model_dump(
            mode="json", exclude={"name": True, "engine": {"workers", "checkpoint_every", "tensorboard"}}
        )
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
            filled[section] = {**values, **given} if given.get("name", values["name"]) == values["name"] else given
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
