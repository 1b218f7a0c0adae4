"""Codecs: a tree of tensors to bytes and back. `codec.names()` lists them, `codec.build(spec)` makes one."""

from hocket.codecs.base import Codec, Decoded, build, codec
from hocket.codecs.precision import Half, Int8

__all__ = ["Codec", "Decoded", "Half", "Int8", "build", "codec"]
