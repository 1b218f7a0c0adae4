"""Fewer bytes and the same bits: `zstd`, after splitting a tensor into byte planes.

The bytes of n numbers of s bytes each are written as s planes of n bytes, all first bytes, then all second ones, and so
on: the planes of signs and exponents, and those in which a difference is zero, are then apart from those of digits that
look random, which no entropy code can shorten. The frame is Zstandard's (RFC 8878) and says how long its content is.

Exact for every dtype, NaN and -0 included. A tensor that gets no smaller is sent as it is (see `sent_raw`); without
values (a plan) every tensor counts as such, so what a plan says is the most that is sent. How short packets become may
differ by a few bytes between versions of the library.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.codecs.base import PLAIN, Codec, Parts, codec
from hocket.codecs.parts import declared, shaped
from hocket.errors import need
from hocket.tree import Tree, raw
from hocket.wire import NAMES


@codec("zstd")
@dataclass(frozen=True, config=PLAIN)
class Zstd(Codec):
    """Lossless entropy coding of byte planes, for whole weights and differences alike; needs hocket[zstd]."""

    lossless = True

    level: int = Field(
        default=1, ge=1, le=22, description="effort; above 1 hardly smaller for floating numbers, and much slower"
    )

    @model_validator(mode="after")
    def _installed(self) -> Zstd:
        need("zstandard", "zstd")  # said before a run begins, not in its middle
        return self

    def __str__(self) -> str:
        return f"zstd({self.level})"

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        if not x.numel() or x.dtype not in NAMES:
            return {"": x}, None
        if x.is_meta:
            return {"": x}, {"raw": "no values"}
        frame = need("zstandard", "zstd").ZstdCompressor(level=self.level).compress(_planes(x))
        if len(frame) >= x.nbytes:
            return {"": x}, {"raw": "no smaller"}
        return {"z": torch.frombuffer(bytearray(frame), dtype=torch.uint8)}, declared(x)

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        if meta is None or "raw" in meta:
            return parts[""]
        shape, dtype = shaped(meta, floating=False)
        if parts.keys() != {"z"} or parts["z"].dtype != torch.uint8 or parts["z"].ndim != 1:
            raise ValueError(f"parts {sorted(parts)} are no compressed tensor")
        size = math.prod(shape) * dtype.itemsize
        planes = np.frombuffer(_content(raw(parts["z"]), size), dtype=np.uint8).reshape(dtype.itemsize, -1)
        flat = np.empty(planes.shape[::-1], dtype=np.uint8)
        for i, plane in enumerate(planes):
            flat[:, i] = plane
        return torch.from_numpy(flat).view(dtype).reshape(shape)


def _planes(x: Tensor) -> memoryview:
    """The tensor's bytes, all first ones before all second ones."""
    return np.ascontiguousarray(np.frombuffer(raw(x), dtype=np.uint8).reshape(-1, x.element_size()).T).data


def _content(frame: memoryview, size: int) -> bytes:
    """What a frame of exactly `size` bytes holds. Raises `ValueError` for any other before it is expanded."""
    zstandard = need("zstandard", "zstd")
    try:
        says = zstandard.frame_content_size(frame)
        if says != size:
            raise ValueError(f"a frame of {'unknown length' if says < 0 else f'{says} bytes'}, expected {size} bytes")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(str(error) or "no memory for it") from error
    return content
