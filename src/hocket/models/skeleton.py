"""A model's architecture without its weights, for plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hocket.errors import ModelError
from hocket.models import shapes
from hocket.models.hub import resolve
from hocket.models.tiny import tiny


def skeleton(
    source: str | Path, *, task: str = "causal", num_labels: int = 2, dtype: torch.dtype = torch.float32
) -> Any:
    """The model on the meta device: shapes, names and configuration, no weights.

    Args:
        dtype: of the weights in a client's memory, whatever the files hold.

    Raises:
        ModelError: the configuration cannot be found.
    """
    if str(source).startswith(shapes.PREFIX):
        config = shapes.config(str(source))
    else:
        at = resolve(source)
        if isinstance(at, str) and at.startswith("tiny:"):
            return tiny(at.removeprefix("tiny:"), task, 0, num_labels=num_labels)[0].to(dtype)
        config = _config(source, at)
    auto: Any = AutoModelForCausalLM
    if task == "classification":
        auto, config.num_labels = AutoModelForSequenceClassification, num_labels
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


def _config(source: str | Path, at: str | Path) -> Any:
    try:
        if isinstance(at, Path) and at.is_file():
            return AutoConfig.from_pretrained(at.parent, gguf_file=at.name)
        return AutoConfig.from_pretrained(at)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.source '{source}': its configuration cannot be read: {error}") from error
