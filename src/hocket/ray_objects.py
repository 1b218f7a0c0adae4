"""Tensors in Ray's object store: each once, and as bytes, so that every dtype survives and nothing is copied."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hocket.tree import Tree, raw

LINE = 64  # bytes to which torch aligns; the same alignment gives the same kernels, hence the same bits

Flat = tuple[str, list[int], np.ndarray[Any, Any]]  # dtype, shape, bytes: what Ray carries without a copy


def flat(tensor: Tensor) -> Flat:
    """The tensor as bytes, without a copy if it is contiguous and on the CPU."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), np.asarray(raw(tensor))


def whole(found: Flat, own: bool = True) -> Tensor:
    """The tensor that was made `flat`: one of its own, or one on the same memory, which nothing may write into."""
    dtype, shape, data = found
    if own or data.ctypes.data % LINE:
        out = torch.empty(data.size, dtype=torch.uint8)
        out.numpy()[:] = data
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is read-only, which is meant
            out = torch.from_numpy(data)
    return out.view(getattr(torch, dtype)).reshape(shape)


@dataclass
class Held:
    """A tensor that open jobs' views hold."""

    tensor: Tensor  # keeps its id from being given to another
    jobs: int = 0
    at: tuple[Any, int] | None = None  # the object it was put in, and its place there


class Shared:
    """Tensors in the object store, each once. Those put together share one object, which goes with the last of them.

    While a job is open nothing changes the tensors of its view, so what is in the store cannot be out of date; what no
    open job holds is forgotten.
    """

    def __init__(self, put: Callable[[list[Flat]], Any]) -> None:
        self._put = put
        self._lock = threading.Lock()
        self._held: dict[int, Held] = {}

    def hold(self, view: Tree) -> None:
        """A job with this view is open."""
        with self._lock:
            for t in view.values():
                self._held.setdefault(id(t), Held(t)).jobs += 1

    def release(self, view: Tree) -> None:
        """A job with this view is done, or not wanted."""
        with self._lock:
            for t in view.values():
                held = self._held[id(t)]
                held.jobs -= 1
                if not held.jobs:
                    del self._held[id(t)]

    def place(self, view: Tree) -> tuple[dict[str, tuple[int, int]], list[Any]]:
        """Objects that hold the view, and where in them each tensor is; what is not in the store yet is put there."""
        with self._lock:
            fresh = [h for h in {id(t): self._held[id(t)] for t in view.values()}.values() if h.at is None]
            if fresh:
                bundle = self._put([flat(h.tensor) for h in fresh])
                for i, h in enumerate(fresh):
                    h.at = bundle, i
            refs: dict[Any, int] = {}
            where = {}
            for name, t in view.items():
                at = self._held[id(t)].at
                assert at is not None
                where[name] = refs.setdefault(at[0], len(refs)), at[1]
        return where, list(refs)
