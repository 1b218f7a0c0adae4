"""Low-rank codecs against linear algebra: what a factorization loses, what it sends, and what it refuses to read."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hocket import wire
from hocket.codecs import codec, factor, sent_raw
from hocket.codecs.base import Codec
from hocket.errors import RecipeError, WireError
from hocket.tree import digest, generator, nbytes

KINDS = {"svd": factor.SVD, "pca": factor.PCA, "qrcp": factor.QRCP, "cur": factor.CUR}
SHAPES = [(12, 12), (9, 30), (31, 8), (1, 7), (7, 1)]
FORMULA = {
    "svd": lambda m, n, r: (r * (m + n), 0),
    "pca": lambda m, n, r: (r * (m + n) + n, 0),
    "qrcp": lambda m, n, r: (r * (m + n) - r * (r - 1) // 2, r),
    "cur": lambda m, n, r: (r * (m + n) + r * r, 2 * r),
}


def matrix(m: int, n: int, *key: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=generator(m, n, *key), dtype=dtype)


def decaying(m: int, n: int, power: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    u, v = (torch.linalg.qr(matrix(a, min(m, n), side))[0] for side, a in enumerate((m, n)))
    return (u * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power @ v.mT).to(dtype)


def approximate(kind: str, x: Tensor, r: int, g: torch.Generator | None = None) -> Tensor:
    return KINDS[kind].expand(KINDS[kind].factor(x, r, g).cut(r))


def error(kind: str, x: Tensor, r: int, g: torch.Generator | None = None) -> float:
    return float(torch.linalg.norm(x - approximate(kind, x, r, g)) / torch.linalg.norm(x))


def built(spec: Any) -> Codec:
    return codec.build(spec)


def through(c: Codec, x: Tensor) -> Tensor:
    return c.decode(c.encode({"w": x}))["w"]


def parts_of(c: Codec, x: Tensor) -> dict[str, Tensor]:
    return {k.partition("|")[2]: v for k, v in wire.unpack(c.encode({"w": x})).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_loses_nothing(kind: str, shape: tuple[int, int]) -> None:
    for x in (matrix(*shape), decaying(*shape, power=2)):
        assert error(kind, x, min(shape)) < 1e-12
    low = matrix(shape[0], 2) @ matrix(2, shape[1])  # of rank 2: more components change nothing
    assert error(kind, low, min(shape)) < 1e-12


@pytest.mark.parametrize("make", [matrix, decaying])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_errors_are_ordered(make: Any, shape: tuple[int, int]) -> None:
    """PCA_r <= SVD_r <= QRCP_r, and SVD_{r+1} <= PCA_r; CUR is no better than the SVD before its own entries are put back."""
    x = make(*shape) + 0.3  # a mean, which PCA sends
    for r in (1, 2, 5, 7):
        e = {kind: error(kind, x, r) for kind in KINDS}
        assert e["pca"] <= e["svd"] * (1 + 1e-12)
        assert error("svd", x, r + 1) <= e["pca"] * (1 + 1e-12)
        assert e["svd"] <= e["qrcp"] * (1 + 1e-12)
        parts = factor.CUR.factor(x, r, None).cut(r)
        assert torch.linalg.norm(x - parts["l"].mT @ parts["u"] @ parts["r"]) >= e["svd"] * torch.linalg.norm(x) * (1 - 1e-12)
        assert e["cur"] < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sketched", [False, True])
def test_kept_is_the_squared_norm_of_what_is_sent(kind: str, sketched: bool) -> None:
    """By Pythagoras: every approximation here is a projection. CUR's is, before rows and columns are put back."""
    x = decaying(20, 30, 0.5) + 0.01
    found = KINDS[kind].factor(x, 9, generator(1) if sketched else None)
    for r in (1, 4, 9):
        parts = found.cut(r)
        y = parts["l"].mT @ parts["u"] @ parts["r"] if kind == "cur" else KINDS[kind].expand(parts)
        left = torch.linalg.norm(x) ** 2 - torch.linalg.norm(x - y) ** 2
        assert float(found.kept[r - 1]) == pytest.approx(float(left), rel=1e-9)


def test_the_factors_are_what_they_are_called() -> None:
    x = matrix(10, 14)
    cut = factor.QRCP.factor(x, 4, None).cut(4)
    assert torch.allclose(cut["l"] @ cut["l"].mT, torch.eye(4, dtype=x.dtype), atol=1e-12)
    norms = x.square().sum(0)
    assert int(cut["j"][0]) == int(norms.argmax())  # the first pivot is the longest column
    back = factor.QRCP.expand(cut)
    assert torch.allclose(back[:, cut["j"].long()], x[:, cut["j"].long()], atol=1e-12)  # chosen columns are exact
    cut = factor.CUR.factor(x, 4, None).cut(4)
    i, j = cut["i"].long(), cut["j"].long()
    assert torch.equal(cut["l"].mT, x[:, j]) and torch.equal(cut["r"], x[i])
    best = torch.linalg.pinv(x[:, j]) @ x @ torch.linalg.pinv(x[i])
    assert torch.allclose(cut["u"], best, atol=1e-10)
    back = factor.CUR.expand(cut)
    assert torch.equal(back[i], x[i]) and torch.equal(back[:, j], x[:, j])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 40), (24, 70), (90, 20)])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_numbers_sent_are_the_formulas(kind: str, shape: tuple[int, int], r: int) -> None:
    parts = parts_of(built({"name": kind, "rank": r}), matrix(*shape))
    floats = sum(v.numel() for v in parts.values() if v.is_floating_point())
    indices = sum(v.numel() for v in parts.values() if not v.is_floating_point())
    assert (floats, indices) == FORMULA[kind](*shape, r)
    assert {v.dtype for v in parts.values() if not v.is_floating_point()} <= {torch.uint8}


def test_indices_take_the_smallest_integers() -> None:
    for n, dtype in ((256, torch.uint8), (257, torch.int16), (1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)):
        assert parts_of(built({"name": "qrcp", "rank": 1}), matrix(3, n))["j"].dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_share_of_bytes_is_used_up_and_not_exceeded(kind: str, share: float) -> None:
    x = matrix(60, 100, dtype=torch.float32)
    parts = parts_of(built({"name": kind, "bytes": share}), x)
    r = len(parts["l"])
    assert nbytes(parts) <= share * x.nbytes < nbytes(KINDS[kind].layout(60, 100, r + 1, x.dtype))
    assert nbytes(parts) == nbytes(KINDS[kind].layout(60, 100, r, x.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_a_share_of_energy_is_reached_by_the_smallest_rank(kind: str, algorithm: str, energy: float) -> None:
    x = decaying(200, 260)
    c = built({"name": kind, "energy": energy, "algorithm": algorithm})
    parts = parts_of(c, x)
    lost = lambda y: float(((x - y) ** 2).sum() / (x**2).sum())
    assert lost(through(c, x)) <= 1 - energy + 1e-12
    r = len(parts["l"])
    if algorithm == "exact" and kind != "cur" and r > 1:
        assert lost(approximate(kind, x, r - 1)) > 1 - energy
    if kind == "svd":  # a sketch may need a component or two more
        squares = torch.linalg.svdvals(x).square().cumsum(0)
        best = int((squares < energy * squares[-1]).sum()) + 1
        assert best <= r <= best * 1.05 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_energy_that_no_smaller_factors_keep_is_sent_raw(kind: str) -> None:
    x = matrix(50, 50)
    c = built({"name": kind, "energy": 0.999})
    assert sent_raw(wire.Packet(c.encode({"w": x})).meta) == 1
    assert torch.equal(through(c, x), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [False, True])
def test_sketches_are_within_5_percent_of_exact(kind: str, noise: bool) -> None:
    x = matrix(512, 512) if noise else decaying(512, 512)
    for r in (8, 32, 64):
        assert error(kind, x, r, generator(3)) <= 1.05 * error(kind, x, r)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_the_same_update_gives_the_same_packet(kind: str, algorithm: str) -> None:
    """Whatever was encoded before; and signs do not depend on the solver."""
    c, tree = built({"name": kind, "rank": 3, "algorithm": algorithm}), {"a": matrix(300, 280), "b": matrix(40, 60)}
    first = c.encode(tree)
    torch.randn(5)
    assert c.encode({"b": tree["b"]}) and c.encode(tree) == first
    x = decaying(300, 280)
    exact = KINDS[kind].factor(x, 3, None).cut(3)
    if kind in ("svd", "pca"):
        close = KINDS[kind].factor(x, 3, generator(2)).cut(3)
        assert all(torch.allclose(exact[k], close[k], atol=1e-2 * float(exact[k].abs().max())) for k in exact)


def test_auto_chooses_by_size() -> None:
    c = built({"name": "svd", "rank": 8})
    works = {n: c.flops("w", torch.empty(n, n, device="meta")) for n in (128, 512)}
    assert works[128] == factor.SVD.flops(128, 128, 8, False)
    assert works[512] == factor.SVD.flops(512, 512, 8, True) < factor.SVD.flops(512, 512, 8, False) / 5


@pytest.mark.parametrize("kind", KINDS)
def test_only_changed_rows_are_factored(kind: str) -> None:
    c, x = built({"name": kind, "rank": 3}), torch.zeros(1000, 32, dtype=torch.float64)
    touched = torch.tensor([3, 4, 99, 500, *range(700, 740), 999])
    x[touched] = matrix(len(touched), 32)
    parts = parts_of(c, x)
    assert parts["rows"].tolist() == touched.tolist()
    assert parts["rows"].dtype == torch.int16
    assert parts["l"].shape[1] == len(touched)
    out = through(c, x)
    assert not out[(x == 0).all(1)].any()
    assert torch.allclose(out[touched], approximate(kind, x[touched], 3), atol=1e-12)
    few = torch.zeros(1000, 32)
    few[[5, 7]] = 1.5  # so few that they travel as they are
    assert set(parts_of(c, few)) == {"", "rows"}
    assert torch.equal(through(c, few), few)
    assert sent_raw(wire.Packet(c.encode({"w": few})).meta) == 0
    none = torch.zeros(1000, 32)
    assert nbytes(parts_of(c, none)) == 0
    assert torch.equal(through(c, none), none)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_smaller_factors_passes(kind: str) -> None:
    c = built({"name": kind, "rank": 100})
    odd = {
        "vector": matrix(1, 9)[0], "scalar": torch.tensor(2.5), "ints": torch.arange(12).reshape(3, 4), "none": torch.empty(0, 4),
        "thin": torch.empty(3, 0), "small": matrix(4, 4), "bool": torch.tensor([[True]]), "four": matrix(6, 20).reshape(6, 2, 5, 2),
        "nan": torch.full((30, 30), float("nan")), "inf": torch.full((300, 300), float("inf")),
        "tiny": torch.full((30, 30), 5e-324, dtype=torch.float64), "huge": torch.full((30, 30), 1e300, dtype=torch.float64),
    }  # fmt: skip
    out = c.decode(c.encode(odd))
    assert digest(dict(out)) == digest(odd)
    assert sent_raw(out.packet.meta) == 6  # small, four, nan, inf, tiny, huge: the others are no matrices
    one = built({"name": kind, "rank": 1})
    assert sent_raw(one.decode(one.encode(odd)).packet.meta) == 4


def test_four_dimensions_are_first_by_rest() -> None:
    x = matrix(20, 24).reshape(20, 2, 3, 4)
    out = through(built({"name": "svd", "rank": 5}), x)
    assert torch.allclose(out.reshape(20, 24), approximate("svd", x.reshape(20, 24), 5))
    assert out.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_come_back(kind: str, dtype: torch.dtype) -> None:
    x = (matrix(40, 3) @ matrix(3, 60)).to(dtype)
    c = built({"name": kind, "rank": 3})
    out = through(c, x)
    assert out.dtype == dtype
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert torch.linalg.norm((out - x).double()) <= near * torch.linalg.norm(x.double())
    floats = {v.dtype for v in parts_of(c, x).values() if v.is_floating_point()}
    assert floats == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_any_scale(kind: str, scale: float) -> None:
    x = (decaying(40, 60) * scale).float()
    e = torch.linalg.norm((through(built({"name": kind, "rank": 6}), x) - x).double()) / torch.linalg.norm(x.double())
    assert e == pytest.approx(error(kind, x.double() / scale, 6), rel=1e-3)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 12), seed=st.integers(0, 50),
    zeros=st.floats(0, 1), algorithm=st.sampled_from(["auto", "exact", "randomized"]), feature=st.integers(0, 3),
)  # fmt: skip
def test_round_trips(kind: str, m: int, n: int, r: int, seed: int, zeros: float, algorithm: str, feature: int) -> None:
    """Any shape comes back, no farther from the input than nothing would be, in a packet of the size that was said."""
    x = matrix(m, n, seed)
    x[torch.rand(m, generator=generator(seed)) < zeros] = 0
    if feature == 1:
        x = x[:, :1].expand(m, n).contiguous()
    if feature == 2:
        x = x.round()
    c = built({"name": kind, "rank": r, "algorithm": algorithm})
    blob = c.encode({"w": x})
    assert len(blob) == c.size({"w": x})
    out = c.decode(blob)["w"]
    assert out.shape == x.shape
    assert torch.linalg.norm(x - out) <= torch.linalg.norm(x) * (1 + 1e-9)
    if not (x == 0).all(1).any():
        assert c.size({"w": torch.empty(m, n, dtype=x.dtype, device="meta")}) == len(blob)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 3, "energy": 0.9}, "rank and energy both decide the rank"),
        ({"bytes": 0.5, "energy": 0.9}, "energy and bytes both"),
        ({"rank": 0}, "codec.rank"),
        ({"energy": 0.0}, "codec.energy"),
        ({"energy": 1.1}, "codec.energy"),
        ({"bytes": 2.0}, "codec.bytes"),
        ({"algorithm": "fast"}, "codec.algorithm"),
        ({"ranks": 3}, "did you mean 'rank'"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        built({"name": "pca", **fields})


def test_names_say_what_decides_the_rank() -> None:
    specs = ({}, {"rank": 4}, {"energy": 0.9}, {"bytes": 0.5, "algorithm": "exact"})
    names = [str(built({"name": "pca", **f})) for f in specs]
    assert names == ["pca(16)", "pca(4)", "pca(energy=0.9)", "pca(bytes=0.5,exact)"]


def tampered(blob: bytes, change: Any) -> bytes:
    packet = wire.Packet(blob)
    tree, meta = wire.unpack(blob), json.loads(json.dumps(packet.meta))
    change(tree, meta["tensors"]["w"])
    return wire.pack(tree, meta)


def put(key: str, value: Any) -> Any:
    return lambda tree, meta: tree.update({key: value(tree[key]) if callable(value) else value})


def say(key: str, value: Any) -> Any:
    return lambda tree, meta: meta.update({key: value})


HARM = {
    "a row beyond the end": put("w|rows", lambda t: t + 50),
    "a row twice": put("w|rows", lambda t: torch.full_like(t, 3)),
    "a negative row": put("w|rows", lambda t: t.to(torch.int16) - 100),
    "rows that are floats in two dimensions": put("w|rows", torch.zeros(1, 1)),
    "no left factor": lambda tree, meta: tree.pop("w|l") is None,
    "one part too many": put("w|x", torch.zeros(3)),
    "a left factor of another rank": put("w|l", lambda t: t[:1]),
    "a flat left factor": put("w|l", lambda t: t.reshape(-1)),
    "a scalar left factor": put("w|l", torch.tensor(1.0)),
    "integers": put("w|l", lambda t: t.to(torch.int8)),
    "half precision": put("w|r", lambda t: t.half()),
    "a huge shape": say("shape", [1 << 40, 20]),
    "an unspeakable shape": say("shape", [10**400, 20]),
    "another shape": say("shape", [60, 21]),
    "a negative shape": say("shape", [-60, -20]),
    "a shape of text": say("shape", "60"),
    "a shape of fractions": say("shape", [60.5, 20]),
    "no shape": say("shape", None),
    "a scalar's shape": say("shape", []),
    "many dimensions": say("shape", [60, 20] + [1] * 100),
    "no dtype": say("dtype", None),
    "an integer dtype": say("dtype", "I64"),
    "another dtype": say("dtype", "F64"),
    "a list for a dtype": say("dtype", ["F32"]),
}
INDEXED = {
    "a column beyond the end": put("w|j", lambda t: t + 100),
    "a column twice": put("w|j", torch.zeros_like),
    "too few columns": put("w|j", lambda t: t[:1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_harm_is_refused(kind: str) -> None:
    x = matrix(60, 20, dtype=torch.float32)
    x[:30] = 0
    c = built({"name": kind, "rank": 2})
    blob = c.encode({"w": x})
    assert c.decode(tampered(blob, lambda tree, meta: None))["w"].shape == x.shape
    for name, change in (HARM | (INDEXED if kind in ("qrcp", "cur") else {})).items():
        with pytest.raises(WireError, match="'w' cannot be decoded"):
            c.decode(tampered(blob, change))["w"]
            pytest.fail(name)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_know_sizes_without_values(kind: str) -> None:
    shapes = {"a": (300, 500), "b": (7,), "c": (4, 4), "d": (12, 5, 6), "e": (0, 3)}
    hollow = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    full = {k: torch.randn(s, generator=generator(k)) for k, s in shapes.items()}
    for rule, algorithm in itertools.product(({"rank": 2}, {"bytes": 0.3}), ("exact", "randomized")):
        c = built({"name": kind, **rule, "algorithm": algorithm})
        assert c.size(hollow) == c.size(full) == len(c.encode(full))
        assert c.work(hollow) == c.work(full) > 0
    c = built({"name": kind, "energy": 0.5})
    assert c.size(hollow) >= c.size(full)  # the most it can be
    assert c.work(hollow) >= built({"name": kind, "rank": 16}).work(hollow)
