"""Packets: the same tensors back, and every kind of harm a clear error."""

from __future__ import annotations

import errno
import io
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as safetensors_load

from hocket import wire
from hocket.errors import WireError
from hocket.tree import digest, generator

TREE = {
    "b.weight": torch.randn(5, 7, generator=generator(1)),
    "a.half": torch.randn(3, generator=generator(2)).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "ints": torch.arange(6).reshape(2, 3),
    "mask": torch.tensor([True, False]),
    "view": torch.arange(12.0).reshape(3, 4).T,
}


def test_round_trip_keeps_names_dtypes_shapes_bits_and_sorts_keys() -> None:
    blob = wire.pack(TREE, {"codec": "raw", "n": [1, None]})
    packet = wire.Packet(blob)
    assert list(packet) == sorted(TREE)
    assert packet.meta == {"codec": "raw", "n": [1, None]}
    assert digest(dict(packet)) == digest(TREE)
    assert wire.size(TREE, {"codec": "raw", "n": [1, None]}) == len(blob)


def test_equal_trees_give_equal_bytes_whatever_the_dict_order() -> None:
    assert wire.pack(dict(reversed(TREE.items()))) == wire.pack(TREE)


def test_the_image_is_plain_safetensors() -> None:
    image = wire.pack(TREE)[wire.FRAME.size :]
    assert digest(safetensors_load(image)) == digest(TREE)


def test_a_file_is_the_same_bytes_and_is_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "x.hkt"
    assert wire.write_file(path, TREE) == path.stat().st_size
    assert path.read_bytes() == wire.pack(TREE)
    assert torch.equal(wire.Packet(path)["b.weight"], TREE["b.weight"])


def test_decoded_tensors_do_not_share_memory_with_the_packet() -> None:
    blob = bytearray(wire.pack(TREE))
    packet = wire.Packet(blob)
    packet["b.weight"].zero_()
    assert torch.equal(packet["b.weight"], TREE["b.weight"])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_cut_short_after_it_was_checked_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    monkeypatch.setattr(wire, "MAP", 1)
    path = tmp_path / "x.hkt"
    wire.write_file(path, TREE)
    packet = wire.Packet(path, mapped=mapped)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WireError, match="cut short after"):
        dict(packet)


def test_mapped_tensors_are_the_readers_own_and_outlive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAP", 1)
    path = tmp_path / "x.hkt"
    tree = TREE | {"large": torch.randn(70_000, generator=generator(3))}
    tree["odd"] = torch.ones(3, dtype=torch.uint8)  # what follows is not aligned, and is read
    tree["z"] = torch.randn(9, generator=generator(4))
    wire.write_file(path, tree)
    before = path.read_bytes()
    packet = wire.Packet(path, mapped=True)
    out = dict(packet)
    assert digest(out) == digest(tree)
    packet["large"].zero_()
    assert path.read_bytes() == before
    assert torch.equal(packet["large"], tree["large"])
    path.unlink()
    assert digest(out) == digest(tree)
    view = out.pop("large")[5:7]
    assert torch.equal(view, tree["large"][5:7])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_byte_or_cut_is_noticed(data: st.DataObject) -> None:
    blob = bytearray(wire.pack({"w": torch.arange(40.0), "v": torch.ones(3)}))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] ^= data.draw(st.integers(1, 255))
    else:
        del blob[data.draw(st.integers(0, len(blob) - 1)) :]
    with pytest.raises(WireError):
        wire.unpack(blob)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "cut short"),
        (b"PK\x03\x04" + bytes(100), "not a hocket packet"),
        (wire.pack(TREE)[: wire.FRAME.size + 50], "cut short"),
        (wire.pack(TREE) + b"x", "followed by foreign bytes"),
        (wire.pack(TREE)[wire.FRAME.size :], "not a hocket packet"),
        (wire.FRAME.pack(wire.MAGIC, 99, 8, 0) + bytes(8), "packet format 99"),
    ],
)
def test_foreign_and_cut_packets_say_what_they_are(blob: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.unpack(blob)


def forged(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    """A packet with a right checksum around a wrong header."""
    import xxhash

    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    image = struct.pack("<Q", len(text) if size is None else size) + text + data
    return wire.FRAME.pack(wire.MAGIC, wire.FORMAT, len(image), xxhash.xxh3_64_intdigest(image)) + image


@pytest.mark.parametrize(
    "blob",
    [
        forged(b"not json"),
        forged([1, 2]),
        forged({}, size=10**12),
        forged({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b""),
        forged({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(4)),
        forged({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"w": {"dtype": "F32", "shape": [1] * 20, "data_offsets": [0, 4]}}, bytes(4)),
        forged({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9)),
        forged({"w": 3}),
        forged(b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', bytes(4)),
        forged({"w": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
        forged(b"[" * 200_000),
        forged({"__metadata__": {"hocket": "[1]"}}),
        forged({"__metadata__": {"hocket": "{"}}),
    ],
)
def test_a_lying_header_is_an_error_before_anything_is_allocated(blob: bytes) -> None:
    with pytest.raises(WireError):
        wire.Packet(blob)


def test_declared_limits_hold() -> None:
    blob = wire.pack(TREE)
    for limits in (wire.Limits(packet=100), wire.Limits(header=10), wire.Limits(tensors=2), wire.Limits(dims=1)):
        with pytest.raises(WireError):
            wire.Packet(blob, limits)
    big = wire.FRAME.pack(wire.MAGIC, wire.FORMAT, 1 << 60, 0) + bytes(8)
    with pytest.raises(WireError, match="too large"):
        wire.Packet(big)


def test_an_unsupported_dtype_names_the_tensor() -> None:
    with pytest.raises(WireError, match="'z' has dtype"):
        wire.pack({"z": torch.zeros(2, dtype=torch.complex64)})


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wire, "write", full)
    with pytest.raises(WireError, match="No space left"):
        wire.write_file(tmp_path / "x.hkt", TREE)
    assert list(tmp_path.iterdir()) == []


def test_writing_to_a_stream_gives_the_packet() -> None:
    stream = io.BytesIO()
    wire.write(stream, TREE)
    assert stream.getvalue() == wire.pack(TREE)
