"""Packets: a tree of tensors as bytes and back, with nothing executable in between.

A packet is a 24-byte frame followed by a plain safetensors image::

    "HOCKET" | format (u16) | length of image (u64) | xxh3-64 of image (u64) | safetensors image

* The image is the safetensors format (header length, JSON header, data) with keys sorted, so equal trees give equal
  bytes. Its `__metadata__` carries one JSON object, the packet's `meta`.
* The frame makes every kind of harm a clear `WireError`: cut short, too long, foreign, altered.
* Encoding is one hash pass and one copy. Reading is lazy: a tensor is copied out when it is asked for, so a packet on
  disk costs memory for one tensor at a time. A file of this process alone can be mapped instead, which saves the copy.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from hocket.errors import WireError
from hocket.tree import nbytes, raw

FORMAT = 1
MAGIC = b"HOCKET"
FRAME = struct.Struct("<6sHQQ")
HASH_CHUNK = 1 << 20  # hashing a packet on disk never holds more than this
MAP = 1 << 18  # bytes from which mapping a tensor is cheaper than reading it

# safetensors' own dtype names
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Bytes = bytes | bytearray | memoryview
Entry = tuple[torch.dtype, list[int], int, int]  # dtype, shape, first and last byte in the data
NAMES = {v: k for k, v in DTYPES.items()}


@dataclass(frozen=True)
class Limits:
    """What a receiver is ready to accept; a packet that declares more is refused before anything is allocated."""

    packet: int = 64 << 30  # bytes of the whole packet
    header: int = 64 << 20  # bytes of the JSON header
    tensors: int = 1_000_000  # number of tensors
    dims: int = 8  # dimensions of one tensor


LIMITS = Limits()


def _header(tree: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    head: dict[str, Any] = {}
    if meta:
        head["__metadata__"] = {"hocket": json.dumps(meta, sort_keys=True, separators=(",", ":"))}
    at = 0
    for name in sorted(tree):
        t = tree[name]
        if t.dtype not in NAMES:
            raise WireError(f"tensor '{name}' has dtype {t.dtype}, which packets do not carry; cast it first")
        end = at + t.numel() * t.element_size()
        head[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    blob = json.dumps(head, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    return struct.pack("<Q", len(blob)) + blob


def _parts(tree: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[bytes | memoryview]:
    parts: list[bytes | memoryview] = [_header(tree, meta), *(raw(tree[name]) for name in sorted(tree))]
    h = xxhash.xxh3_64()
    for p in parts:
        h.update(p)
    return [FRAME.pack(MAGIC, FORMAT, sum(len(p) for p in parts), h.intdigest()), *parts]


def pack(tree: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> bytes:
    """One packet holding `tree` and the JSON object `meta`.

    Raises:
        WireError: a tensor has a dtype that packets do not carry.
    """
    return b"".join(_parts(tree, meta or {}))


def size(tree: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> int:
    """Bytes of `pack(tree, meta)`, found by encoding everything but the tensors' data."""
    return FRAME.size + len(_header(tree, meta or {})) + nbytes(tree)


def write(file: BinaryIO, tree: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> int:
    """Write the same bytes as `pack` to an open file without building them in memory; returns their number."""
    return sum(file.write(p) for p in _parts(tree, meta or {}))


class Packet(Mapping[str, Tensor]):
    """A checked packet, in memory or on disk, read one tensor at a time; keys are in sorted order.

    Args:
        source: the bytes, or the path of a file that holds them.
        limits: what to accept.
        check: verify the checksum; switch off only for a file this process has already verified.
        mapped: map large tensors of a file instead of reading them. Only for files that nobody else writes to: one cut
            short under a mapping kills the process (SIGBUS), where reading it is a `WireError`.

    Raises:
        WireError: the packet is cut short, too long, altered, from something else, or larger than `limits`.
    """

    def __init__(self, source: Bytes | Path, limits: Limits = LIMITS, check: bool = True, mapped: bool = False) -> None:
        self._source, self._mapped = source, mapped and isinstance(source, Path)
        self.where = f"file '{source}'" if isinstance(source, Path) else "packet"
        self.size = source.stat().st_size if isinstance(source, Path) else len(source)
        if self.size < FRAME.size + 8:
            raise WireError(f"{self.where} is cut short: {self.size} bytes do not hold a packet frame")
        magic, version, length, checksum = FRAME.unpack(self._read(0, FRAME.size))
        if magic != MAGIC:
            raise WireError(f"{self.where} is not a hocket packet: it starts with {magic!r}")
        if version != FORMAT:
            raise WireError(f"{self.where} has packet format {version}, this is {FORMAT}; use one version")
        if self.size > limits.packet or length > limits.packet:
            raise WireError(f"{self.where} is too large: {max(self.size, length)} bytes, limit {limits.packet}")
        if self.size != FRAME.size + length:
            kind = "cut short" if self.size < FRAME.size + length else "followed by foreign bytes"
            raise WireError(f"{self.where} is {kind}: {self.size} bytes, its frame declares {FRAME.size + length}")
        if check and self._hash() != checksum:
            raise WireError(f"{self.where} is damaged: its checksum does not match; have it sent again")
        self._entries, self.meta, self._data = self._parse(length, limits)

    def _read(self, start: int, size: int) -> bytes | memoryview:
        if isinstance(self._source, Path):
            with self._source.open("rb") as f:
                f.seek(start)
                return f.read(size)
        return memoryview(self._source)[start : start + size]

    def _hash(self) -> int:
        h = xxhash.xxh3_64()
        if not isinstance(self._source, Path):
            h.update(memoryview(self._source)[FRAME.size :])
            return h.intdigest()
        chunk = memoryview(bytearray(HASH_CHUNK))  # one for all, so that it stays in the processor's cache
        with self._source.open("rb", buffering=0) as f:
            f.seek(FRAME.size)
            while n := f.readinto(chunk):
                h.update(chunk[:n])
        return h.intdigest()

    def _parse(self, length: int, limits: Limits) -> tuple[dict[str, Entry], Any, int]:
        """Check every declared number against the others, so that reading a tensor later cannot fail."""
        (size,) = struct.unpack("<Q", self._read(FRAME.size, 8))
        if size > limits.header or size + 8 > length:
            raise WireError(f"{self.where} declares a header of {size} bytes; limit {min(limits.header, length - 8)}")
        try:
            head = json.loads(bytes(self._read(FRAME.size + 8, size)))
            meta = json.loads(head.pop("__metadata__", {}).get("hocket", "{}"))
            if not isinstance(meta, dict):
                raise WireError(f"{self.where} has meta that is no object")
            if len(head) > limits.tensors:
                raise WireError(f"{self.where} declares {len(head)} tensors, limit {limits.tensors}")
            entries, used = {}, 0
            for name in sorted(head):
                dtype, shape = DTYPES[head[name]["dtype"]], [int(n) for n in head[name]["shape"]]
                start, end = (int(n) for n in head[name]["data_offsets"])
                item = torch.empty(0, dtype=dtype).element_size()
                if (
                    len(shape) > limits.dims
                    or min(shape, default=0) < 0
                    or math.prod(map(abs, filter(None, shape))) >= 1 << 62
                    or end - start != math.prod(shape) * item
                ):
                    raise WireError(f"{self.where}: tensor '{name}' declares shape {shape} in {end - start} bytes")
                if start < 0 or end > length - 8 - size:
                    raise WireError(f"{self.where}: tensor '{name}' lies outside the packet")
                entries[name] = (dtype, shape, start, end)
                used += end - start
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise WireError(f"{self.where} has an unreadable header: {error!r}") from error
        if used != length - 8 - size:
            raise WireError(f"{self.where}: tensors cover {used} of {length - 8 - size} data bytes")
        return entries, meta, FRAME.size + 8 + size

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, start, end = self._entries[name]
        size, at = end - start, self._data + start
        if self._mapped and size >= MAP and at % dtype.itemsize == 0:
            return self._map(at, size).view(dtype).reshape(shape)
        out = torch.empty(shape, dtype=dtype)
        if size and isinstance(self._source, Path):
            with self._source.open("rb") as f:
                f.seek(at)
                if f.readinto(raw(out)) != size:
                    raise WireError(f"{self.where} was cut short after it was checked")
        elif size:
            raw(out)[:] = self._read(at, size)
        return out

    def _map(self, at: int, size: int) -> Tensor:
        """These bytes of the file, as pages that become the reader's own where it writes into them. Each tensor has its
        own mapping, which goes with it, so that no more than what is looked at counts as memory."""
        assert isinstance(self._source, Path)  # only files are mapped
        skip = at % mmap.ALLOCATIONGRANULARITY
        try:
            with self._source.open("rb") as f:
                pages = mmap.mmap(f.fileno(), size + skip, access=mmap.ACCESS_COPY, offset=at - skip)
        except ValueError as error:
            raise WireError(f"{self.where} was cut short after it was checked") from error
        return torch.frombuffer(pages, dtype=torch.uint8, offset=skip, count=size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def unpack(blob: Bytes, limits: Limits = LIMITS) -> dict[str, Tensor]:
    """All tensors of a packet, in sorted order. Raises `WireError` as `Packet` does."""
    packet = Packet(blob, limits)
    return {name: packet[name] for name in packet}


def write_file(path: Path, tree: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> int:
    """Write a packet file so that it is either whole or absent: temporary file, fsync, rename, fsync of the folder.

    Raises:
        WireError: the disk is full or cannot be written; nothing is left under `path`'s name.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as f:
            size = write(f, tree, meta)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WireError(f"cannot write '{path}': {error.strerror}; free some space or choose another folder") from error
    return size
