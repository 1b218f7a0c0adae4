"""What travels beside a tensor's numbers: its shape and dtype, and indices; and their checks on arrival.

A few numbers can stand for many, so a small packet can ask for a huge tensor. Codecs make nothing before `shaped` has
refused what no model has, and take a tensor's parts only in the sizes that follow from its shape.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hocket.wire import DTYPES, LIMITS, NAMES

MOST = 1 << 32  # elements of one decoded tensor; a 405B model's largest has 2^31


def declared(x: Tensor) -> dict[str, Any]:
    """The meta that `shaped` reads."""
    return {"shape": list(x.shape), "dtype": NAMES[x.dtype]}


def shaped(meta: Any, floating: bool = True) -> tuple[list[int], torch.dtype]:
    """Shape and dtype (a floating one, if asked for) that a packet declares. Raises `ValueError` for what no tensor of
    a model has."""
    shape, dtype = meta["shape"], DTYPES[meta["dtype"]]
    if len(shape) > LIMITS.dims or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > MOST:
        raise ValueError(f"no tensor of a model has shape {shape}")
    if floating and not dtype.is_floating_point:
        raise ValueError(f"{dtype} is not floating")
    return shape, dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """What tensors of `dtype` are computed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def index(n: int) -> torch.dtype:
    """The smallest integers that packets carry and that count to n - 1."""
    return next(d for d in (torch.uint8, torch.int16, torch.int32, torch.int64) if n - 1 <= torch.iinfo(d).max)


def positions(part: Tensor, n: int) -> Tensor:
    """Indices out of a packet. Raises `ValueError` unless they are different and below n: torch counts -1 from the end
    and takes whichever of two equal ones it likes."""
    at = part.long()
    if at.ndim != 1 or (len(at) and not 0 <= int(at.min()) <= int(at.max()) < n) or len(at.unique()) < len(at):
        raise ValueError(f"indices are not different numbers below {n}")
    return at


def rows_of(shape: list[int]) -> int:
    """Rows of a tensor in which a row has its own scale: of the first dimension; a vector or a scalar is one row."""
    return shape[0] if len(shape) > 1 else 1
