"""topk, sign and int4: how far off they may be, what they send, and what they refuse to read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hocket import wire
from hocket.codecs import codec, sent_raw
from hocket.codecs.base import Codec
from hocket.errors import RecipeError, WireError
from hocket.tree import digest, generator

CODECS: dict[str, Any] = {"topk": {"name": "topk", "share": 0.1}, "sign": "sign", "int4": "int4"}


def built(spec: Any) -> Codec:
    return codec.build(spec)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(*shape), dtype=torch.float64).to(dtype)


def through(spec: Any, x: Tensor) -> Tensor:
    return built(spec).decode(built(spec).encode({"w": x}))["w"]


def parts_of(spec: Any, x: Tensor) -> dict[str, Tensor]:
    return {k.partition("|")[2]: v for k, v in wire.unpack(built(spec).encode({"w": x})).items()}


def test_topk_sends_the_largest_and_nothing_else() -> None:
    x = draw(30, 40)
    for share in (0.01, 0.1, 0.5):
        spec = {"name": "topk", "share": share}
        k = int(share * 1200)
        out, parts = through(spec, x), parts_of(spec, x)
        assert {name: v.numel() for name, v in parts.items()} == {"v": k, "i": k}
        assert parts["i"].dtype == torch.int16
        kept = out != 0
        assert kept.sum() == k
        assert torch.equal(out[kept], x[kept])
        assert x[~kept].abs().max() <= x[kept].abs().min()
        # no k entries lose less, and so at most the share that is left out is lost
        assert ((x - out) ** 2).sum() <= (1 - k / 1200) * (x**2).sum()
    assert parts_of({"name": "topk", "share": 1e-9}, x)["v"].numel() == 1


def test_sign_is_the_nearest_multiple_of_signs_to_each_row() -> None:
    x = draw(7, 33)
    out = through("sign", x)
    assert torch.equal(out.sign(), x.sign())
    assert torch.allclose(out.abs(), x.abs().mean(1, keepdim=True).expand_as(x))
    left = ((x - out) ** 2).sum(1)
    assert torch.allclose(left, (x**2).sum(1) - x.abs().mean(1) ** 2 * 33)  # a projection, zeros included
    parts = parts_of("sign", x)
    assert {k: (v.dtype, v.numel()) for k, v in parts.items()} == {"b": (torch.uint8, math.ceil(7 * 33 / 8)), "s": (torch.float64, 7)}
    x[:, ::2] = 0
    assert torch.allclose(((x - through("sign", x)) ** 2).sum(1), (x**2).sum(1) - x.abs().mean(1) ** 2 * 33)
    assert parts_of("sign", draw(900))["s"].numel() == 1
    assert parts_of("sign", draw(4, 5, 6))["s"].numel() == 4


def test_int4_is_within_half_a_step_of_its_group() -> None:
    x = draw(13, 37) * torch.logspace(-3, 3, 37, dtype=torch.float64)
    off = (x - through("int4", x)).abs().reshape(-1)
    for start in range(0, len(off), 64):
        group = x.reshape(-1)[start : start + 64]
        assert off[start : start + 64].max() <= group.abs().max() / 14 * (1 + 1e-12)
    parts = parts_of("int4", x)
    n = 13 * 37
    assert {k: (v.dtype, v.numel()) for k, v in parts.items()} == {"q": (torch.uint8, math.ceil(n / 2)), "s": (torch.float64, math.ceil(n / 64))}
    steps = torch.arange(-7, 8, dtype=torch.float64)
    assert torch.equal(through("int4", steps), steps)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_come_back(name: str, dtype: torch.dtype) -> None:
    x = draw(20, 64, dtype=dtype)
    out = through(CODECS[name], x)
    assert out.dtype == dtype
    assert torch.linalg.norm(out.double() - x.double()) < torch.linalg.norm(x.double())
    if name != "topk":
        assert parts_of(CODECS[name], x)["s"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", CODECS)
def test_what_gets_no_smaller_passes(name: str) -> None:
    odd = {
        "scalar": torch.tensor(2.5), "one": torch.tensor([1.0]), "none": torch.empty(0, 4), "ints": torch.arange(40).reshape(5, 8),
        "bool": torch.ones(9, dtype=torch.bool), "column": torch.randn(9, 1, generator=generator(2)),
    }  # fmt: skip
    c = built(CODECS[name])
    out = c.decode(c.encode(odd))
    keep = {k: v for k, v in odd.items() if k != "column" or name == "sign"}
    assert digest({k: out[k] for k in keep}) == digest(keep)
    assert sent_raw(out.packet.meta) == (3 if name == "sign" else 2)
    zeros = torch.zeros(30, 30)
    assert torch.equal(through(CODECS[name], zeros), zeros)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("many", [False, True])
def test_values_that_are_not_finite_arrive_as_such(name: str, bad: float, many: bool) -> None:
    x = torch.full((20, 20), bad) if many else torch.ones(20, 20)
    x[3, 4] = bad
    assert not torch.isfinite(through(CODECS[name], x)).all()


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(CODECS)), shape=st.lists(st.integers(0, 12), max_size=4), scale=st.floats(1e-30, 1e30),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trips(name: str, shape: list[int], scale: float, dtype: torch.dtype, seed: int) -> None:
    """Any shape comes back, no farther from the input than nothing would be, in a packet of the size that was said."""
    x = (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)
    c = built(CODECS[name])
    blob = c.encode({"w": x})
    assert len(blob) == c.size({"w": x}) == c.size({"w": torch.empty(shape, dtype=dtype, device="meta")})
    assert blob == c.encode({"w": x})
    out = c.decode(blob)["w"]
    assert out.shape == x.shape
    assert out.dtype == dtype
    norm = torch.linalg.norm(x.double())
    assert torch.linalg.norm(x.double() - out.double()) <= norm * (1 + torch.finfo(dtype).eps)


HARM: dict[str, tuple[str, Any]] = {
    "a huge shape": ("shape", [1 << 40, 20]),
    "an unspeakable shape": ("shape", [10**400]),
    "a larger shape": ("shape", [60, 64]),
    "a smaller shape": ("shape", [1, 1]),
    "an empty shape": ("shape", [0, 64]),
    "a negative shape": ("shape", [-30, -64]),
    "a shape of text": ("shape", "30"),
    "no shape": ("shape", None),
    "no dtype": ("dtype", "F3"),
    "an integer dtype": ("dtype", "I64"),
    "part b too short": ("b", lambda t: t[:-1]),
    "part q too long": ("q", lambda t: torch.cat([t, t])),
    "part s of another shape": ("s", lambda t: t.unsqueeze(1)),
    "too few values": ("v", lambda t: t[:-1]),
    "an index beyond the end": ("i", lambda t: t + 100),
    "a negative index": ("i", lambda t: t - 2000),
    "an index twice": ("i", torch.zeros_like),
    "too few indices": ("i", lambda t: t[:-1]),
    "indices in two dimensions": ("i", lambda t: t.unsqueeze(0)),
}


@pytest.mark.parametrize("name", CODECS)
def test_harm_is_refused(name: str) -> None:
    c = built(CODECS[name])
    blob = c.encode({"w": draw(30, 64, dtype=torch.float32)})
    tree, meta = wire.unpack(blob), wire.Packet(blob).meta
    tried = 0
    for what, (key, value) in HARM.items():
        bad, said = dict(tree), json.loads(json.dumps(meta))
        if key in said["tensors"]["w"]:
            said["tensors"]["w"][key] = value
        elif f"w|{key}" in bad:
            bad[f"w|{key}"] = value(bad[f"w|{key}"])
        else:
            continue
        tried += 1
        with pytest.raises(WireError, match="'w' cannot be decoded"):
            c.decode(wire.pack(bad, said))["w"]
            pytest.fail(what)
    assert tried >= 12


@pytest.mark.parametrize(("fields", "message"), [({"share": 0.0}, "codec.share"), ({"share": 1.5}, "codec.share"), ({"k": 3}, "no such field")])
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        built({"name": "topk", **fields})
