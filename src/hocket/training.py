"""The local loop: some optimizer steps on one client's rows, from given values to their differences.

Only the tensors a job trains get their own memory, gradients and optimizer state; everything else points at shared
values, and autograd stops below the lowest trained layer because nothing under it requires a gradient. A model may have
weights in half precision: what trains is lifted to fp32 for the job, as in BAdam, and the rest stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hocket.entries import Trained
from hocket.errors import Interrupted
from hocket.methods import Local
from hocket.methods.base import Between, Masks, Penalty
from hocket.methods.nouns import Point
from hocket.models.forward import autocast, loss_sum
from hocket.models.memory import HALVES
from hocket.models.meter import Meter
from hocket.models.views import View
from hocket.sections import Training
from hocket.tree import Tree, generator
from hocket.walking import counted as _count
from hocket.walking import walk

Batch = Mapping[str, Tensor]


class TorchTrainer:
    """Trains the view's model on clients' rows.

    Args:
        view: the one model object that serves all clients of this process.
        data: rows of each client, anything indexable.
        collate: rows to a batch.
        config: optimizer, rate, steps, precision.
        interrupted: asked before every step; when true the job stops with `Interrupted` and has not happened.
        loss: (model, batch) to (summed loss, count); the default covers transformers models.
    """

    def __init__(
        self,
        view: View,
        data: Sequence[Sequence[Any]],
        collate: Callable[[list[Any]], Batch],
        config: Training,
        interrupted: Callable[[], bool] = lambda: False,
        loss: Callable[[Any, Any], tuple[Tensor, int]] = loss_sum,
    ) -> None:
        self.view, self.data, self.collate, self.config = view, data, collate, config
        self.interrupted, self._loss = interrupted, loss
        self._dtypes = {k: p.dtype for k, p in view.params.items()}
        self._cast: dict[str, tuple[Tensor, Tensor]] = {}  # a value as it was given, and in the model's precision
        halves = {p.dtype for p in view.model.parameters()} & HALVES.keys()
        self.precision = HALVES[halves.pop()] if halves and config.precision == "fp32" else config.precision

    def start(self) -> Tree:
        """The view's values as a server holds them: in fp32 at least, so that no update is rounded away."""
        return {k: v.float() if v.dtype in HALVES else v for k, v in self.view.start().items()}

    def loss(self, params: Tree, batch: Any) -> Tensor:
        """Mean loss of a batch with `params` in place."""
        self.place(params)
        with torch.no_grad():
            total, count = self._loss(self.view.model, self._to_device(batch))
        return total / max(count, 1)

    def fit(
        self, local: Local, start: Tree, only: Callable[[str], bool], prox: float,
        penalty: Penalty | None = None, masks: Masks | None = None, between: Between | None = None,
    ) -> Tree:  # fmt: skip
        """Deltas of the selected tensors after this client's local steps (see `Trainer`)."""
        self.place(start)
        names = [k for k in sorted(start) if only(k)]
        trained = Trained(self.view, {k: self._loosen(k, start[k]) for k in names}, start, masks)
        written = sorted(start.keys() - set(names)) if between else []
        try:
            for k in written:  # in the model's precision: nothing of it trains
                self.view.loosen(k).requires_grad_(False)
                self._cast.pop(k, None)
            self._steps(local, trained, prox, penalty, between)
            return trained.deltas()
        finally:
            trained.close()
            self.place({k: start[k] for k in (*names, *written)})

    def steps(self, local: Local) -> int:
        """Optimizer steps of one job of this client."""
        return self.config.steps(len(self.data[local.client]))

    def walk(self, local: Local, start: Tree, only: Callable[[str], bool], beside: int = 0) -> Iterator[Point]:
        """This client's local steps without gradients (see `Trainer`)."""
        return walk(self, local, start, only, beside)

    def place(self, values: Tree) -> None:
        """Put values into the model, in the model's precision; one at a time, so that there are never two models."""
        for k, v in values.items():
            here, dtype = v, self._dtypes.get(k)
            if dtype in HALVES and v.dtype != dtype:
                if k not in self._cast or self._cast[k][0] is not v:
                    self._cast[k] = v, v.to(self.view.device, dtype)
                here = self._cast[k][1]
            self.view.place({k: here})

    def _loosen(self, name: str, value: Tensor) -> nn.Parameter:
        """Let a parameter train in memory of its own, in fp32 at least."""
        p = self.view.loosen(name)
        if p.dtype in HALVES:
            self._cast.pop(name, None)
            p.data = self.view.turned(name, value.to(p.device, torch.float32, copy=True))
        return p

    def gradient_norms(self, local: Local, start: Tree) -> dict[str, float]:
        """Root mean square, over one job's batches, of the norm of each tensor's gradient at `start`. A gradient is
        measured and freed as soon as it is there, so this needs memory for the largest one only."""
        self.place(start)
        squares = dict.fromkeys(sorted(start), 0.0)
        model, hooks = self.view.model, []

        def measure(name: str) -> Callable[[Tensor], None]:
            def hook(p: Tensor) -> None:
                assert p.grad is not None  # the hook is called once it is there
                squares[name] += float(torch.linalg.vector_norm(p.grad, dtype=torch.float64)) ** 2
                p.grad = None

            return hook

        try:
            for k in squares:
                p = self.view.params[k].requires_grad_(True)
                hooks.append(p.register_post_accumulate_grad_hook(measure(k)))
            model.train()  # checkpointing works in training only
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
            batches, examples = 0, 0
            for micro in self._batches(local):
                for batch in micro:
                    if self.interrupted():
                        raise Interrupted
                    with autocast(self.view.device, self.precision):
                        total, _ = self._loss(model, batch)
                    (total / max(_count(batch), 1)).backward()
                    batches += 1
                    examples += len(batch["input_ids"]) if "input_ids" in batch else 1
        finally:
            for hook in hooks:
                hook.remove()
            for k in squares:
                self.view.params[k].requires_grad_(False)
        local.metrics["examples"] = float(examples)
        return {k: (v / max(batches, 1)) ** 0.5 for k, v in squares.items()}

    def _steps(
        self, local: Local, trained: Trained, prox: float, penalty: Penalty | None, between: Between | None
    ) -> None:
        c, device, model = self.config, self.view.device, self.view.model
        optimizer, live = self._optimizer(local, trained, between), list(trained.live.values())
        scaler = self._scaler(local)
        anchors = trained.anchors() if prox else []
        losses, skipped, examples, tokens = [], 0, 0, 0
        # the second step, when the optimizer's state is there, or the only one
        measured = min(1, self.steps(local) - 1) if c.measure_memory else None
        everything = {k: self.view.turned(k, self.view.params[k].data) for k in trained.start} if between else {}
        model.train()
        gpu = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpu):  # dropout draws from the global generator: key it, then leave it as it was
            torch.manual_seed(int(generator(local.seed, "dropout", local.client, local.visit).initial_seed()))
            for i, micro in enumerate(self._batches(local)):
                if self.interrupted():
                    raise Interrupted
                for k in between(i, everything) if between else ():
                    optimizer.state.pop(trained.live[k], None)
                meter = None
                if i == measured:
                    kept = between.held.values() if between else ()
                    meter = Meter(model, [*trained.held, *kept], local.memory.values(), _held(optimizer))
                with meter or nullcontext():
                    count = sum(_count(b) for b in micro)
                    value = sum(self._backward(b, count, scaler, meter) for b in micro)
                    if penalty:  # once a step, however many micro-batches it has; not part of the reported loss
                        scaler.scale(penalty(trained.logical())).backward()
                    if meter:
                        meter.mark("backward", gradients=trained.gradients)
                    scaler.unscale_(optimizer)
                    if prox:
                        for p, anchor in zip(live, anchors, strict=True):  # d/dw mu/2 |w - w_start|^2
                            if p.grad is not None:
                                p.grad.add_(p.detach() - anchor, alpha=prox)
                    finite = bool(torch.isfinite(nn.utils.clip_grad_norm_(live, c.clip or math.inf)))
                    if finite and math.isfinite(value):
                        scaler.step(optimizer)
                        trained.moved()
                        losses.append(value)
                        examples += sum(len(b["input_ids"]) if "input_ids" in b else 1 for b in micro)
                        tokens += count
                    else:
                        skipped += 1
                    scaler.update()
                    if meter:
                        meter.mark("step", optimizer=_held(optimizer))
                    optimizer.zero_grad(set_to_none=True)
                if meter:
                    local.metrics.update(meter.parts)
        if scaler.is_enabled():  # the next job of this client goes on with the scale that it found
            local.memory["scaler/scale"] = torch.tensor([scaler.get_scale(), scaler.state_dict()["_growth_tracker"]])
        local.metrics.update(steps=len(losses), skipped=skipped, examples=examples, tokens=tokens)
        if losses:
            local.metrics["loss"] = sum(losses) / len(losses)
        if c.optimizer_state == "keep":
            for k, p in trained.live.items():
                for slot, v in optimizer.state[p].items():
                    if isinstance(v, Tensor):
                        local.memory[f"optimizer/{slot}/{k}"] = v.cpu()

    def _backward(self, batch: Batch, count: int, scaler: torch.amp.GradScaler, meter: Meter | None) -> float:
        """Add the gradients of one forward pass, as its share of a mean over `count`; returns its share of the loss."""
        with meter.forward() if meter else nullcontext(), autocast(self.view.device, self.precision):
            total, _ = self._loss(self.view.model, batch)
        loss = total / max(count, 1)
        scaler.scale(loss).backward()
        return float(loss.detach())

    def _scaler(self, local: Local) -> torch.amp.GradScaler:
        """Loss scaling for fp16, as this client's last job left it."""
        scaler = torch.amp.GradScaler(self.view.device.type, enabled=self.precision == "fp16")
        if scaler.is_enabled() and (last := local.memory.get("scaler/scale")) is not None:
            scale, growth = last.tolist()
            scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})
        return scaler

    def _optimizer(self, local: Local, trained: Trained, between: Between | None) -> torch.optim.Optimizer:
        c, live = self.config, trained.live
        rates = between.rates if between and c.optimizer == "sgd" else {}
        lr = c.rate(local.turn, local.turns)
        fused = all(p.is_floating_point() for p in live.values()) and self.view.device.type in ("cpu", "cuda")
        optimizer: torch.optim.Optimizer
        alike: dict[tuple[float, float], list[Tensor]] = {}  # by rate and decay
        for k, p in live.items():
            decays = c.decay == "all" or trained.dims[k] > 1
            alike.setdefault((lr * rates.get(k, 1.0), c.weight_decay if decays else 0.0), []).append(p)
        groups: list[dict[str, Any]] = [{"params": ps, "lr": r, "weight_decay": d} for (r, d), ps in alike.items()]
        if c.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr, betas=c.betas, weight_decay=c.weight_decay, fused=fused)
        else:
            optimizer = torch.optim.SGD(groups, lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=fused)
        if c.optimizer_state == "keep":
            for k, p in live.items():
                for slot in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                    if (key := f"optimizer/{slot}/{k}") in local.memory:
                        v = local.memory[key].clone()
                        optimizer.state[p][slot] = v if slot == "step" and not fused else v.to(p.device)
        return optimizer

    def _batches(self, local: Local) -> Iterator[list[Batch]]:
        """The micro-batches of each step: the client's rows in keyed random order, pass after pass."""
        c, rows = self.config, self.data[local.client]
        g = generator(local.seed, "batch", local.client, local.visit)
        order: list[int] = []
        for _ in range(c.steps(len(rows))):
            micro = []
            for _ in range(c.accumulation):
                size = min(c.batch_size, len(rows))
                while len(order) < size:
                    order += torch.randperm(len(rows), generator=g).tolist()
                chosen, order = order[:size], order[size:]
                micro.append(self._to_device(self.collate([rows[i] for i in chosen])))
            yield micro

    def _to_device(self, batch: Batch) -> Batch:
        return {k: v.to(self.view.device, non_blocking=True) for k, v in batch.items()}


def _held(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The optimizer's state, flat."""
    return [v for slots in optimizer.state.values() for v in slots.values()]
