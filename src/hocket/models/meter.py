"""What a step really holds in memory, by what it is for: the measured side of `hocket.models.memory`.

Parts are the bytes of real tensors, each storage once. Live bytes at the end of a phase, and their peak, are the
allocator's own: `torch.cuda` on a GPU, on the CPU the profiler's record of every allocation since the step began.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PHASE = "hocket.phase."


def size(tensors: Iterable[Any]) -> float:
    """Bytes of distinct tensors, of a cut only its own; what is no tensor is passed over."""
    sizes: dict[int, int] = {}
    for t in tensors:
        if isinstance(t, Tensor):
            sizes[t.data_ptr()] = max(sizes.get(t.data_ptr(), 0), min(t.nbytes, t.untyped_storage().nbytes()))
    return float(sum(sizes.values()))


class Meter:
    """Measures one optimizer step: `with meter:` around it, `forward` around each forward pass, `mark` at other phases.

    Args:
        model: what computes.
        start: start values of what trains; counted if they lie on the model's device.
        private: the client's tensors from earlier jobs, counted likewise.
        state: the optimizer's state from earlier steps.

    Attributes:
        parts: bytes `memory_parameters`, `memory_private`, `memory_activations` and what is given to `mark`; live bytes
            `memory_after_<phase>`, and `memory_peak`.
    """

    def __init__(self, model: Any, start: Iterable[Tensor], private: Iterable[Tensor], state: Iterable[Any]) -> None:
        self.device = next(model.parameters()).device
        held = [*model.parameters(), *model.buffers(), *(t for t in start if t.device == self.device)]
        apart = [t for t in private if t.device == self.device]
        self._own = {t.untyped_storage().data_ptr() for t in held}
        self._before = size([*held, *apart, *state])
        self.parts = {"memory_parameters": size(held), "memory_private": size(apart), "memory_activations": 0.0}
        self._profile: Any = None

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to the terminal
            cpu = torch.profiler.ProfilerActivity.CPU
            self._profile = torch.profiler.profile(activities=[cpu], profile_memory=True)
            self._profile.__enter__()
        self.mark("start")
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._profile is None:
            self.parts["memory_peak"] = float(torch.cuda.max_memory_allocated(self.device))
        else:
            self._profile.__exit__(*failure)
            self._read(self._profile.profiler.kineto_results.events())

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass: what autograd saves in it for the backward pass, parameters left out."""
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self._own:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield
        self.parts["memory_activations"] = max(self.parts["memory_activations"], float(sum(saved.values())))
        self.mark("forward")

    def mark(self, phase: str, **parts: Iterable[Any]) -> None:
        """The end of a phase, and what tensors some parts are now."""
        self.parts |= {f"memory_{k}": size(tensors) for k, tensors in parts.items()}
        if self.device.type == "cuda":
            self.parts[f"memory_after_{phase}"] = float(torch.cuda.memory_allocated(self.device))
        else:
            with torch.profiler.record_function(PHASE + phase):
                pass

    def _read(self, events: Iterable[Any]) -> None:
        """Live bytes: what was there before, plus all that came since, minus all that went."""
        live = peak = self._before
        for e in sorted(events, key=lambda e: e.start_ns()):
            if e.name() == "[memory]":
                live += e.nbytes()
                peak = max(peak, live)
            elif e.name().startswith(PHASE):
                self.parts[f"memory_after_{e.name().removeprefix(PHASE)}"] = live
        self.parts["memory_peak"] = peak
