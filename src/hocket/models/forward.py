"""One forward pass for every architecture: the summed loss of a batch and how much it sums over."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def loss_sum(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """(sum of negative log-likelihoods, number of label tokens or rows) of a batch.

    Args:
        model: a transformers model, causal or sequence classification, possibly wrapped by peft.
        batch: `input_ids`, `attention_mask` of shape (rows, length); `labels` of the same shape with -100 where nothing
            is predicted, or of shape (rows,) for classification.
    """
    logits, target = predictions(model, batch)
    loss = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), target.reshape(-1), ignore_index=IGNORE, reduction="sum"
    )
    return loss, int((target != IGNORE).sum())


def predictions(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits, labels) of a batch, aligned: the logits at a position predict the label at the same position.

    Shapes (rows, positions, vocabulary) and (rows, positions), or (rows, classes) and (rows,) for classification.
    Logits are computed only from the first labelled position on: with a long prompt, a vocabulary of 49,152 and four
    rows of 256 tokens the full logits alone are 200 MB.
    """
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    if labels.ndim == 1:
        return model(**inputs).logits, labels
    length = labels.shape[1]
    used = (labels[:, 1:] != IGNORE).any(0).nonzero()
    first = int(used[0]) if len(used) else length - 2  # position whose output predicts the first label
    keep = length - first
    extra = {"logits_to_keep": keep} if keep < length and _keeps(model) else {}
    return model(**inputs, **extra).logits[:, -keep:-1], labels[:, first + 1 :]


def _keeps(model: Any) -> bool:
    """Whether the architecture can leave out logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision: `fp32` switches it off."""
    half = precision != "fp32"
    return torch.autocast(device.type, dtype=DTYPES[precision] if half else None, enabled=half)
