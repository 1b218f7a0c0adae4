"""What a client's machine must hold while it trains, planned from shapes alone. `meter` measures the same parts.

A client whose adapters have a rank of its own is counted with its own factors, in the trace of activations too.

Weights, gradients and optimizer state are counted as the trainer allocates them. Activations are what one forward pass
keeps for the backward pass, found by running the model's own code on tensors without memory, all rows full; the kernels
of another machine may keep a little more or less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from hocket.methods import Local
from hocket.methods.base import Between, Masks, Penalty
from hocket.methods.blocks import LAYER
from hocket.methods.lora import A, B
from hocket.methods.nouns import Point
from hocket.models.forward import autocast
from hocket.models.inference import inference
from hocket.models.views import View
from hocket.tree import Tree, nbytes

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Of some tensors, by name."""
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Precisions in which nothing can be trained: small steps would be rounded away. What trains is lifted to fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that trains, in a step that is not a job's first.

    Attributes:
        weights: the whole model, what trains in fp32 at least.
        trained: start values of what trains, kept for the difference, and what a method keeps from step to step. With
            a GPU they lie in the host's memory, as do `in_flight` and `kept`, and all three are 0 here.
        gradients, optimizer: of what trains; of walks without gradients, what the method keeps within a step.
        in_flight: own updates that the client remembers under overlap.
        kept: other private tensors from job to job: error feedback, kept optimizer state.
        activations: kept from the forward pass for the backward pass; without one, alive at most, logits included.
        logits: their gradient, alive beside all activations when the backward pass begins, and while it is put back
            in its place among all positions there twice. Or the dense gradient of a weight of which only some entries
            train, until they are taken, if that is more.
    """

    weights: int
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    in_flight: int = 0
    kept: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts: what is needed at most."""
        return sum(asdict(self).values())

    @property
    def held(self) -> int:
        """What is there all the time, the optimizer aside."""
        return self.weights + self.trained + self.in_flight + self.kept

    @property
    def table(self) -> dict[str, int]:
        """By the names under which `Meter` measures, without their `memory_`."""
        return {
            "parameters": self.weights + self.trained,
            "private": self.in_flight + self.kept,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            **{f"after_{phase}": n for phase, n in self.phases.items()},
            "peak": self.total,
        }

    @property
    def phases(self) -> dict[str, int]:
        """What is there at the end of each phase of a job; the packet of an upload counts as it is with codec `raw`."""
        return {
            "start": self.held + self.optimizer,
            "forward": self.held + self.optimizer + self.activations,
            "backward": self.held + self.optimizer + self.gradients,
            "step": self.held + self.optimizer + self.gradients,
            "upload": self.held + self.gradients,
        }


@dataclass(frozen=True)
class Step:
    """What a client's optimizer step is made of, beside the tensors that it trains.

    Attributes:
        rows, length: of one forward pass.
        slots: numbers the optimizer keeps for each that trains (AdamW 2, momentum 1, plain SGD 0).
        precision: autocast; model weights of half precision bring their own.
        checkpointing: whether layers are computed again in the backward pass.
        gpu: whether a GPU trains, so that start values and private tensors lie in another memory.
    """

    rows: int
    length: int
    slots: int = 2
    precision: str = "fp32"
    checkpointing: bool = False
    gpu: bool = False


class Fitted(NamedTuple):
    """What one job trains: names of tensors; whether all of it moves at once; of some, how many entries move; the
    bytes of what its method keeps from step to step; the shapes of adapters' factors, the client's own; and whether it
    walks without gradients."""

    names: tuple[str, ...]
    at_once: bool = True
    entries: tuple[tuple[str, int], ...] = ()
    beside: int = 0
    factors: Shapes = ()
    walks: bool = False


@dataclass
class Noted:
    """A trainer that notes what each client's jobs train, for `needs`, and leaves the work to `inner`.

    Attributes:
        jobs: for each client its jobs in order.
    """

    inner: Any
    jobs: dict[int, list[Fitted]] = field(default_factory=dict)

    def fit(
        self, local: Local, start: Tree, only: Callable[[str], bool], prox: float,
        penalty: Penalty | None = None, masks: Masks | None = None, between: Between | None = None,
    ) -> Tree:  # fmt: skip
        """Note the selected tensors."""
        names = tuple(k for k in sorted(start) if only(k))
        entries = tuple((k, masks[k].numel()) for k in names if k in masks) if masks else ()
        beside = nbytes(between.held) if between else 0
        factors = tuple((k, tuple(v.shape)) for k, v in sorted(start.items()) if k.endswith((A, B)))
        self.jobs.setdefault(local.client, []).append(Fitted(names, True, entries, beside, factors))
        return self.inner.fit(local, start, only, prox, penalty, masks, between)

    def gradient_norms(self, local: Local, start: Tree) -> dict[str, float]:
        """Note all tensors: each has a gradient, one at a time, and none moves."""
        self.jobs.setdefault(local.client, []).append(Fitted(tuple(sorted(start)), False))
        return self.inner.gradient_norms(local, start)

    def walk(self, local: Local, start: Tree, only: Callable[[str], bool], beside: int = 0) -> Iterator[Point]:
        """Note that the selected tensors move where they are."""
        names = tuple(k for k in sorted(start) if only(k))
        self.jobs.setdefault(local.client, []).append(Fitted(names, False, beside=beside, walks=True))
        return self.inner.walk(local, start, only, beside)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def needs(
    view: View,
    jobs: Mapping[int, Sequence[Fitted]],
    step: Step,
    ahead: int = 0,
    feedback: bool = False,
    keep: bool = False,
) -> dict[int, Memory]:
    """For each client the memory of its job that needs most.

    Args:
        jobs: see `Noted`.
        ahead: turns a client may be ahead of the server, whose updates it remembers.
        feedback: whether the uplink codec keeps an error for every tensor that was sent.
        keep: whether the optimizer's state stays with the client.
    """
    distinct = {job for done in jobs.values() for job in done}
    size = {job: sum(_moving(view, job).values()) for job in distinct}
    # jobs in layers that are of one size differ only in how deep the backward pass goes: trace the deepest, for all
    key = {j: (size[j], j.at_once, j.names if _lowest(j.names) < 0 else (), *j[2:]) for j in distinct}
    deepest: dict[Any, Fitted] = {}
    for job in sorted(distinct, key=lambda j: (_lowest(j.names), j)):
        deepest.setdefault(key[job], job)
    one = {k: estimate(view, job, step) for k, job in deepest.items()}
    idle, out = Memory(_whole(view, Fitted(()))), {}
    for client, done in jobs.items():
        seen: dict[str, int] = {}
        found = []
        for i, job in enumerate(done):
            need = one[key[job]]
            private = sum(seen.values()) * (feedback + keep * step.slots)
            flying = sum(size[j] + j.beside for j in done[max(0, i - ahead) : i] if j.at_once)
            if not step.gpu:
                need = Memory(**{**asdict(need), "in_flight": flying, "kept": private})
            found.append(need)
            if (feedback or keep) and job.at_once:
                seen |= _moving(view, job)
        out[client] = max(found, key=lambda m: m.total, default=idle)
    return out


def estimate(view: View, job: Fitted, step: Step) -> Memory:
    """Memory of a step of this job, without private tensors."""
    size, entries, beside = _sizes(view, job), dict(job.entries), job.beside
    n, whole = sum(size.values()), _whole(view, job)
    if job.walks:
        alive = inference(view.model, step.rows, step.length, step.precision)
        return Memory(whole, optimizer=beside, activations=alive)
    kept, logits = activations(view, size, step, job.factors)
    if not job.at_once:
        return Memory(whole, gradients=max(size.values(), default=0), activations=kept, logits=logits)
    low = sum(_low(view, job).values())
    counters = 4 * len(size) if step.slots == 2 else 0  # AdamW counts each tensor's steps
    moving = sum(_moving(view, job).values())
    dense = max((size[k] for k in entries), default=0)  # one gradient at a time, until its entries are taken
    vectors = sum(entries.values())  # of 4 bytes: the values, those they started from, and positions of 8
    return Memory(
        whole - low + n + vectors * 12, 0 if step.gpu else n + vectors * 4 + beside, moving,
        moving * step.slots + counters, activations=kept, logits=max(logits, dense),
    )  # fmt: skip


def activations(view: View, names: Iterable[str], step: Step, factors: Shapes = ()) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass of the tensors of `names`, and of the logits' gradients.
    `factors` have these shapes in it."""
    model, chosen = view.model, {id(view.params[k]) for k in names}
    shapes = {id(view.params[k]): shape for k, shape in factors if k in view.params}
    if not chosen:
        return 0, 0
    config, training = model.config, model.training
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # a bare configuration; classification asks for it
    try:
        plain = _trace(model.train(), chosen, step, shapes)
        if not step.checkpointing:
            return plain
        # renamed in later releases of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        kept, logits = _trace(model, chosen, step, shapes)
        return kept + plain[0] // max(getattr(config, "num_hidden_layers", 1), 1), logits  # one layer is there again
    except Exception:  # code that looks at values cannot be traced: per token and layer, 12 hidden and 3 inner vectors
        hidden, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
        vocab, inner = getattr(config, "vocab_size", 0), getattr(config, "intermediate_size", None) or 4 * hidden
        tokens = 4 * step.rows * step.length
        return tokens * (layers * (12 * hidden + 3 * inner) + 2 * vocab), 2 * tokens * vocab
    finally:
        model.train(training)


def _trace(model: Any, chosen: set[int], step: Step, shapes: Mapping[int, tuple[int, ...]]) -> tuple[int, int]:
    """Run the model on fake tensors and add up what autograd saves, each storage once, parameters left out."""
    dtypes = {p.dtype for p in model.parameters()}
    precision = step.precision if step.precision != "fp32" else next((HALVES[d] for d in dtypes if d in HALVES), "fp32")
    saved: dict[int, tuple[Any, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        values: dict[str, Tensor] = {k: torch.empty(b.shape, dtype=b.dtype) for k, b in model.named_buffers()}
        for k, p in model.named_parameters():
            dtype = torch.float32 if id(p) in chosen and p.dtype in HALVES else p.dtype
            values[k] = nn.Parameter(
                torch.empty(shapes.get(id(p), p.shape), dtype=dtype), requires_grad=id(p) in chosen
            )
        own = {v.untyped_storage()._cdata for v in values.values()}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage, storage.nbytes()
            return t

        ids = torch.zeros(step.rows, step.length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, autocast(torch.device("cpu"), precision):
            logits = functional_call(model, values, (), inputs).logits
            logits, labels = (logits, ids[:, 0]) if logits.ndim == 2 else (logits[:, :-1], ids[:, 1:])
            flat = logits.reshape(-1, logits.shape[-1]).float()
            loss = nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="sum")
        del loss
        return sum(n for _, n in saved.values()), 2 * flat.numel() * flat.element_size()


def _whole(view: View, job: Fitted) -> int:
    """Bytes of the model as it is, with the job's factors in place."""
    held = sum(p.numel() * p.element_size() for p in view.model.parameters())
    own = job._replace(names=tuple(k for k, _ in job.factors))
    return held + sum(n - view.params[k].numel() * view.params[k].element_size() for k, n in _low(view, own).items())


def _low(view: View, job: Fitted) -> dict[str, int]:
    """Bytes of each tensor in the model's precision."""
    own, params = dict(job.factors), view.params
    count = {k: math.prod(own[k]) if k in own else params[k].numel() for k in job.names if k in params}
    return {k: n * params[k].element_size() for k, n in count.items()}


def _sizes(view: View, job: Fitted) -> dict[str, int]:
    """Bytes of each tensor as it is trained."""
    dtype = {k: view.params[k].dtype for k in job.names if k in view.params}
    return {k: n * (2 if dtype[k] in HALVES else 1) for k, n in _low(view, job).items()}


def _moving(view: View, job: Fitted) -> dict[str, int]:
    """Bytes of what moves of each tensor."""
    return _sizes(view, job) | {k: 4 * n for k, n in job.entries if k in view.params}


def _lowest(names: Iterable[str]) -> float:
    """The lowest layer among the tensors; what is in no layer may be below all."""
    return min((int(m[1]) if (m := LAYER.search(k)) else -1 for k in names), default=math.inf)
