"""Greedy decoding of many prompts at once, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hocket.data.templates import closing
from hocket.errors import Interrupted


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str | Sequence[int]], *, max_new_tokens: int = 256,
    batch_size: int = 16, interrupted: Callable[[], bool] = lambda: False,
) -> list[str]:  # fmt: skip
    """The model's continuation of each prompt, as when each is decoded alone.

    Prompts are padded on the left with a mask, so that positions are right; they are sorted by length to pad little.
    Special tokens written out in a prompt are read as such, and none are added if it starts with the tokenizer's own.
    Penalties that the model's own settings hold for sampling are off: they would count padding.

    Args:
        prompts: texts, or the token ids of texts, which are taken as they are.
        max_new_tokens: where to cut a continuation that does not end by itself.
        batch_size: prompts in one batch.

    Raises:
        Interrupted: `interrupted`, asked before every batch and every token, said yes.
    """

    def stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if interrupted():
            raise Interrupted
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = [_ids(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    device = next(model.parameters()).device
    out = [""] * len(ids)
    was_training, cached = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    model.config.use_cache = True
    try:
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            longest = max(len(ids[i]) for i in chosen)
            padded = torch.tensor([[pad] * (longest - len(ids[i])) + ids[i] for i in chosen], device=device)
            mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=device)
            with torch.inference_mode():
                stop(padded)
                done = model.generate(
                    input_ids=padded, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                    temperature=None, top_p=None, top_k=None, num_beams=1, use_cache=True, pad_token_id=pad,
                    repetition_penalty=1.0, no_repeat_ngram_size=0, eos_token_id=_stops(model, tokenizer),
                    stopping_criteria=[stop],
                )  # fmt: skip
            for i, row in zip(chosen, done[:, longest:].tolist(), strict=True):
                out[i] = tokenizer.decode(row, skip_special_tokens=True)
    finally:
        model.train(was_training)
        model.config.use_cache = cached
    return out


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    bos = tokenizer.bos_token
    return list(tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))["input_ids"])


def _stops(model: Any, tokenizer: Any) -> list[int] | None:
    """Every token that ends an answer."""
    found = getattr(model.generation_config, "eos_token_id", None)
    stops = set(found if isinstance(found, list) else [found]) | {tokenizer.eos_token_id, closing(tokenizer)}
    return sorted(s for s in stops if s is not None) or None
