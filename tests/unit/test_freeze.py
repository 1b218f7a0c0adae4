"""Parameters that a recipe freezes are in no view, no packet and no memory plan."""

from __future__ import annotations

import pytest

from hocket import plan, recipe
from hocket.errors import RecipeError
from hocket.methods import method
from hocket.models.tiny import tiny
from hocket.models.views import make

RECIPE = {
    "turns": 1,
    "model": {"source": "tiny:llama"},
    "data": {"source": "docstrings"},
    "method": {"name": "fedavg"},
    "clients": {"count": 2},
}


@pytest.mark.parametrize("name", ["fedavg", "ferret", "fedkseed", "fedbcd"])
def test_frozen_parameters_are_in_no_view(name: str) -> None:
    model, _ = tiny("llama", vocab=64, layers=2, width=8)
    whole = make(model, method.build(name))
    view = make(model, method.build(name), freeze=["*mlp*", "*norm*"])
    assert set(view.params) == {k for k in whole.params if "mlp" not in k and "norm" not in k}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "patterns", "says"),
    [
        ("fedavg", ["*embeddings*"], "no parameter is called '\\*embeddings\\*'"),
        ("fedavg", ["*"], "nothing is left"),
        ("fedit", ["*mlp*"], "leaves the model's own parameters alone"),
    ],
)
def test_what_cannot_be_frozen_is_an_error(name: str, patterns: list[str], says: str) -> None:
    model, _ = tiny("llama", vocab=64, layers=2, width=8)
    with pytest.raises(RecipeError, match=f"model.freeze: .*{says}"):
        make(model, method.build(name), freeze=patterns)


def test_a_plan_counts_what_is_left() -> None:
    whole = plan.plan(recipe.parse(RECIPE), [4, 4])
    less = plan.plan(recipe.parse(RECIPE | {"model": {"source": "tiny:llama", "freeze": ["*embed*"]}}), [4, 4])
    assert 0 < less["trainable"] < whole["trainable"]
    assert less["up"] < whole["up"]
    assert less["clients"][0]["memory"].gradients < whole["clients"][0]["memory"].gradients
