"""Linear modules with a threshold for each output (see `hocket.methods.spafl`): put into a model, and taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hocket.errors import RecipeError
from hocket.methods.blocks import LAYER
from hocket.methods.spafl import Rows, alive


class _Masked(nn.Module):
    """Beside a linear class: its forward, but outputs below their threshold are those of a row of zeros.

    Attributes:
        beyond: which gradient (see `Rows`).
    """

    weight: Any
    bias: Any
    threshold: nn.Parameter
    beyond: bool

    def forward(self, x: Tensor) -> Tensor:
        w, tau = self.weight.T if isinstance(self, Conv1D) else self.weight, self.threshold
        if self.training and tau.requires_grad:  # it trains, in memory of its own
            tau.data.mul_(alive(w.detach(), tau.detach()))
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # what the plain module would keep for the backward pass
        out: Tensor = Rows.apply(x, w, tau, self.bias, super().forward, self.beyond)
        return out


class _Linear(_Masked, nn.Linear):
    pass


class _Conv1D(_Masked, Conv1D):
    pass


MASKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}


def attach(model: Any, beyond: bool) -> frozenset[str]:
    """Give each linear module of the layers thresholds at 0, `<module>.threshold`, and a mask.

    Returns:
        The names of those of their weights that the model keeps as in x out.

    Raises:
        RecipeError: the model has none.
    """
    whole = dict(model.named_parameters())  # a weight that several modules share is there under one name
    layered = {k.removesuffix(".weight") for k in whole if LAYER.search(k)}
    found = {n: m for n, m in model.named_modules() if type(m) in MASKED and n in layered}
    if not found:
        raise RecipeError(f"method.name: 'spafl' found no linear modules in layers of {type(model).__name__}")
    for m in found.values():
        plain, w = type(m), m.weight
        rows = w.shape[1 if plain is Conv1D else 0]
        dtype = torch.promote_types(w.dtype, torch.float32)
        m.__class__ = MASKED[plain]
        m.threshold, m.beyond = nn.Parameter(torch.zeros(rows, dtype=dtype, device=w.device)), beyond
    return frozenset(f"{n}.weight" for n, m in found.items() if isinstance(m, Conv1D))


def detach(model: Any) -> None:
    """Make these modules plain again; the mask should be in their weights by then."""
    plain = {masked: kind for kind, masked in MASKED.items()}
    for m in [m for m in model.modules() if type(m) in plain]:
        m.__class__ = plain[type(m)]
        del m.threshold, m.beyond
