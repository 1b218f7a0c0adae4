"""Fewer or much shorter numbers, for updates: `topk`, `sign` (1 bit), `int4`. Lossy; put `feedback(...)` around them.

n elements of s_c bytes each become

    topk   the k = max(1, floor(share n)) largest |x|        k (s_c + bytes of an index)
    sign   sign(x) and the mean |x| of each row               n/8 + 4 rows
    int4   round(x / s), s = max|x| / 7 of 64 neighbours      n/2 + n/16

`sign` is that of signSGD with error feedback (Karimireddy et al. 2019, arXiv 1901.09847): of all multiples of sign(x),
the mean |x| times it is the nearest to a row. Scales are fp32, float64 for float64. What would get no smaller is sent
as it is (see `sent_raw`). If values are not finite, some arrive as such, so that the server can refuse them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from hocket.codecs.base import PLAIN, Codec, Parts, codec
from hocket.codecs.parts import declared, index, positions, rows_of, shaped, wide
from hocket.tree import Tree, nbytes

GROUP = 64  # elements that share a scale in int4: half a bit more for each


@dataclass(frozen=True, config=PLAIN)
class Shorter(Codec):
    """A floating tensor as `parts`, or as it is if they are no smaller."""

    differences = True

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        if not x.is_floating_point() or not x.numel():
            return {"": x}, None
        parts = self.shorten(x)
        return (parts, declared(x)) if nbytes(parts) < x.nbytes else ({"": x}, {"raw": "no smaller"})

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        if meta is None or "raw" in meta:
            return parts[""]
        shape, dtype = shaped(meta)
        return self.restore(parts, shape, dtype).to(dtype).reshape(shape)

    def shorten(self, x: Tensor) -> Parts:
        """The parts of a tensor that is not empty."""
        raise TypeError(f"{type(self).__name__} must define shorten()")

    def restore(self, parts: Parts, shape: list[int], dtype: torch.dtype) -> Tensor:
        """The tensor's elements in order. Parts that do not fit `shape` are refused before anything is made of it."""
        raise TypeError(f"{type(self).__name__} must define restore()")


@codec("topk")
@dataclass(frozen=True, config=PLAIN)
class TopK(Shorter):
    """The largest entries of each tensor and where they are."""

    share: float = Field(default=0.01, gt=0, le=1, description="share of each tensor's elements, at least one is sent")

    def __str__(self) -> str:
        return f"topk({self.share})"

    def shorten(self, x: Tensor) -> Parts:
        flat = x.reshape(-1)
        at = flat.abs().topk(self._kept(len(flat)), sorted=False).indices.sort().values
        return {"v": flat[at], "i": at.to(index(len(flat)))}

    def restore(self, parts: Parts, shape: list[int], dtype: torch.dtype) -> Tensor:
        n, v = math.prod(shape), parts["v"]
        _fit(v, self._kept(n))
        return v.new_zeros(n).index_copy_(0, positions(parts["i"], n), v)

    def _kept(self, n: int) -> int:
        return max(1, int(self.share * n))


@codec("sign")
@dataclass(frozen=True, config=PLAIN)
class Sign(Shorter):
    """One bit an element (zero counts as positive) and one scale a row (one for a vector or a scalar)."""

    def shorten(self, x: Tensor) -> Parts:
        rows = x.reshape(rows_of(list(x.shape)), -1)
        scale = rows.abs().mean(1, dtype=torch.float64).to(wide(x.dtype))
        return {"b": _packed((x >= 0).reshape(-1).to(torch.uint8), 1), "s": scale}

    def restore(self, parts: Parts, shape: list[int], dtype: torch.dtype) -> Tensor:
        n, scale = math.prod(shape), parts["s"]
        _fit(scale, rows_of(shape))
        _fit(parts["b"], -(-n // 8))
        signs = _unpacked(parts["b"], 1, n).to(scale.dtype) * 2 - 1
        return signs.reshape(len(scale), -1) * scale.unsqueeze(1)


@codec("int4")
@dataclass(frozen=True, config=PLAIN)
class Int4(Shorter):
    """Integers from -7 to 7, two a byte, one scale for 64 neighbours: |x - x'| <= max|neighbours| / 14."""

    def shorten(self, x: Tensor) -> Parts:
        flat = x.reshape(-1).to(wide(x.dtype))
        groups = F.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)
        scale = groups.abs().amax(1) / 7
        q = (groups / scale.clamp_min(torch.finfo(scale.dtype).tiny).unsqueeze(1)).nan_to_num_(0).round_().clamp_(-7, 7)
        return {"q": _packed((q + 8).to(torch.uint8).reshape(-1)[: len(flat)], 4), "s": scale}

    def restore(self, parts: Parts, shape: list[int], dtype: torch.dtype) -> Tensor:
        n, scale = math.prod(shape), parts["s"]
        _fit(scale, -(-n // GROUP))
        _fit(parts["q"], -(-n // 2))
        q = F.pad(_unpacked(parts["q"], 4, n).to(scale.dtype) - 8, (0, -n % GROUP))
        return (q.reshape(-1, GROUP) * scale.unsqueeze(1)).reshape(-1)[:n]


def _fit(part: Tensor, n: int) -> None:
    if part.shape != (n,):
        raise ValueError(f"a part has shape {tuple(part.shape)}, expected ({n},)")


def _packed(small: Tensor, bits: int) -> Tensor:
    """uint8 numbers below 2^bits, 8 / bits of them a byte, the first in the lowest bits."""
    per = 8 // bits
    place = torch.tensor([1 << bits * i for i in range(per)], dtype=torch.uint8, device=small.device)
    return (F.pad(small, (0, -len(small) % per)).reshape(-1, per) * place).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n numbers again."""
    place = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> place) & ((1 << bits) - 1)).reshape(-1)[:n]
