"""Mistakes that published code for federated LoRA has made. Each test holds a property of ours, and that the mistake,
written out here, does not have it: a test that such code would pass is worth nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds import collate, language, tokens

from hocket.errors import ModelError
from hocket.methods import Client, Local, Method, Update, method
from hocket.methods.base import PLAIN
from hocket.methods.lora import BASE, A, B, FedIT, LoRA, modules
from hocket.models import adapters
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.tree import Tree, generator

M = "base_model.model.layers.0.q"
OUT, INNER = 9, 7
LORAS = sorted(n for n in method.names() if issubclass(method.get(n), LoRA))


def draw(*shape: int, key: Any = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("traps", key, *shape))


def trained(client: int, rank: int) -> Tree:
    """A client's factors as they ended, in float64."""
    return {M + A: draw(rank, INNER, key=client), M + B: draw(OUT, rank, key=client)}


def aggregate(m: Any, ends: Sequence[Tree], weights: Sequence[float]) -> Tensor:
    """What one aggregation adds to the weight, when clients end with these factors."""
    first = {M + A: draw(m.rank, INNER, key="A"), M + B: torch.zeros(OUT, m.rank).double(), M + BASE: draw(OUT, INNER)}
    state = m.init(first if m.merges else {k: first[k] for k in (M + A, M + B)}, 0)
    updates = []
    for c, end in enumerate(ends):
        start = m.send(state, Client(c, 1, {"rank": len(end[M + A])}), 0)
        sent = end if m.name == "flora" else {k: v - start[k] for k, v in end.items()}
        payload = m.accept(state["params"], sent) if m.anchored else sent
        updates.append(Update(c, c, 0, 0, payload, weights[c]))
    after = m.step(state, updates, list(weights))["params"]
    product = m.stored(M) * after[M + B] @ after[M + A]
    return product + after[M + BASE] - first[M + BASE] if m.merges else product


def close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, atol=1e-9, rtol=1e-9)


# One: an accumulator with a misspelt name keeps the first client only, shrunk twice.


def misspelt(ends: Sequence[Tree], p: Sequence[float]) -> Tree:
    """The mean of the factors as the FLoRA repository has it for its comparison with FedIT."""
    for i, (end, w) in enumerate(zip(ends, p, strict=True)):
        if i == 0:
            weighted_single_weights = {k: v * w for k, v in end.items()}
        else:
            weighted_sindgle_weights = {k: weighted_single_weights[k] + v * w for k, v in end.items()}
    assert weighted_sindgle_weights  # what nobody reads
    return weighted_single_weights


def test_the_mean_holds_every_client() -> None:
    m, p = FedIT(rank=3, alpha=6.0), [0.1, 0.2, 0.3, 0.4]
    ends = [trained(c, 3) for c in range(4)]
    want = m.scale(M) * sum(w * e[M + B] for w, e in zip(p, ends, strict=True)) @ sum(
        w * e[M + A] for w, e in zip(p, ends, strict=True)
    )
    assert close(aggregate(m, ends, p), want)
    wrong = misspelt(ends, p)
    product = m.scale(M) * wrong[M + B] @ wrong[M + A]
    assert not close(product, want)
    assert close(product, p[0] ** 2 * m.scale(M) * ends[0][M + B] @ ends[0][M + A])

    same = [ends[0]] * 4  # what all agree on stays
    assert close(aggregate(m, same, p), m.scale(M) * ends[0][M + B] @ ends[0][M + A])


# Two: products of unequal ranks, added without their scales.


@pytest.mark.parametrize("name", ["flora", "flexlora", "hlora"])
def test_products_are_added_with_the_scale_of_each_rank(name: str) -> None:
    m: Any = method.build({"name": name, "rank": 7, "alpha": 14.0})
    ranks, p = [1, 2, 4], [0.5, 0.3, 0.2]
    ends = [trained(c, r) for c, r in enumerate(ranks)]
    ideal = sum(w * (14 / r) * e[M + B] @ e[M + A] for w, r, e in zip(p, ranks, ends, strict=True))
    got = aggregate(m, ends, p)
    assert close(got, ideal)

    unscaled = sum(w * e[M + B] @ e[M + A] for w, e in zip(p, ends, strict=True))
    for common in (1.0, m.scale(M)):  # no scale at all, or one at the end
        assert not close(common * unscaled, ideal)
    equal = [trained(c, 2) for c in range(3)]  # at equal ranks nobody would have noticed
    unscaled = sum(w * e[M + B] @ e[M + A] for w, e in zip(p, equal, strict=True))
    assert close(aggregate(m, equal, p), m.scale(M, 2) * unscaled)


# Three: tensors under other names than the model's, dropped without a word.


def test_names_with_a_foreign_suffix_are_an_error(tmp_path: Any) -> None:
    model = get_peft_model(tiny("llama", layers=2)[0], LoraConfig(task_type="CAUSAL_LM", r=4))
    for k, p in model.named_parameters():
        if "lora_" in k:
            p.data = draw(*p.shape, key=k).float()
    model.save_pretrained(tmp_path)
    file = tmp_path / adapters.WEIGHTS
    save_file({k.replace(".weight", ".global.weight"): v for k, v in load_file(file).items()}, file)

    fresh = get_peft_model(tiny("llama", layers=2)[0], LoraConfig(task_type="CAUSAL_LM", r=4))
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    fresh.load_state_dict(load_file(file), strict=False)  # the mistake: nothing is loaded, nothing is said
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())

    m = method.build({"name": "fedit", "rank": 4})
    with pytest.raises(ModelError, match=r"lora_A\.global\.weight"):
        adapters.place(make(tiny("llama", layers=2)[0], m), m, str(tmp_path))


BESIDE = {"slora": (".base_layer.entries", "slora"), "fedkrso": ("fedkrso",), "fedkrso-feedback": ("feedback.turn",)}
"""Endings of what a client is sent that is no tensor of the view: its method makes such of it."""


def received(w: Any) -> set[frozenset[str]]:
    """The names of all that clients of a world started their training from."""
    return {frozenset(start) for start in w.starts.values()}


@pytest.mark.parametrize("name", LORAS)
def test_what_is_sent_is_what_is_loaded(name: str) -> None:
    w = language(meth={"name": name, "rank": 4}, turns=3, layers=2, down="half")
    server, names = w.simulation.server, frozenset(w.trainer.view.params)
    for _ in range(2):  # at the first version and the last
        sent = server.method.send(server.state, server.clients[0], server.version).keys()
        assert sent >= names
        assert all(k.endswith(BESIDE.get(name, ())) for k in sent - names)
        if not server.version:
            w.run()
    assert server.version
    assert received(w) == {names}


def test_a_client_that_files_downloads_under_other_names_cannot_train() -> None:
    """A third party's aggregated adapter was lost for months that way."""

    @dataclass(frozen=True, config=PLAIN)
    class Lost(FedIT):
        def load(self, held: Tree, payload: Mapping[str, Tensor]) -> Tree:
            return held | {f"{k}.aggregated": v for k, v in payload.items()}

    w = language(meth=Lost(rank=4), turns=3, layers=2, down="half")
    with pytest.raises(KeyError, match="aggregated"):
        w.run()
    assert received(w) != {frozenset(w.trainer.view.params)}


# Four: A frozen before there is one.


def test_ffa_lora_leaves_A_bit_for_bit_on_every_client() -> None:
    model = tiny("gpt2", layers=2)[0]
    for k, p in model.named_parameters():  # the mistake: no parameter has such a name yet
        if "lora_A" in k:
            p.requires_grad_(False)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    before = {k: p.detach().clone() for k, p in wrapped.named_parameters() if "lora_A" in k}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # at B = 0 only weight decay moves A; then its gradient does
        wrapped(**collate(tokens(0, 4, 64))).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, before[k]) for k, p in wrapped.named_parameters() if "lora_A" in k)

    w = language("gpt2", meth={"name": "ffa-lora", "rank": 4}, turns=4, layers=2).run()
    first = {k: v for k, v in w.iterates[0].items() if k.endswith(A)}
    assert first
    for tree in (*w.starts.values(), *w.iterates, w.final):
        assert all(torch.equal(tree[k], v) for k, v in first.items())
    for delta in w.deltas.values():
        assert delta.keys() == {k for k in w.final if k.endswith(B)}
        assert all(v.any() for v in delta.values())
    assert all(torch.equal(w.trainer.view.logical(k), v) for k, v in first.items())


# Five: B = 0 frozen and A trained, as some descriptions of FFA-LoRA have it.


def test_with_B_zero_and_frozen_there_is_nothing_to_learn() -> None:
    @dataclass(frozen=True, config=PLAIN)
    class FreezeB(LoRA):
        def trains(self, local: Local) -> Callable[[str], bool]:
            return lambda name: not name.endswith(B)

    def moved(m: Method) -> dict[str, bool]:
        w = language(meth=m, turns=2, layers=2).run()
        products = [{x: t[x + B] @ t[x + A] for x in modules(t)} for t in (w.iterates[0], w.final)]
        return {x: not torch.equal(v, products[0][x]) for x, v in products[1].items()}

    w = language(meth="ffa-lora", layers=2)
    norms = w.trainer.gradient_norms(Local(0, {}, {}, 0, 1, 0, 0, w.trainer), w.trainer.start())
    assert {v for k, v in norms.items() if k.endswith(A)} == {0.0}
    assert all(v > 0 for k, v in norms.items() if k.endswith(B))
    assert set(moved(method.build({"name": "ffa-lora", "rank": 4})).values()) == {True}
    assert set(moved(FreezeB(rank=4)).values()) == {False}


# Six: peft's own weighted sum of adapters as a federated mean.


def test_two_equal_adapters_have_themselves_as_their_mean() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj"])
    model = get_peft_model(tiny("llama", layers=2)[0].double(), config, "one")
    model.add_adapter("two", config)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    for x in ("one", "two"):
        for factor in (layer.lora_A, layer.lora_B):
            factor[x].weight.data = draw(*factor[x].weight.shape)
    want = layer.get_delta_weight("one")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean", "linear")
    assert close(layer.get_delta_weight("mean"), 2 * want)

    for name in ("fedit", "flexlora", "flora", "hlora"):
        m: Any = method.build({"name": name, "rank": 3, "alpha": 6.0})
        assert close(aggregate(m, [trained(0, 3)] * 2, [0.5, 0.5]), 2.0 * trained(0, 3)[M + B] @ trained(0, 3)[M + A])
