"""Codecs: a tree of tensors to bytes and back. `codec.names()` lists them, `codec.build(spec)` makes one."""

from hocket.codecs.base import Codec, Decoded, build, codec, sent_raw
from hocket.codecs.lossless import Zstd
from hocket.codecs.lowrank import Cur, Pca, Qrcp, Svd
from hocket.codecs.precision import Half, Int8
from hocket.codecs.sparse import Int4, Sign, TopK

__all__ = [
    "Codec", "Cur", "Decoded", "Half", "Int4", "Int8", "Pca", "Qrcp", "Sign", "Svd", "TopK", "Zstd", "build",
    "codec", "sent_raw",
]  # fmt: skip
