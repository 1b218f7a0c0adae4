"""What a forward pass holds at most where nothing is kept for a backward pass, from shapes alone."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hocket.models.forward import autocast


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, and takes off those that are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def known(self, t: Tensor) -> None:
        """A storage that is no activation."""
        self._seen[t.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (at := t.untyped_storage()._cdata) not in self._seen:
                n = t.untyped_storage().nbytes()
                self._seen[at] = weakref.finalize(t.untyped_storage(), self._gone, at, n)
                self.now += n
                self.peak = max(self.peak, self.now)
        return out

    def _gone(self, at: int, n: int) -> None:
        self._seen.pop(at, None)
        self.now -= n


def inference(model: Any, rows: int, length: int, precision: str) -> int:
    """Bytes of activations and logits alive at most in a forward pass of `rows` full rows, the loss included."""
    config, training = model.config, model.training
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # a bare configuration; classification asks for it
    try:
        return _trace(model.eval(), rows, length, precision)
    except Exception:  # code that looks at values cannot be traced: one layer's vectors, and logits three times
        hidden, vocab = getattr(config, "hidden_size", 0), getattr(config, "vocab_size", 0)
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        return 4 * rows * length * (8 * hidden + 3 * inner + 3 * vocab)
    finally:
        model.train(training)


def _trace(model: Any, rows: int, length: int, precision: str) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        values: dict[str, Tensor] = {k: torch.empty(b.shape, dtype=b.dtype) for k, b in model.named_buffers()}
        values |= {k: torch.empty(p.shape, dtype=p.dtype) for k, p in model.named_parameters()}
        ids = torch.zeros(rows, length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        live = _Live()
        for t in (*values.values(), *inputs.values()):
            live.known(t)
        with live, autocast(torch.device("cpu"), precision):
            logits = functional_call(model, values, (), inputs).logits
            logits, labels = (logits, ids[:, 0]) if logits.ndim == 2 else (logits[:, :-1], ids[:, 1:])
            flat = logits.reshape(-1, logits.shape[-1]).float()
            nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="sum")
    return live.peak
