"""From a recipe to live objects: model, data, trainer, server, evaluation. The same for a run, a plan and a worker."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from typing import Any

import torch

from hocket import data, evaluate, models
from hocket.client import Setting
from hocket.data import collate
from hocket.errors import RecipeError
from hocket.models import adapters, views
from hocket.models.forward import DTYPES, autocast
from hocket.recipe import Recipe, parse
from hocket.server import Server
from hocket.training import TorchTrainer
from hocket.tree import Tree


def device_of(recipe: Recipe) -> torch.device:
    """The device of the recipe. Raises `RecipeError` if it is not there, or cannot do the precision asked for."""
    name = recipe.model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"model.device: '{name}', but this machine has no usable GPU; use 'cpu' or 'auto'")
    if device.type == "cpu" and recipe.training.precision != "fp32":
        raise RecipeError(f"training.precision: '{recipe.training.precision}' needs a GPU; use 'fp32' on the CPU")
    return device


def prepare(recipe: Recipe, tokenizer: Any) -> data.Prepared:
    """Rows, encoded and given to clients."""
    d = recipe.data
    return data.prepare(
        d.source, tokenizer, heldout_source=d.heldout_source, heldout_fraction=d.heldout_fraction,
        task=recipe.model.task, num_labels=recipe.model.num_labels, template=d.template, fields=d.fields or None,
        max_length=d.max_length,
        packing=d.packing, kind=d.partition, clients=recipe.clients.count, column=d.column, alpha=d.alpha,
        clusters=d.clusters, bins=d.bins, equal=d.equal, corruption=d.corruption, corruption_alpha=d.corruption_alpha,
        min_rows=d.min_rows, fill=d.fill, limit=d.limit, heldout_limit=d.heldout_limit,
        client_heldout=d.client_heldout, packages=d.packages or None, seed=recipe.seed,
    )  # fmt: skip


class Experiment:
    """Everything a recipe describes, loaded once.

    Args:
        recipe: what to do.
        interrupted: asked before every local step and every batch of an evaluation; when it says yes, the work stops
            with `Interrupted`.
        prepare: what rows there are on this machine; all clients' and the held-out ones, unless it is one of several.

    Attributes:
        view, tokenizer, data, trainer: the live objects.
        method, schedule, up, down: the values.
    """

    def __init__(
        self, recipe: Recipe, interrupted: Callable[[], bool] = lambda: False,
        prepare: Callable[[Recipe, Any], data.Prepared] = prepare,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        if recipe.engine.threads:
            torch.set_num_threads(recipe.engine.threads)
        self.method, self.schedule = recipe.build_method(), recipe.build_schedule()
        self.up, self.down = recipe.build_codec("up"), recipe.build_codec("down")
        m = recipe.model
        loaded = models.load(
            m.source, task=m.task, num_labels=m.num_labels, dtype=DTYPES[m.dtype], device=device_of(recipe),
            gradient_checkpointing=m.gradient_checkpointing, seed=recipe.seed,
        )  # fmt: skip
        self.tokenizer = loaded.tokenizer
        self.view = views.make(loaded.model, self.method, m.task, recipe.seed, m.freeze)
        if m.adapter:
            adapters.place(self.view, self.method, m.adapter)
        self.data = prepare(recipe, self.tokenizer)
        multiple = 8 if self.view.device.type == "cuda" else 1  # GPUs multiply by tiles, a CPU only does more work
        self.collate = functools.partial(collate, pad_id=self.tokenizer.pad_token_id, pad_to_multiple=multiple)
        self.trainer = TorchTrainer(self.view, self.data.clients, self.collate, recipe.training, interrupted)
        self.rows = [len(c) for c in self.data.clients]
        self.asked = self._asked(loaded.model.config)

    def _asked(self, config: Any) -> list[evaluate.Question]:
        """Held-out rows that the model is to answer, so that a run that cannot score them does not begin."""
        e, reads = self.recipe.evaluation, getattr(config, "max_position_embeddings", None)
        if e.rouge is None:
            return []
        room = None if reads is None else reads - e.rouge_tokens
        return evaluate.questions(self.data.heldout, self.data.references, e.rouge, room=room)

    @property
    def steps(self) -> list[int]:
        """Local steps of each client."""
        return [self.recipe.training.steps(n) for n in self.rows]

    def setting(self) -> Setting:
        """What every job shares."""
        r = self.recipe
        return Setting(
            self.method, self.up, self.schedule.ahead, r.turns, r.seed, r.clients.weighting, self.trainer,
            self.schedule.carries,
        )  # fmt: skip

    def server(self, params: Tree | None = None) -> Server:
        """A server at version 0, its state sharing memory with an fp32 model on the CPU."""
        r = self.recipe
        start = self.trainer.start() if params is None else params
        clients = r.server_clients(self.rows)
        return Server(self.method, self.schedule, start, clients, r.turns, r.seed, r.clients.preloaded)

    def evaluate(self, params: Tree) -> dict[str, Any]:
        """Held-out metrics of the model with `params` in place. Raises `Interrupted` when asked to stop."""
        self.trainer.place(params)
        e = self.recipe.evaluation
        with autocast(self.view.device, self.trainer.precision):
            return evaluate.evaluate(
                self.view.model, self.tokenizer, self.data.heldout, self.collate, batch_size=e.batch_size,
                device=self.view.device, gsm8k_source=e.gsm8k, gsm8k_limit=e.gsm8k_limit, gsm8k_tokens=e.gsm8k_tokens,
                rouge_asked=self.asked, rouge_tokens=e.rouge_tokens, words=self.data.words,
                interrupted=self.trainer.interrupted,
            )  # fmt: skip

    def evaluate_clients(self, view_of: Callable[[int], Tree]) -> dict[str, Any]:
        """How each client's model, given by its view, does on its own held-out rows, if there are any.

        Returns:
            `clients`: each one's loss; and of all their rows together `clients_loss`, `clients_n`, for classification
            `clients_accuracy`. For a method that leaves each client a model of its own these are the scores, `loss`,
            `n`, `accuracy` and the like, with `personal` and once more as `personal_loss`, `personal_accuracy`.
        """
        found = []
        for client, rows in enumerate(self.data.own):
            self.trainer.place(view_of(client))
            with autocast(self.view.device, self.trainer.precision):
                found.append(
                    evaluate.heldout(
                        self.view.model, rows, self.collate, batch_size=self.recipe.evaluation.batch_size,
                        device=self.view.device, interrupted=self.trainer.interrupted,
                    )
                )  # fmt: skip
        if not found:
            return {}
        out, score = {"clients": [f["loss"] for f in found]}, evaluate.pooled(found)
        brief = {k: score[k] for k in ("loss", "accuracy") if k in score}
        if self.method.personal:
            return out | score | {"personal": True, **{f"personal_{k}": v for k, v in brief.items()}}
        return out | {f"clients_{k}": v for k, v in (brief | {"n": score["n"]}).items()}


def setting_of(recipe_toml: str) -> Setting:
    """What a worker process needs, from the text of a recipe."""
    return Experiment(parse(tomllib.loads(recipe_toml))).setting()
