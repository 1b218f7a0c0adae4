"""A PEFT LoRA adapter as the start of a run (`model.adapter`): read, checked against the view, put in place.

What the adapter adds to a weight, s B A with s = alpha / r (rsLoRA: alpha / sqrt(r)), stays as it is, whatever rank and
scale s' the method has:

    same rank:       A <- A,         B <- (s / s') B
    smaller rank:    A <- [A; A_0],  B <- [(s / s') B, 0]    A_0: rows of a new adapter, so that they can learn
    a method that merges every round's factors and starts new ones:  W <- W + s B A

Names must agree both ways. To load what fits and keep silent about the rest is how adapters get lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hocket.errors import ModelError
from hocket.methods.lora import BASE, PREFIX, A, B, modules
from hocket.models import hub
from hocket.models.views import View
from hocket.tree import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
    # which modules have adapters or were trained whole: the tensors say that themselves
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    # of training only
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "eva_config", "runtime_config",
    # have a value also where what they belong to is off
    "qalora_group_size", "megatron_core",
}  # fmt: skip
_BESIDE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to draw an adapter that leave the weights beside it as they were."""


@dataclass(frozen=True)
class Adapter:
    """What lies in the folder of an adapter."""

    at: Path
    config: Mapping[str, Any]
    tensors: Tree

    def fail(self, why: str) -> ModelError:
        """An error about this adapter."""
        return ModelError(f"model.adapter: {self.at}: {why}")

    def scale(self, module: str) -> float:
        """s of a module, as peft takes it from the config; the config's rank must be that of the tensors."""
        rank, alpha = self._of(module, "r", "rank_pattern"), self._of(module, "lora_alpha", "alpha_pattern")
        found = len(self.tensors[module + A])
        if rank != found or not isinstance(alpha, int | float):
            raise self.fail(
                f"{CONFIG} gives '{module}' r = {rank} and lora_alpha = {alpha}, the file a rank of {found}"
            )
        return float(alpha / (rank**0.5 if self.config.get("use_rslora") else rank))

    def _of(self, module: str, key: str, patterns: str) -> Any:
        own = self.config.get(patterns) or {}
        return own.get(get_pattern_key(list(own), module.removeprefix(PREFIX)), self.config.get(key))


def read(source: str) -> Adapter:
    """An adapter from a folder or a hub id.

    Raises:
        ModelError: it is not there, is no plain LoRA, or has no safetensors weights; pickles are not opened.
    """
    at = Path(source).expanduser()
    if not at.is_dir():
        if at.exists() or source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise ModelError(f"model.adapter: '{source}' is no folder, and no hub id (owner/name)")
        try:
            at = hub.snapshot(source, only=[CONFIG, WEIGHTS])
        except ModelError as error:
            raise ModelError(f"model.adapter: {error}") from error
    if not (at / CONFIG).is_file():
        hint = "; it holds a model: give it as model.source" if (at / "config.json").is_file() else ""
        raise ModelError(f"model.adapter: {at}: there is no {CONFIG}{hint}")
    if not (at / WEIGHTS).is_file():
        pickled = sorted(p.name for p in at.glob("adapter_model.*"))
        hint = f"; {pickled[0]} is not opened: save the adapter as safetensors" if pickled else ""
        raise ModelError(f"model.adapter: {at}: there is no {WEIGHTS}{hint}")
    try:
        config = json.loads((at / CONFIG).read_text(encoding="utf-8"))
        found = Adapter(at, config if isinstance(config, dict) else {}, load_file(at / WEIGHTS))
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"model.adapter: {at}: a file is damaged: {error}") from error
    _plain(found)
    return found


def _plain(found: Adapter) -> None:
    """Refuse what would compute something else than W x + s B A x."""
    c = found.config
    if c.get("peft_type") != "LORA":
        raise found.fail(f"peft_type is {c.get('peft_type')!r}; only LORA can be read")
    if odd := sorted(k for k, v in c.items() if k not in _READ and v and v != "none"):
        raise found.fail(f"'{odd[0]}' = {c[odd[0]]!r} is not supported; only plain LoRA can be read")
    if (drawn := c.get("init_lora_weights", True)) not in _BESIDE:
        raise found.fail(
            f"init_lora_weights = {drawn!r} also changed the base weights; save the adapter with peft's "
            "path_initial_model_for_weight_conversion first"
        )


def place(view: View, method: Any, source: str) -> None:
    """Make a LoRA method's view begin with an adapter.

    Raises:
        ModelError: as `read`; or tensors are missing or left over, of other shapes, not finite, or of a rank above the
            method's.
    """
    found = read(source)
    new = {k: p.data for k, p in view.params.items() if not k.endswith(BASE)}
    _same_names(found, new)
    values = dict(found.tensors)
    for k, v in values.items():
        if not v.is_floating_point() or not v.isfinite().all():
            raise found.fail(f"'{k}' holds values that are not finite numbers")
        free = 0 if k.endswith(A) else 1 if k.endswith(B) else None  # the side that is the rank
        if v.ndim != new[k].ndim or any(i != free and n != new[k].shape[i] for i, n in enumerate(v.shape)):
            raise found.fail(
                f"'{k}' has shape {tuple(v.shape)}, the model's {tuple(new[k].shape)}; is the adapter of another model?"
            )
    for m in modules(new):
        a, b, s = values.pop(m + A).float(), values.pop(m + B).float(), found.scale(m)
        if len(a) != b.shape[1]:
            raise found.fail(f"'{m}' has factors of ranks {len(a)} and {b.shape[1]}")
        if method.merges and not method.increments:
            w = view.logical(m + BASE).detach()
            values[m + BASE] = w.float() + s * (b @ a).to(w.device)
            continue
        rows = new[m + A].float().cpu()
        if len(a) > len(rows):
            top = max(len(v) for k, v in found.tensors.items() if k.endswith(A))
            raise found.fail(f"'{m}' has rank {len(a)}, above the method's {len(rows)}; set method.rank = {top}")
        values[m + A] = torch.cat([a, rows[len(a) :]])
        values[m + B] = torch.cat([s / method.scale(m, len(rows)) * b, b.new_zeros(len(b), len(rows) - len(a))], dim=1)
    view.place({k: v.to(view.params[k].dtype).contiguous() for k, v in values.items()})


def _same_names(found: Adapter, new: Mapping[str, Tensor]) -> None:
    """Refuse tensors of either side that the other lacks."""
    hint, theirs = "", {k.rpartition(".lora_")[0] for k in found.tensors if ".lora_" in k}
    if theirs and theirs != set(modules(new)):
        hint = f"; its modules are {_leaves(theirs)}, those of method.targets {_leaves(modules(new))}"
    if odd := sorted(found.tensors.keys() - new.keys()):
        raise found.fail(f"the model's adapters have no place for '{odd[0]}' ({len(odd)} such tensors){hint}")
    if lost := sorted(new.keys() - found.tensors.keys()):
        raise found.fail(f"there is no '{lost[0]}' ({len(lost)} such tensors), which the run trains{hint}")


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({n.rpartition(".")[2] for n in names}))
