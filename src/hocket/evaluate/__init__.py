"""What the global model can do: held-out loss, classification, GSM8K, Rouge-L."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hocket.evaluate.generate import generate
from hocket.evaluate.gsm8k import extract, gsm8k
from hocket.evaluate.loss import heldout, pooled, wilson
from hocket.evaluate.rouge import Question, questions, rouge

__all__ = ["Question", "evaluate", "extract", "generate", "gsm8k", "heldout", "pooled", "questions", "rouge", "wilson"]


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    gsm8k_source: str | None = None,
    gsm8k_limit: int = 100,
    gsm8k_tokens: int = 256,
    rouge_asked: Sequence[Question] = (),
    rouge_tokens: int = 128,
    words: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """All metrics that were asked for, in one flat record (`groups` excepted).

    Rows of text with `words` words in all also get `word_perplexity`, which models with other tokens can be held to.

    Raises:
        Interrupted: `interrupted`, asked before every batch and every generated token, said yes.
    """
    out = heldout(model, examples, collate, batch_size=batch_size, device=device, interrupted=interrupted)
    if words:
        out["word_perplexity"] = math.exp(min(out["loss"] * out["tokens"] / words, 700.0))
    if gsm8k_source is not None:
        out |= gsm8k(
            model, tokenizer, gsm8k_source, limit=gsm8k_limit, batch_size=batch_size, max_new_tokens=gsm8k_tokens,
            interrupted=interrupted,
        )  # fmt: skip
    if rouge_asked:
        out |= rouge(
            model, tokenizer, rouge_asked, batch_size=batch_size, max_new_tokens=rouge_tokens, interrupted=interrupted
        )
    return out
