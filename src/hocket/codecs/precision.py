"""Fewer bits per number: `half` (16) and `int8` (8, one scale a row)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.codecs.base import PLAIN, Codec, Parts, codec
from hocket.tree import Tree
from hocket.wire import DTYPES, NAMES


@codec("half")
@dataclass(frozen=True, config=PLAIN)
class Half(Codec):
    """16-bit floats; integers stay as they are. Exact error bound: 2^-11 relative (fp16, normal range), 2^-8 (bf16)."""

    format: Literal["bf16", "fp16"] = Field(
        default="bf16", description="bf16 keeps the range of fp32, fp16 more digits"
    )

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        if not x.is_floating_point() or x.element_size() <= 2:
            return {"": x}, None
        return {"": x.to(torch.bfloat16 if self.format == "bf16" else torch.float16)}, NAMES[x.dtype]

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        return parts[""] if meta is None else parts[""].to(DTYPES[meta])

    def __str__(self) -> str:
        return f"half({self.format})"


@codec("int8")
@dataclass(frozen=True, config=PLAIN)
class Int8(Codec):
    """Symmetric 8-bit integers with one fp32 scale per row (first dimension; one for a vector or a scalar).

    |x - x'| <= scale/2 = max|row| / 254. Works on every floating tensor whatever its name; integers pass through.
    """

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        if not x.is_floating_point() or not x.numel():
            return {"": x}, None
        rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1).float()
        scale = rows.abs().amax(1) / 127
        q = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round_().clamp_(-127, 127)
        return {"q": q.to(torch.int8).reshape(x.shape), "s": scale}, NAMES[x.dtype]

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        if meta is None:
            return parts[""]
        q, scale = parts["q"], parts["s"]
        return (q.reshape(len(scale), -1) * scale.unsqueeze(1)).reshape(q.shape).to(DTYPES[meta])
