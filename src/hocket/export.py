"""A run's result as a folder that `from_pretrained` opens: a PEFT adapter, or a whole Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hocket import models, store
from hocket.errors import StoreError
from hocket.models import views
from hocket.recipe import load as load_recipe
from hocket.tree import tmap


def export(run: Path, out: Path, merge: bool = False) -> str:
    """Write the model of a run's newest checkpoint.

    Args:
        run: run folder, finished or not.
        out: folder to make.
        merge: for adapters, add them to the base weights and write the whole model.

    Returns:
        "adapter" (open it with `PeftModel.from_pretrained`) or "model" (open it with `from_pretrained`).

    Raises:
        StoreError: no run, or no whole checkpoint.
        ModelError: `out` is in use.
    """
    if not (run / "recipe.toml").exists():
        raise StoreError(f"'{run}' holds no run: recipe.toml is missing")
    recipe = load_recipe(run / "recipe.toml")
    saved, _ = store.load(run / "checkpoint", recipe.hash)
    method: Any = recipe.build_method()
    m = recipe.model
    loaded = models.load(m.source, task=m.task, num_labels=m.num_labels, seed=recipe.seed)
    view = views.make(loaded.model, method, m.task, recipe.seed)
    result = method.export(saved["engine"]["server"]["state"])
    if missing := sorted(set(view.params) ^ set(result)):
        raise StoreError(f"run and model differ in tensors, for example '{missing[0]}'; was the model changed?")
    view.place(tmap(lambda x: x, result))
    if method.view != "lora":
        models.export(view.model, loaded.tokenizer, out)
        return "model"
    if merge or method.merges:  # a base that was written into cannot be told by an adapter
        models.export(view.model.merge_and_unload(), loaded.tokenizer, out)
        return "model"
    if out.exists() and any(out.iterdir()):
        raise StoreError(f"'{out}' is not empty; choose another --out")
    view.model.save_pretrained(out, save_embedding_layers=False)
    loaded.tokenizer.save_pretrained(out)
    return "adapter"
