"""Views: which parameters of a model can move, under names that do not depend on wrappers.

`full` is everything, `blocks` the transformer layers (and, if asked, the rest one by one), `lora` the low-rank adapters
that peft adds, `adapter` those of any other of its kinds, `biases` the biases, and with each of these three a new
classification head. `thresholds` is everything, and a number more for each output of a layer's linear modules. The
frozen rest is one copy, shared by all simulated clients.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from hocket.errors import RecipeError, nearest
from hocket.methods import Method
from hocket.methods.blocks import LAYER
from hocket.methods.fedpeft import HEAD
from hocket.methods.lora import A
from hocket.models import thresholds
from hocket.tree import Tree, generator

OURS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
"""Fields of peft's configs that a recipe does not set."""
SEEDS = {"projection_prng_key", "projection_seed", "proj_seed", "random_loc_seed"}
"""Fields that key what is frozen and random; the run's seed, where a recipe sets no other."""
UNFIT = {
    "lora": "is what 'fedit' and its kin train; name one of these as the method",
    "adalora": "prunes ranks in calls between steps, each client its own",
    **dict.fromkeys(("poly", "xlora"), "mixes adapters that must be there already"),
    **dict.fromkeys(
        ("prompt_tuning", "p_tuning", "multitask_prompt_tuning", "cpt"), "makes rows longer than their labels"
    ),
    **dict.fromkeys(
        ("adamss", "frod", "osf", "psoft"),
        "freezes a decomposition of the weights, which is not the same bits on every machine",
    ),
    "shira": "draws its mask from weights, which a plan does not have; 'slora' has one",
}
"""Kinds of peft's that cannot be trained by averaging, and why."""


@dataclass
class View:
    """A model seen through names: what trains, what it is called, and the values in place.

    Attributes:
        model: the transformers or peft model; its parameters outside the view are frozen.
        params: logical name to parameter.
        transposed: names of parameters that the model keeps as in x out; outside they are out x in, as in nn.Linear.
        scale: s of a module's adapter at a rank. Factors of any rank may be put in place, and peft's scale follows.
    """

    model: Any
    params: dict[str, nn.Parameter]
    transposed: frozenset[str] = frozenset()
    scale: Callable[[str, int], float] | None = None

    def __post_init__(self) -> None:
        for p in self.model.parameters():
            p.requires_grad_(False)
        self.device = next(self.model.parameters()).device
        self._placed: dict[str, Tensor] = {}  # which tensor was put into each parameter last
        for k, p in self.params.items():
            self._rescale(k, p)

    def start(self) -> Tree:
        """The values in place, on the CPU; a model on the CPU shares them with the server's state, without a copy."""
        tree = {k: self.turned(k, self.params[k].data.cpu()) for k in sorted(self.params)}
        self._placed = dict(tree)
        return tree

    def place(self, values: Tree) -> None:
        """Put values into the model: on the same device by pointing at them, else by a copy, and only where they differ
        from what is there. The tensors are never written into. Raises `KeyError` if a name is not in the view.
        """
        for k, v in values.items():
            if self._placed.get(k) is not v:
                self.params[k].data = self.turned(k, v.to(self.device))
                self._placed[k] = v
                self._rescale(k, v)

    def _rescale(self, name: str, value: Tensor) -> None:
        """Give the adapter that this A belongs to the method's scale; what peft made of its config may be another."""
        if self.scale and name.endswith(A):
            module = name.removesuffix(A)
            self.model.get_submodule(module).scaling["default"] = self.scale(module, len(value))

    def turned(self, name: str, x: Tensor) -> Tensor:
        """Between the model's layout of a parameter and the one outside."""
        return x.T if name in self.transposed else x

    def logical(self, name: str) -> Tensor:
        """The parameter as it is seen outside, out x in; gradients flow through."""
        return self.turned(name, self.params[name])

    def loosen(self, name: str) -> nn.Parameter:
        """Give a parameter its own memory and let it train; `place` puts the old value back later."""
        p = self.params[name]
        p.data = p.data.clone()
        p.requires_grad_(True)
        self._placed.pop(name, None)
        return p

    @property
    def trainable(self) -> int:
        """Number of elements that can move."""
        return sum(p.numel() for p in self.params.values())

    @property
    def total(self) -> int:
        """Number of elements of the model, adapters included."""
        return sum(p.numel() for p in self.model.parameters())


def make(model: Any, method: Method, task: str = "causal", seed: int = 0, freeze: Sequence[str] = ()) -> View:
    """The view that `method` wants of `model`, without the parameters whose names match one of `freeze`.

    Raises:
        RecipeError: the view finds nothing to train (wrong targets, an architecture without layers), or nothing that
            is to be frozen.
    """
    view = _whole(model, method, task, seed)
    if freeze and method.view not in ("full", "blocks"):
        raise RecipeError(f"model.freeze: '{method.name}' leaves the model's own parameters alone; take it out")
    for pattern in freeze:
        if not fnmatch.filter(view.params, pattern):
            raise RecipeError(f"model.freeze: no parameter is called '{pattern}'{nearest(pattern, view.params)}")
    left = {k: p for k, p in view.params.items() if not any(fnmatch.fnmatchcase(k, f) for f in freeze)}
    if not left:
        raise RecipeError("model.freeze: nothing is left to train")
    return dataclasses.replace(view, params=left) if freeze else view


def _whole(model: Any, method: Method, task: str, seed: int) -> View:
    if method.view == "lora":
        return _lora(model, method, task, seed)
    if method.view == "adapter":
        return _adapter(model, method, task, seed)
    turned: frozenset[str] = frozenset()
    if method.view == "thresholds":
        turned = thresholds.attach(model, getattr(method, "gradient", "") == "published")
    params = dict(model.named_parameters())
    if method.view == "biases":
        return View(model, _biases(params, type(model).__name__))
    if method.view == "blocks" and not getattr(method, "extras", False):
        if task == "classification":
            raise RecipeError("method.extras: a new classification head would stay as it was drawn; set it to true")
        params = {k: p for k, p in params.items() if LAYER.search(k)}
        if not params:
            raise RecipeError(f"method.name: '{method.name}' found no layers in {type(model).__name__}; use 'fedavg'")
    return View(model, params, turned)


def _lora(model: Any, method: Any, task: str, seed: int) -> View:
    convolution = any(type(m).__name__ == "Conv1D" for m in model.modules())
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if task == "classification" else TaskType.CAUSAL_LM,
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=list(method.targets) or None,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        fan_in_fan_out=convolution,
        bias="lora_only" if getattr(method, "biases", False) else "none",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks for it
            # a model that mixes Conv1D and Linear: peft sees it and mends the setting
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        modules = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if not list(m.children()) and n})
        raise RecipeError(
            f"method.targets: {error}; leaf modules of {type(model).__name__}: {', '.join(modules)}"
        ) from error
    params: dict[str, nn.Parameter] = {}
    transposed = set()
    for name, p in wrapped.named_parameters():
        if "lora_embedding_" in name:
            raise RecipeError("method.targets: adapters on embeddings are not supported; name linear modules only")
        if method.merges and name.endswith(".base_layer.weight"):
            params[name] = p
            module = wrapped.get_submodule(name.removesuffix(".weight"))
            if type(module).__name__ == "Conv1D":
                transposed.add(name)
        elif p.requires_grad:
            logical = _logical(name)
            params[logical] = p
            if ".lora_A." in name:  # keyed by name, so that it is the same on every client and in every process
                p.data = _kaiming(p.data, generator(seed, "lora", logical))
    if config.bias != "none" and not any(k.endswith(".base_layer.bias") for k in params):
        raise RecipeError(f"method.biases: the modules adapted in {type(model).__name__} have none; use false")
    bases = {k.replace(".lora_A.", ".base_layer.") for k in params if ".lora_A." in k}
    if method.merges and (lost := sorted(bases - params.keys())):
        raise RecipeError(f"method.targets: '{lost[0]}' is tied to other weights; nothing can be merged into it alone")
    return View(wrapped, params, frozenset(transposed), method.scale)


def _logical(name: str) -> str:
    """What a parameter of a peft model is called in the files that peft writes."""
    return name.replace(".default.", ".").removesuffix(".default").replace(".modules_to_save.", ".")


def _biases(params: dict[str, nn.Parameter], model: str) -> dict[str, nn.Parameter]:
    head = {k: p for k, p in params.items() if HEAD.search(k)}
    biases = {k: p for k, p in params.items() if k.endswith("bias") and k not in head}
    if not biases:
        raise RecipeError(f"method.name: {model} has no biases; use 'fedpeft', or 'fedit'")
    return biases | head


def _adapter(model: Any, method: Any, task: str, seed: int) -> View:
    known = {t.value.lower(): c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value.lower() not in UNFIT}
    name, options = method.adapter, dict(method.options)
    if name not in known:
        reason = f"'{name}' {UNFIT[name]}" if name in UNFIT else f"peft has no '{name}'{nearest(name, known)}"
        raise RecipeError(f"method.adapter: {reason}; there are {', '.join(sorted(known))}")
    fields = {f.name for f in dataclasses.fields(known[name]) if f.init} - OURS
    for key in options:
        if key not in fields:
            hint = nearest(key, fields)
            raise RecipeError(
                f"method.options.{key}: '{name}' has no such field{hint}; there are {', '.join(sorted(fields))}"
            )
    kind = TaskType.SEQ_CLS if task == "classification" else TaskType.CAUSAL_LM
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # of what peft mends itself
            # everything random is drawn on the CPU in the order of the model's modules, so all processes agree
            key = generator(seed, "adapter", name).initial_seed()
            torch.manual_seed(key)
            seeds: dict[str, Any] = dict.fromkeys(SEEDS & fields, key % 2**31)
            wrapped: Any = get_peft_model(model, known[name](task_type=kind, **(seeds | options)))
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise RecipeError(f"method.options: '{name}' does not fit {type(model).__name__}: {error}") from error
    params = {_logical(n): p for n, p in wrapped.named_parameters() if p.requires_grad}
    if not params:
        raise RecipeError(f"method.adapter: '{name}' leaves nothing to train in {type(model).__name__}")
    return View(wrapped, params)


def _kaiming(like: Tensor, g: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(in), which is kaiming_uniform with a = sqrt(5), peft's choice for A."""
    bound = like[0].numel() ** -0.5
    return ((torch.rand(like.shape, generator=g) * 2 - 1) * bound).to(like.dtype).to(like.device)
