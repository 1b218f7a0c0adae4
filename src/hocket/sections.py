"""The tables of a recipe: what each may hold, and what every field means."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from hocket.client import Weighting
from hocket.clock import Device
from hocket.codecs.base import codec as codecs


def entry(registry: Any, field: str) -> BeforeValidator:
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
    adapter: Annotated[
        str | None, Field(min_length=1, description="PEFT LoRA adapter to start from: folder or hub id (LoRA methods)")
    ] = None
    task: Literal["causal", "classification"] = Field("causal", description="next token, or one label a row")
    num_labels: int = Field(2, ge=2, description="labels of a classification head")
    freeze: list[str] = Field(
        default_factory=list,
        description='parameters that stay as they are, as patterns: ["*embeddings*"] (full and blocks)',
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the weights in memory; what trains gets an fp32 copy, as in BAdam (for GPUs)"
    )
    gradient_checkpointing: bool = Field(False, description="trade a second forward pass for activation memory")
    device: str = Field("auto", description="auto (GPU if there is one), cpu, cuda, cuda:1")


class DataSection(Section):
    """Whose data, and how it is split."""

    source: str = Field(
        description="file (.jsonl, .jsonl.gz, .json, .parquet; .txt of text alone), folder, hub id, or docstrings"
    )
    heldout_source: Annotated[str | None, Field(description="held-out rows; none: a share of `source`")] = None
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share of rows held out if there is no heldout_source")
    heldout_limit: Annotated[int | None, Field(ge=1, description="most held-out rows")] = None
    limit: Annotated[int | None, Field(ge=1, description="most rows of `source`, drawn by the seed")] = None
    client_heldout: int = Field(
        0, ge=0, description="rows of each client kept from training; its own held-out loss is evaluated at the end"
    )
    fields: dict[str, str] = Field(default_factory=dict, description="role = column, where names differ")
    template: Literal["auto", "chat", "alpaca", "plain"] = Field("auto", description="how a row becomes text")
    max_length: int = Field(256, ge=8, description="tokens of a row; longer ones are cut, text alone is split")
    packing: bool = Field(False, description="join rows up to max_length")
    partition: Literal["iid", "dirichlet", "natural", "clusters", "lengths"] = Field(
        "iid", description="how rows go to clients"
    )
    column: Annotated[str | None, Field(description="label column of dirichlet and natural")] = None
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is unequal")
    clusters: int = Field(8, ge=2, description="text clusters of partition `clusters`")
    bins: int = Field(4, ge=2, description="bins of partition `lengths`, each of about equally many rows")
    equal: bool = Field(False, description="dirichlet, clusters and lengths give every client equally many rows")
    corruption: float = Field(
        0.0, ge=0, lt=1, description="share of training answers that are spoiled, mean over clients"
    )
    corruption_alpha: float = Field(1.0, gt=0, description="a + b of the Beta of clients' shares; large is equal")
    min_rows: int = Field(1, ge=1, description="fewest rows a client may get")
    fill: bool = Field(False, description="clients with fewer rows than min_rows take some from whoever has most")
    packages: list[str] = Field(default_factory=list, description="packages of `docstrings`; empty: a default list")


class Training(Section):
    """How clients train."""

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="local optimizer")
    lr: float = Field(1e-4, gt=0, description="local rate at turn 0")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="rate over turns, down to 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay (adamw) or L2 (sgd)")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    betas: tuple[float, float] = Field((0.9, 0.999), description="moments of adamw")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="start every job fresh (as BAdam), or keep each tensor's state in the client's memory"
    )
    batch_size: int = Field(4, ge=1, description="rows in one forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes in one optimizer step")
    local_steps: int = Field(4, ge=1, description="optimizer steps a job")
    local_epochs: Annotated[
        float | None, Field(gt=0, description="passes over the client's rows; replaces local_steps")
    ] = None
    decay: Literal["all", "matrices"] = Field(
        "all",
        description="what decays: all that trains, or not norms and biases (as BAdam's code means to)",
    )
    clip: Annotated[float | None, Field(gt=0, description="largest norm of the gradient; none: no clipping")] = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast; bf16 and fp16 are for GPUs")
    measure_memory: bool = Field(False, description="measure one step of every job; the report sets it beside the plan")

    def steps(self, rows: int) -> int:
        """Local steps of a client with that many rows."""
        if self.local_epochs is None:
            return self.local_steps
        return max(1, math.ceil(self.local_epochs * rows / (self.batch_size * self.accumulation)))

    @property
    def slots(self) -> int:
        """Numbers the optimizer keeps for each number that trains."""
        return 2 if self.optimizer == "adamw" else int(self.momentum > 0)

    def rate(self, turn: int, turns: int) -> float:
        """Local rate at `turn` of `turns`."""
        x = turn / max(turns, 1)
        return self.lr * {"constant": 1.0, "linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x))}[self.schedule]


class ClientsSection(Section):
    """How many clients, and what machines and links they have."""

    count: int = Field(4, ge=1, description="number of clients")
    weighting: Weighting = Field(
        "examples", description="an update weighs examples trained on, label tokens trained on, rows held, or 1"
    )
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
    ranks: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="adapter ranks, dealt out evenly, the smallest to the slowest; for methods of unequal ranks",
    )


class CodecSection(Section):
    """How packets are encoded."""

    up: Annotated[dict[str, Any], entry(codecs, "codec.up")] = Field(
        default_factory=lambda: {"name": "raw"}, description="clients to server"
    )
    down: Annotated[dict[str, Any], entry(codecs, "codec.down")] = Field(
        default_factory=lambda: {"name": "raw"}, description="server to clients"
    )


class EvaluationSection(Section):
    """What is measured on the global model."""

    every: int = Field(1, ge=1, description="turns between evaluations; the end always is one")
    seconds: Annotated[float | None, Field(gt=0, description="virtual seconds between evaluations; replaces every")] = (
        None
    )
    start: bool = Field(True, description="evaluate the start model too")
    batch_size: int = Field(8, ge=1, description="rows in one forward pass")
    gsm8k: Annotated[str | None, Field(description="GSM8K test file or hub id; none: not scored")] = None
    gsm8k_limit: int = Field(100, ge=1, description="problems scored")
    gsm8k_tokens: int = Field(256, ge=1, description="most new tokens of an answer")
    rouge: Annotated[
        int | None, Field(ge=1, description="held-out rows answered and scored by Rouge-L (extra 'rouge'); none: off")
    ] = None
    rouge_tokens: int = Field(128, ge=1, description="most new tokens of such an answer")


class EngineSection(Section):
    """How this machine does the work; nothing here changes a result, except `threads` in the last bits."""

    executor: Literal["processes", "ray"] = Field(
        "processes", description="workers are processes here, or actors of a Ray cluster (extra 'ray')"
    )
    workers: int = Field(0, ge=0, description="workers; 0: train in this process (ray: as many as there is room for)")
    threads: int = Field(0, ge=0, description="torch threads of each process; 0: torch's own choice")
    gpus: float = Field(0.0, ge=0, description="GPUs of each worker of ray, also a share such as 0.25")
    address: Annotated[
        str | None, Field(min_length=1, description="Ray cluster; none: RAY_ADDRESS, or one started for this run")
    ] = None
    checkpoint_every: int = Field(1, ge=1, description="turns between checkpoints")
    spool_mb: int = Field(256, ge=0, description="packets in flight kept in memory before they go to disk")
    tensorboard: bool = Field(False, description="log scalars for TensorBoard (extra 'tensorboard')")

    @field_validator("gpus")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value:g} is neither a share of one GPU nor a whole number; use 0.5, 1, 2, ...")
        return value


class DeploymentSection(Section):
    """Machines of different owners; a simulation takes no notice of it."""

    sites: list[str] = Field(
        default_factory=list, description="names of the sites; a site's place is its client number"
    )
    ready: Annotated[
        int | None, Field(ge=1, description="sites that must be there before the first turn; none: all")
    ] = None
    part_mb: float = Field(
        64.0, gt=0, description="megabytes of a packet in one message; memory is about four times that"
    )
    patience: float = Field(300.0, ge=1, description="seconds a message may go unanswered before it is sent again")
    rejoin: float = Field(
        120.0, ge=0, description="seconds a site that went away has to come back to the jobs it was given"
    )
    norm_limit: Annotated[
        float | None,
        Field(gt=1, description="refuse updates over so many times as long as the median of those before; none: take"),
    ] = None
    standstill: float = Field(
        3600.0,
        ge=1,
        description="seconds without a site to ask and without news after which the run ends with an error",
    )
