"""Codecs are judged by what comes back, on every tensor name, and by their real size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.codecs import codec
from hocket.errors import RecipeError, WireError
from hocket.tree import Tree, digest, generator, nbytes

NAMES = ["model.layers.0.self_attn.q_proj.lora_A.weight", "h.3.mlp.c_fc.weight", "score.bias", "x"]
TREE = {n: torch.randn(6, 16, generator=generator(n)) * 10 ** (i - 2) for i, n in enumerate(NAMES)}


def built(spec: Any) -> Any:
    return codec.build(spec)


def error(spec: Any, tree: Tree) -> Tree:
    out = built(spec).decode(built(spec).encode(tree))
    assert list(out) == sorted(tree)
    return {k: (out[k].double() - tree[k].double()).abs() for k in tree}


def test_raw_is_lossless_and_half_and_int8_stay_within_their_bounds() -> None:
    assert all(e.max() == 0 for e in error("raw", TREE).values())
    for k, e in error("half", TREE).items():
        assert (e <= TREE[k].abs().double() * 2**-8).all()
        assert e.max() > 0
    for k, e in error({"name": "half", "format": "fp16"}, TREE).items():
        assert (e <= TREE[k].abs().double() * 2**-11 + 1e-7).all()
    for k, e in error("int8", TREE).items():
        assert (e <= TREE[k].abs().amax(1, keepdim=True).double() / 254 * 1.001).all()
        assert e.max() > 0  # whatever the name: peers' int8 skipped LoRA tensors


def test_sizes() -> None:
    big = {k: torch.randn(64, 512, generator=generator(k)) for k in NAMES}
    n = nbytes(big)
    for spec, ratio in (("raw", 1.0), ("half", 0.5), ("int8", 0.25 + 1 / 512)):
        blob = built(spec).encode(big)
        assert len(blob) == built(spec).size(big)
        assert ratio * n <= len(blob) < ratio * n + 2000


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(0, 9), scale=st.floats(1e-30, 1e30), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), ndim=st.integers(0, 3),
)  # fmt: skip
def test_int8_round_trip(rows: int, columns: int, scale: float, seed: int, dtype: torch.dtype, ndim: int) -> None:
    shape = [(), (columns,), (rows, columns), (rows, 2, columns)][ndim]
    top = 6e4 if dtype == torch.float16 else 1e38
    x = (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale).clamp(-top, top).to(dtype)
    out = built("int8").decode(built("int8").encode({"x": x}))["x"]
    assert out.shape == x.shape
    assert out.dtype == dtype
    if x.numel():
        most = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1).abs().amax(1).double()
        slack = most / 254 * 1.01 + most * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
        assert ((out.double() - x.double()).abs().reshape(len(most), -1) <= slack[:, None]).all()


def test_integers_zeros_and_empties_pass() -> None:
    odd = {"i": torch.arange(5), "z": torch.zeros(3, 4), "e": torch.empty(0, 3), "b": torch.tensor([True])}
    for spec in ("half", "int8", {"name": "chain", "codecs": ["int8", "half"]}, {"name": "feedback", "codec": "int8"}):
        out = built(spec).decode(built(spec).encode(odd, {}))
        assert digest(dict(out)) == digest(odd)


def test_chain_applies_each_codec_to_the_parts_of_the_one_before() -> None:
    chained = built({"name": "chain", "codecs": ["half", "int8"]})
    twice = built("int8").decode(built("int8").encode(dict(built("half").decode(built("half").encode(TREE)))))
    out = chained.decode(chained.encode(TREE))
    for k in TREE:
        assert torch.allclose(out[k], twice[k], atol=float(TREE[k].abs().max()) / 100)


def test_per_tensor_takes_the_first_rule_and_knows_no_default() -> None:
    c = built({"name": "per_tensor", "rules": {"*lora_A*": "raw", "*": "int8"}})
    out = c.decode(c.encode(TREE))
    assert torch.equal(out[NAMES[0]], TREE[NAMES[0]])
    assert not torch.equal(out[NAMES[1]], TREE[NAMES[1]])
    with pytest.raises(WireError, match="no rule matches tensor 'x'"):
        built({"name": "per_tensor", "rules": {"model*": "raw"}}).encode({"x": torch.ones(2)})


def test_feedback_sends_everything_in_the_end() -> None:
    """The sum of what was decoded stays within one quantization error of the sum of what was to be sent."""
    plain, fed, memory = built("int8"), built({"name": "feedback", "codec": "int8"}), {}
    x = {"w": torch.randn(4, 50, generator=generator(5)) * torch.logspace(-4, 0, 50)}
    sent = {name: torch.zeros(4, 50) for name in ("plain", "fed")}
    for _ in range(200):
        sent["plain"] += plain.decode(plain.encode(x))["w"]
        sent["fed"] += fed.decode(fed.encode(x, memory))["w"]
    off = {name: float((s - 200 * x["w"]).abs().max()) for name, s in sent.items()}
    assert off["fed"] < 0.05 * off["plain"]
    assert list(memory) == ["feedback/w"]
    assert off["fed"] == pytest.approx(float(memory["feedback/w"].abs().max()), rel=0.05, abs=1e-3)


FED = {"name": "feedback", "codec": "int8"}


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "feedback", "codec": FED},
        {"name": "chain", "codecs": ["half", FED]},
        {"name": "per_tensor", "rules": {"*lora*": FED, "*": "raw"}},
    ],
)
def test_feedback_is_outermost_and_once(spec: Any) -> None:
    """Two of them would share one memory of a tensor."""
    with pytest.raises(RecipeError, match=r"codec\..*feedback cannot be inside another codec; put it around the whole"):
        built(spec)


def test_a_packet_of_another_codec_is_refused() -> None:
    with pytest.raises(WireError, match="encoded with 'int8', expected 'half"):
        built("half").decode(built("int8").encode(TREE))


def test_a_packet_whose_parts_are_gone_is_refused_when_read() -> None:
    from hocket import wire

    blob = wire.pack({"w|q": torch.zeros(2, 2, dtype=torch.int8)}, {"codec": "int8", "tensors": {"w": "F32"}})
    with pytest.raises(WireError, match="'w' cannot be decoded"):
        built("int8").decode(blob)["w"]


def test_a_name_with_the_separator_is_refused() -> None:
    with pytest.raises(WireError, match="holds '|'"):
        built("raw").encode({"a|b": torch.ones(1)})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int9", "did you mean 'int8'"),
        ({"name": "half", "formt": "bf16"}, "did you mean 'format'"),
        ({"name": "half", "format": "fp8"}, "codec.format"),
        ({"name": "chain", "codecs": []}, "codec.codecs"),
        ({"name": "chain", "codecs": ["hlf"]}, "did you mean 'half'"),
        ({"name": "feedback"}, "codec.codec"),
        ({}, "codec.name: missing"),
    ],
)
def test_wrong_specs_name_the_field(spec: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        built(spec)
