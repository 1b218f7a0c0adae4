"""The lossless codec: the same bits for every dtype and shape, real sizes, and frames that lie are refused."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import language

from hocket import wire
from hocket.codecs import codec, sent_raw
from hocket.errors import HocketError, RecipeError, WireError
from hocket.tree import digest, generator, nbytes
from hocket.wire import DTYPES

ZSTD = codec.build("zstd")
BYTES = torch.randint(0, 256, (8 * 3000,), generator=generator("zstd"), dtype=torch.uint8)


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits at all, NaN and infinities among them, in a compressible order."""
    n = torch.Size(shape).numel() * dtype.itemsize
    data = BYTES[: n // 2 + 1].repeat(2)[:n]
    return (data & 1 if dtype == torch.bool else data).view(dtype).reshape(shape)


def coded(x: torch.Tensor, spec: Any = "zstd") -> tuple[torch.Tensor, wire.Packet]:
    c = codec.build(spec)
    blob = c.encode({"x": x})
    assert len(blob) == c.size({"x": x})
    out = c.decode(blob)
    return out["x"], out.packet


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES.values(), key=str)), level=st.integers(1, 5),
    shape=st.one_of(st.just(()), st.just((2000,)), st.lists(st.integers(0, 12), min_size=1, max_size=3)),
)  # fmt: skip
def test_the_same_bits_come_back(dtype: torch.dtype, level: int, shape: Any) -> None:
    x = of(dtype, *shape)
    out, _ = coded(x, {"name": "zstd", "level": level})
    assert digest({"x": out}) == digest({"x": x})


def test_other_layouts_in_memory_come_back_as_values() -> None:
    x = torch.randn(60, 40, generator=generator(1)).T[::2]
    out, _ = coded(x)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_planes_of_signs_and_exponents_are_what_gets_smaller(dtype: torch.dtype) -> None:
    x = (torch.randn(200, 300, generator=generator(2)) * 0.02).to(dtype)
    out, packet = coded(x)
    assert torch.equal(out, x)
    assert sent_raw(packet.meta) == 0
    assert packet.size < 0.93 * x.nbytes
    mixed = zstandard.ZstdCompressor(level=1).compress(x.view(torch.uint8).numpy().data)
    assert packet.size < {torch.float32: 0.97, torch.bfloat16: 1.0, torch.float16: 1.01}[dtype] * len(mixed)


def test_what_gets_no_smaller_is_sent_as_it_is_and_counted() -> None:
    noise = BYTES[:4096]
    out, packet = coded(noise)
    assert torch.equal(out, noise)
    assert sent_raw(packet.meta) == 1
    assert list(packet) == ["x"]
    _, small = coded(torch.ones(2))
    assert sent_raw(small.meta) == 1


def test_inside_others_and_around_them() -> None:
    tree = {"a.norm": torch.ones(300), "w": torch.randn(40, 50, generator=generator(3)), "i": torch.arange(400)}
    for spec, exact in (
        ({"name": "chain", "codecs": ["zstd"]}, True),
        ({"name": "per_tensor", "rules": {"*norm": "raw", "*": "zstd"}}, True),
        ({"name": "feedback", "codec": "zstd"}, False),
        ({"name": "feedback", "codec": {"name": "chain", "codecs": [{"name": "topk", "share": 0.2}, "zstd"]}}, False),
        ({"name": "chain", "codecs": ["half", "zstd"]}, False),
    ):
        c = codec.build(spec)
        assert c.lossless == exact
        out = c.decode(blob := c.encode(tree, {}))
        assert len(blob) == c.size(tree)
        assert torch.equal(out["i"], tree["i"])
        if exact:
            assert digest(dict(out)) == digest(tree)
    inner = codec.build({"name": "chain", "codecs": ["int8", "zstd"]})
    plain = codec.build("int8")
    assert digest(dict(inner.decode(inner.encode(tree)))) == digest(dict(plain.decode(plain.encode(tree))))
    assert inner.size(tree) < plain.size(tree)


def test_topk_then_zstd_shortens_indices() -> None:
    x = {"w": torch.randn(400, 500, generator=generator(4))}
    topk = {"name": "topk", "share": 0.05}
    plain, chained = codec.build(topk), codec.build({"name": "chain", "codecs": [topk, "zstd"]})
    assert chained.size(x) < 0.8 * plain.size(x)
    assert digest(dict(chained.decode(chained.encode(x)))) == digest(dict(plain.decode(plain.encode(x))))


def test_shapes_alone_count_as_incompressible() -> None:
    x = torch.zeros(100, 100)
    assert ZSTD.size({"x": x}) < 600
    assert x.nbytes <= ZSTD.size({"x": x.to("meta")}) < x.nbytes + 200


def packet(meta: Any, **parts: torch.Tensor) -> Any:
    return ZSTD.decode(wire.pack({f"w|{k}": v for k, v in parts.items()}, {"codec": "zstd(1)", "tensors": {"w": meta}}))


def frame(data: bytes, **how: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor(**how).compress(data)), dtype=torch.uint8)


F32 = {"shape": [4, 4], "dtype": "F32"}


@pytest.mark.parametrize(
    ("meta", "parts", "says"),
    [
        (F32, {"z": frame(bytes(1 << 28))}, "268435456 bytes, expected 64"),  # a bomb: 8 KB that stand for 256 MB
        (F32, {"z": frame(bytes(1 << 28), write_content_size=False)}, "unknown length"),
        (F32, {"z": frame(bytes(60))}, "60 bytes, expected 64"),
        (F32, {"z": frame(bytes(64))[:-3]}, "decompress|did not decompress|full frame"),
        (F32, {"z": torch.cat([frame(bytes(64)), frame(bytes(64))])}, "unused data|extra|input"),
        (F32, {"z": BYTES[:50]}, "frame header|magic|content size"),
        (F32, {"z": BYTES[:0]}, "frame header|content size|unknown length"),
        (F32, {"z": frame(bytes(64)).view(-1, 1)}, "no compressed tensor"),
        (F32, {"z": frame(bytes(64)), "y": BYTES[:3]}, "no compressed tensor"),
        (F32, {"z": frame(bytes(64)).float()}, "no compressed tensor"),
        ({"shape": [1 << 40], "dtype": "F32"}, {"z": frame(bytes(64))}, "no tensor of a model has shape"),
        ({"shape": [-4, -4], "dtype": "F32"}, {"z": frame(bytes(64))}, "no tensor of a model has shape"),
        ({"shape": [4, 4], "dtype": "F33"}, {"z": frame(bytes(64))}, "F33"),
        ({"raw": "no smaller"}, {"z": frame(bytes(64))}, "KeyError"),
        ("zstd", {"z": frame(bytes(64))}, "TypeError"),
    ],
)
def test_frames_that_lie_are_refused_by_name(meta: Any, parts: Any, says: str) -> None:
    with pytest.raises(WireError, match=f"tensor 'w' cannot be decoded.*({says})"):
        packet(meta, **parts)["w"]


def test_damage_inside_a_frame_is_refused_or_harmless() -> None:
    """The packet's own checksum comes first; behind it any damage is a WireError or a tensor of the declared shape."""
    good = frame(bytes(range(64)) * 4)
    for at in range(len(good)):
        bad = good.clone()
        bad[at] ^= 0x55
        with contextlib.suppress(WireError):
            assert packet({"shape": [64], "dtype": "F32"}, z=bad)["w"].shape == (64,)


def test_the_missing_library_is_named_with_its_extra(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(HocketError, match=r"'zstandard' is not installed: pip install 'hocket\[zstd\]'"):
        codec.build("zstd")


def test_levels_are_those_of_the_library() -> None:
    with pytest.raises(RecipeError, match=r"codec\.level"):
        codec.build({"name": "zstd", "level": 23})


def test_a_run_is_the_same_with_fewer_bytes() -> None:
    """In both directions, in whole weights and in deltas; what is counted is what was sent."""
    worlds = {c: language(meth="fedavg", up=c, down=c, turns=3, width=64) for c in ("raw", "zstd")}
    blobs: list[int] = []
    sim = worlds["zstd"].simulation
    put = sim.spool.put
    sim.spool.put = lambda key, blob: (blobs.append(len(blob)) if key.startswith("up/") else None, put(key, blob))[1]  # type: ignore[method-assign]
    for w in worlds.values():
        w.simulation.run()
    assert digest(worlds["raw"].final) == digest(worlds["zstd"].final)
    moved = {c: w.simulation.ledger.bytes for c, w in worlds.items()}
    assert moved["zstd"]["up"] == sum(blobs)
    assert moved["zstd"]["up"] < moved["raw"]["up"]
    assert moved["zstd"]["down"] < moved["raw"]["down"]
    assert nbytes(worlds["raw"].final) * 9 < moved["raw"]["up"]
