"""What is said before a run: of clients who have too little memory, of fields without effect; and the plan of memory
that the report sets beside what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hocket.errors import HocketError
from hocket.methods import Method
from hocket.methods import method as methods
from hocket.models import views
from hocket.models.skeleton import skeleton
from hocket.plan import plan
from hocket.recipe import Recipe
from hocket.store import RunFolder


def shortage(clients: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each kind of client, as `plan` gives them, whose stated memory is too small."""
    short: dict[tuple[float, int], list[str]] = {}
    for c in clients:
        if c["fits"] is False:
            short.setdefault((c["memory_gb"], c["memory"].total), []).append(str(c["client"]))
    return [
        f"memory of client {', '.join(who[:10])}{f' and {len(who) - 10} more' if len(who) > 10 else ''}: it has {gb:g} "
        f"GB ({round(gb * 1e9):,} bytes) and needs up to {total / 1e9:.3g} GB ({total:,} bytes); lower "
        f"training.batch_size or data.max_length, set model.gradient_checkpointing, or train fewer tensors at once"
        for (gb, total), who in short.items()
    ]


def unused(recipe: Recipe) -> list[str]:
    """A line if clients have ranks that the method passes over. No error: studies share clients among methods."""
    m = recipe.build_method()
    if getattr(m, "unequal", False) or not any(d.rank for d in recipe.devices()):
        return []
    fit = sorted(n for n in methods.names() if getattr(methods.get(n), "unequal", False))
    return [
        f"clients.ranks (or a client's rank) has no effect: every client of '{m.name}' trains the same tensors; "
        f"take it out, or use a method for clients of unequal ranks: {', '.join(fit)}"
    ]


def vain(recipe: Recipe) -> list[str]:
    """A line if what the method does saves nothing on a model of these shapes."""
    m = recipe.build_method()
    if type(m).vain is Method.vain:
        return []
    try:
        model = skeleton(recipe.model.source, task=recipe.model.task, num_labels=recipe.model.num_labels)
        view = views.make(model, m, recipe.model.task, recipe.seed)
    except HocketError:
        return []  # what is wrong with the model is said where it is loaded
    line = m.vain({k: view.turned(k, p.data) for k, p in view.params.items()}, recipe.training)
    return [line] if line else []


def note(recipe: Recipe, rows: Sequence[int], folder: RunFolder, tell: Callable[[dict[str, Any]], None] | None) -> None:
    """Warn; plan clients' memory if it is stated or to be measured, and write `memory.json` into the run's folder."""
    for line in [*unused(recipe), *vain(recipe)]:
        if tell:
            tell({"what": "warning", "text": line})
    if not recipe.training.measure_memory and all(d.memory_gb is None for d in recipe.devices()):
        return
    try:
        clients = plan(recipe, rows)["clients"]
    except HocketError:
        return  # what is wrong with the run, it says itself when it comes to it
    for line in shortage(clients):
        if tell:
            tell({"what": "warning", "text": line})
    folder.write_json(folder.path / "memory.json", {str(c["client"]): c["memory"].table for c in clients})
