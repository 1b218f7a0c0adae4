"""A run's result as a folder that `from_pretrained` opens: a PEFT adapter, or a whole Hugging Face model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hocket import models, store
from hocket.errors import StoreError
from hocket.methods import Method
from hocket.methods.lora import BASE, PREFIX, A, modules
from hocket.models import thresholds, views
from hocket.models.views import View
from hocket.recipe import Recipe
from hocket.recipe import load as load_recipe


def export(run: Path, out: Path, merge: bool = False, client: int | None = None) -> str:
    """Write the model of a run's newest checkpoint.

    Args:
        run: run folder, finished or not.
        out: folder to make.
        merge: for adapters, add them to the base weights and write the whole model.
        client: whose model, where the method leaves each client one of its own.

    Returns:
        "adapter" (open it with `PeftModel.from_pretrained`) or "model" (open it with `from_pretrained`).

    Raises:
        StoreError: no run, no whole checkpoint, or a model that cannot be written that way.
        ModelError: `out` is in use.
    """
    if not (run / "recipe.toml").exists():
        raise StoreError(f"'{run}' holds no run: recipe.toml is missing")
    recipe = load_recipe(run / "recipe.toml")
    method: Any = recipe.build_method()
    spool = store.Spool(run / "spool")
    saved, _ = store.load(run / "checkpoint", recipe.hash, spool if method.personal else None)
    m = recipe.model
    loaded = models.load(m.source, task=m.task, num_labels=m.num_labels, seed=recipe.seed)
    result = method.export(saved["engine"]["server"]["state"])
    if method.personal or client is not None:
        result = method.personalized(result, _memory(recipe, method, saved["engine"], spool, client))
    if method.view == "lora":
        method = _fitted(method, result)
    view = views.make(loaded.model, method, m.task, recipe.seed, m.freeze)
    if missing := sorted(set(view.params) ^ set(result)):
        raise StoreError(f"run and model differ in tensors, for example '{missing[0]}'; was the model changed?")
    # a base that was written into cannot be told by an adapter
    before = view.start()
    written = any(not torch.equal(x.to(before[k]), before[k]) for k, x in result.items() if k.endswith(BASE))
    view.place(result)
    thresholds.detach(view.model)
    if m.task == "classification":
        _name_classes(view.model.config, run)
    wrapped = method.view in ("lora", "adapter")
    if wrapped and not merge and not written:
        return _adapter(view, loaded, out)
    whole = view.model
    if wrapped:
        _untied(view)
        if not hasattr(whole, "merge_and_unload"):
            raise StoreError(f"'{method.adapter}' cannot be merged into weights; leave out --merge")
        whole = whole.merge_and_unload()
    models.export(whole, loaded.tokenizer, out)
    return "model"


def _memory(
    recipe: Recipe, method: Method, engine: Mapping[str, Any], spool: store.Spool, client: int | None
) -> Mapping[str, Tensor]:
    """What that client remembers. Raises `StoreError` if the method does not ask for a client, or for this one."""
    last = recipe.clients.count - 1
    if not method.personal:
        raise StoreError(f"'{method.name}' has one model for all clients; leave out --client")
    if client is None or not 0 <= client <= last:
        raise StoreError(f"'{method.name}' leaves each client a model of its own; name one, --client 0 to {last}")
    spool.load_state_dict(engine["spool"])
    return spool.get(engine["memory"][client]) if client in engine["memory"] else {}


def _fitted(method: Any, result: Mapping[str, Tensor]) -> Any:
    """The method with the ranks that these factors have and the scales they were used with, in peft's terms.

    Factors can be of another rank than `method.rank`, and s need not be alpha / r; peft knows r and alpha alone.
    """
    ranks = {m: len(result[m + A]) for m in modules(result)}
    # rounded, or (16 / 49) * 49 would not be 16
    alphas = {m: float(f"{method.scale(m, r) * r:.12g}") for m, r in ranks.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    return replace(
        method, rank=rank, alpha=alpha, scaling="alpha/r",
        rank_pattern={m.removeprefix(PREFIX): r for m, r in ranks.items() if r != rank},
        alpha_pattern={m.removeprefix(PREFIX): x for m, x in alphas.items() if x != alpha},
    )  # fmt: skip


def _adapter(view: View, loaded: models.Loaded, out: Path) -> str:
    if out.exists() and any(out.iterdir()):
        raise StoreError(f"'{out}' is not empty; choose another --out")
    if drawn := [n for n in loaded.new if not any(k.endswith(f".{n}") for k in view.params)]:
        raise StoreError(
            f"'{drawn[0]}' is not in {loaded.source}: it was drawn for this run and no adapter holds it; use --merge"
        )
    config = view.model.peft_config["default"]
    config.base_model_name_or_path = loaded.source
    if isinstance(alpha := getattr(config, "lora_alpha", None), float) and alpha.is_integer():
        config.lora_alpha = int(alpha)
    view.model.save_pretrained(out, save_embedding_layers=False)
    loaded.tokenizer.save_pretrained(out)
    return "adapter"


def _name_classes(config: Any, run: Path) -> None:
    """Give labels that were text in the data their names."""
    try:
        names = json.loads((run / "manifest.json").read_text(encoding="utf-8")).get("classes", [])
    except (OSError, ValueError):
        names = []  # a run that was stopped before it wrote one
    config.id2label = dict(config.id2label) | dict(enumerate(names))
    config.label2id = {name: i for i, name in config.id2label.items()}


def _untied(view: View) -> None:
    """Refuse to merge into a weight that other modules use too: they would change with it."""
    places = Counter(id(p) for _, p in view.model.named_parameters(remove_duplicate=False))
    for m in modules(view.params):
        if places[id(view.model.get_parameter(m + BASE))] > 1:
            raise StoreError(
                f"'{m.removeprefix(PREFIX)}' is tied to other weights and cannot be merged into; leave out --merge"
            )
