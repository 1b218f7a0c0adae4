"""Local steps without gradients: a method looks at losses, and moves the model's tensors itself.

The model computes as in inference, so a step needs the weights, the activations of one layer and the logits, and what
the method takes. Dropout is off: losses that are compared are of the same network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hocket.errors import Interrupted, RunError
from hocket.methods import Local
from hocket.methods.nouns import Point
from hocket.models.forward import autocast
from hocket.models.meter import Meter
from hocket.models.views import View
from hocket.tree import Tree

if TYPE_CHECKING:
    from hocket.training import TorchTrainer


class Losses:
    """Losses of one step's batches.

    Args:
        micro: the batches; the loss is the mean over all that they count.
        count: how many tokens, or rows.

    Attributes:
        seen: every loss so far.
    """

    def __init__(self, trainer: TorchTrainer, micro: Sequence[Mapping[str, Tensor]], count: int) -> None:
        self.trainer, self.micro, self.count = trainer, micro, max(count, 1)
        self.seen: list[float] = []

    def here(self) -> float:
        """With the model as it is."""
        with torch.no_grad(), autocast(self.trainer.view.device, self.trainer.precision):
            total = sum(float(self.trainer._loss(self.trainer.view.model, b)[0]) for b in self.micro)
        self.seen.append(total / self.count)
        return self.seen[-1]

    def at_once(self, stacks: Tree) -> list[float]:
        """Of several models in one call; the first dimension of each tensor says which.

        Raises:
            RunError: torch cannot run this model over several sets of values.
        """
        view = self.trainer.view
        name_of = {id(p): k for k, p in view.model.named_parameters()}
        values = {name_of[id(view.params[k])]: x for k, x in stacks.items()}  # the view `full` turns nothing

        def total(params: Tree) -> Tensor:
            model = _Elsewhere(view, params)
            return torch.stack([self.trainer._loss(model, b)[0] for b in self.micro]).sum()

        try:
            with torch.no_grad(), autocast(view.device, self.trainer.precision):
                found = torch.vmap(total)(values).tolist()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            reason, kind = str(error).strip().partition("\n")[0], type(view.model).__name__
            raise RunError(
                f"method.batched: torch cannot compute {kind} at two points in one call: {reason}; use false"
            ) from error
        self.seen += [x / self.count for x in found]
        return self.seen[-len(found) :]


class _Elsewhere:
    """The model with other values; all else is its own."""

    def __init__(self, view: View, params: Tree) -> None:
        self._model, self._params = view.model, params

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return torch.func.functional_call(self._model, self._params, args, inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def walk(trainer: TorchTrainer, local: Local, start: Tree, only: Callable[[str], bool], beside: int) -> Iterator[Point]:
    """One `Point` before each local step of this job (see `Trainer`); metrics as `fit` has them."""
    view, c = trainer.view, trainer.config
    names, rate = [k for k in sorted(start) if only(k)], c.rate(local.turn, local.turns)
    trainer.place(start)
    losses: list[float] = []
    skipped, examples, tokens = 0, 0, 0
    measured = min(1, c.steps(len(trainer.data[local.client])) - 1) if c.measure_memory else None
    training = view.model.training
    view.model.eval()
    try:
        live = {k: _own(trainer, k) for k in names}
        for i, micro in enumerate(trainer._batches(local)):
            if trainer.interrupted():
                raise Interrupted
            count = sum(map(counted, micro))
            value = Losses(trainer, micro, count)
            point = Point(live, value.here, value.at_once, rate)
            meter = Meter(view.model, [], local.memory.values(), []) if i == measured else None
            with meter or nullcontext():
                yield point
                if meter:
                    meter.mark("backward", gradients=[])
                    meter.mark("step")
            if meter:
                local.metrics.update(_measured(meter, beside, there=i > 0))
            # a dropped step was computed on its rows too: it counts as one that moved nothing
            examples += sum(len(b["input_ids"]) if "input_ids" in b else 1 for b in micro)
            tokens += count
            if point.used:
                losses.append(sum(value.seen) / max(len(value.seen), 1))
            skipped += not point.used
    finally:
        view.model.train(training)
        trainer.place({k: start[k] for k in names})
    local.metrics.update(steps=len(losses), skipped=skipped, examples=examples, tokens=tokens)
    if losses:
        local.metrics["loss"] = sum(losses) / len(losses)


def _measured(meter: Meter, beside: int, there: bool) -> dict[str, float]:
    """What a step held, by the names under which steps with gradients are measured; the method's own `beside` bytes
    were `there` before it, or were taken in it."""
    parts = {k: v + beside * (there and ("after" in k or "peak" in k)) for k, v in meter.parts.items()}
    parts["memory_after_start"] += beside * (not there)
    alive = parts["memory_peak"] - parts["memory_after_start"]
    return parts | {
        "memory_optimizer": float(beside), "memory_activations": alive, "memory_after_forward": parts["memory_peak"],
    }  # fmt: skip


def _own(trainer: TorchTrainer, name: str) -> Tensor:
    """A tensor of the model, in memory of its own and in the model's precision."""
    p = trainer.view.loosen(name).requires_grad_(False)
    trainer._cast.pop(name, None)
    return trainer.view.turned(name, p.data)


def counted(batch: Mapping[str, Tensor]) -> int:
    """What the loss of a batch sums over: label tokens, or rows."""
    labels = batch["labels"]
    return len(labels) if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())
