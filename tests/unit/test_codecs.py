"""Codecs are judged by what comes back, on every tensor name, and by their real size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.codecs import codec, factor, sent_raw
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


def test_lossless_is_what_is_made_of_lossless_codecs() -> None:
    every = {name: {"codec": "raw"} if name == "feedback" else {"codecs": ["raw"]} if name == "chain" else {} for name in codec.names()}
    every["per_tensor"] = {"rules": {"*": "raw"}}
    exact = {name for name, more in every.items() if built({"name": name, **more}).lossless}
    assert exact == {"raw", "zstd", "chain", "per_tensor"}
    assert not built({"name": "chain", "codecs": ["raw", "half"]}).lossless
    assert not built({"name": "per_tensor", "rules": {"a": "int8", "*": "raw"}}).lossless


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


def chain(*codecs: Any) -> dict[str, Any]:
    return {"name": "chain", "codecs": codecs}


def feedback(inner: Any) -> dict[str, Any]:
    return {"name": "feedback", "codec": inner}


LOSSY: dict[str, Any] = {
    **{name: {"name": name, "rank": 2} for name in ("svd", "pca", "qrcp", "cur")},
    "energy": {"name": "pca", "energy": 0.5},
    "bytes": {"name": "qrcp", "bytes": 0.4},
    "topk": {"name": "topk", "share": 0.1},
    **{name: name for name in ("sign", "int4", "int8", "half")},
    "pca, int8": chain({"name": "pca", "rank": 2}, "int8"),
    "qrcp, half": chain({"name": "qrcp", "rank": 2}, "half"),
    "topk, half": chain({"name": "topk", "share": 0.1}, "half"),
    "topk, int4": chain({"name": "topk", "share": 0.5}, "int4"),
    "rules": {"name": "per_tensor", "rules": {"*bias": "raw", "*": chain({"name": "svd", "rank": 1}, "int8")}},
}


@pytest.mark.parametrize("spec", LOSSY.values(), ids=LOSSY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feedback_telescopes(spec: Any, dtype: torch.dtype) -> None:
    """What arrived and what the client still holds are all that was ever to be sent; the memory does not grow."""
    c, memory = built(feedback(spec)), {}
    shapes = {"w": (20, 30), "bias": (9,), "e": (40, 8)}
    total, arrived = ({k: torch.zeros(s, dtype=dtype) for k, s in shapes.items()} for _ in range(2))
    held = []
    for turn in range(40):
        x = {k: torch.randn(s, generator=generator(turn, k), dtype=dtype) for k, s in shapes.items()}
        x["e"][turn % 3 :: 3] = 0  # rows that some turns do not touch
        out = c.decode(c.encode(x, memory))
        total = {k: total[k] + x[k] for k in x}
        arrived = {k: arrived[k] + out[k] for k in x}
        held.append(max(float(torch.linalg.norm(m)) for m in memory.values()))
    assert set(memory) == {f"feedback/{k}" for k in shapes}
    for k in shapes:
        assert torch.allclose(arrived[k] + memory[f"feedback/{k}"], total[k], atol=1e-3 if dtype == torch.float32 else 1e-11)
    assert max(held[20:]) < 2.5 * max(held[:20])


@pytest.mark.parametrize("spec", LOSSY.values(), ids=LOSSY)
def test_sizes_are_lengths_and_do_not_need_values(spec: Any) -> None:
    c, tree = built(spec), TREE | {"i": torch.arange(9), "none": torch.empty(0, 2)}
    assert c.size(tree) == len(c.encode(tree))
    hollow = {k: v.to("meta") for k, v in tree.items()}
    if "energy" not in str(c):
        assert c.size(hollow) == c.size(tree)
    assert c.size(hollow) >= c.size(tree)
    assert c.work(hollow) == c.work(tree)


def test_a_chain_quantizes_factors_and_leaves_indices_alone() -> None:
    x = {"w": torch.randn(64, 96, generator=generator(1))}
    for name in ("pca", "qrcp", "cur"):
        spec = {"name": name, "rank": 8}
        plain, short = built(spec), built(chain(spec, "int8"))
        assert len(short.encode(x)) < 0.4 * len(plain.encode(x))
        exact, near = plain.decode(plain.encode(x))["w"], short.decode(short.encode(x))["w"]
        if name != "cur":  # whose middle factor is an inverse
            assert torch.linalg.norm(near - exact) < 0.02 * torch.linalg.norm(exact)
        else:
            assert torch.isfinite(near).all()
    spec = {"name": "topk", "share": 0.1}
    kept, short = (built(s).decode(built(s).encode(x))["w"] for s in (spec, chain(spec, "half")))
    assert torch.equal(kept.bfloat16().float(), short)


@pytest.mark.parametrize("subs", [["", ""], ["", "s"], [], ["q"], ["q", "s", "x"]])
def test_a_chain_whose_parts_are_used_twice_or_never_is_refused(subs: list[str]) -> None:
    from hocket import wire

    c = built(chain("half", "int8"))
    blob = c.encode({"w": torch.randn(3, 4)})
    tree, meta = wire.unpack(blob), wire.Packet(blob).meta
    meta["tensors"]["w"][1][""][0] = subs
    meta["tensors"]["w"][1]["more"] = [["q"], "F32"]
    with pytest.raises(WireError, match="'w' cannot be decoded"):
        c.decode(wire.pack(tree, meta))["w"]


def test_which_codecs_are_for_differences() -> None:
    plain = {"raw", "half", "int8", "zstd"}
    for name in set(codec.names()) - {"chain", "per_tensor", "feedback"}:
        assert built(name).differences == (name not in plain)
        for wrapped in (feedback(name), chain("half", name), {"name": "per_tensor", "rules": {"a": "raw", "*": name}}):
            assert built(wrapped).differences == (name not in plain)


def test_work_is_what_the_codecs_within_do() -> None:
    hollow = {"w": torch.empty(600, 700, device="meta"), "b": torch.empty(9, device="meta")}
    svd = {"name": "svd", "rank": 4}
    work = factor.SVD.flops(600, 700, 4, True)
    assert built("raw").work(hollow) == built("int8").work(hollow) == 0
    assert built(svd).work(hollow) == built(feedback(svd)).work(hollow) == work
    assert built({"name": "per_tensor", "rules": {"b": svd, "*": "raw"}}).work(hollow) == 0
    assert built(chain("half", svd)).work(hollow) == built(chain(svd, "int8")).work(hollow) == work
    # a second codec works on what the first one leaves: V^T is 4 x 700
    small = factor.SVD.flops(4, 600, 1, False) + factor.SVD.flops(4, 700, 1, False)
    assert built(chain(svd, {"name": "svd", "rank": 1})).work(hollow) == work + small


def test_tensors_sent_raw_are_counted_through_wrappers() -> None:
    tree = {"a": torch.randn(3, 3), "b": torch.randn(3, 4), "big": torch.randn(40, 40), "v": torch.randn(4)}
    svd = {"name": "svd", "rank": 2}
    rules = {"name": "per_tensor", "rules": {"b": "raw", "*": svd}}
    deep = feedback({"name": "per_tensor", "rules": {"b": "raw", "*": chain("half", chain(svd, "int8"))}})
    for spec, n in ((svd, 2), ("raw", 0), ("int8", 0), (rules, 1), (chain(svd, "half"), 2), (feedback(svd), 2), (deep, 1)):
        c = built(spec)
        assert sent_raw(c.decode(c.encode(tree, {})).packet.meta) == n
    # a part that the next codec cannot shorten does not make the tensor raw
    c = built(chain({"name": "svd", "rank": 1}, {"name": "svd", "rank": 1}))
    assert sent_raw(c.decode(c.encode({"big": tree["big"]})).packet.meta) == 0
    nest: Any = {"": 1}
    for _ in range(100):
        nest = [{"": [[], nest]}]
    for odd in ({}, {"tensors": 3}, {"tensors": {"w": nest}}, {"tensors": {"w": "raw"}}):
        assert sent_raw(odd) == 0
