"""GSM8K: grade-school problems, scored by exact match of the final number.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021, https://arxiv.org/abs/2110.14168. The answer is
the number after `####`, else the one in `\\boxed{}`, else the last number in the text. Numbers are compared as numbers:
commas, currency and percent signs and trailing dots do not count, fractions are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hocket.data import load
from hocket.data.templates import prompt_text
from hocket.errors import DataError
from hocket.evaluate.generate import generate
from hocket.evaluate.loss import wilson

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|-?\$?\.\d+")
ASK = "{question}\n\nSolve this step by step. End with a line that holds #### and the final number."


def extract(text: str) -> Fraction | None:
    """The final number of an answer, or None if it has none."""
    for pattern in (r"####\s*([^\n]*)", r"\\boxed\{([^{}]*)\}"):
        if found := re.findall(pattern, text):
            value = _number(found[-1])
            if value is not None:
                return value
    return _number(text, last=True)


def _number(text: str, last: bool = False) -> Fraction | None:
    found = NUMBER.findall(text)
    if not found:
        return None
    plain = re.sub(r"[,$\s]", "", found[-1 if last else 0])
    top, _, bottom = plain.partition("/")
    return Fraction(top) / Fraction(bottom) if bottom and Fraction(bottom) else Fraction(top)


def gsm8k(
    model: Any,
    tokenizer: Any,
    source: str,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score greedy answers.

    Args:
        source: file or hub id (`openai/gsm8k:main`) with columns `question` and `answer`.
        limit: problems scored, from the beginning.
        interrupted: as in `generate`.

    Returns:
        `gsm8k` (share solved), `gsm8k_low`, `gsm8k_high` (95 %), `gsm8k_n`, `gsm8k_numbers` (share of answers that
        hold a number at all).
    """
    rows = load(source, split="test", limit=limit)
    if not {"question", "answer"} <= set(rows.column_names):
        raise DataError(f"evaluation.gsm8k: '{source}' has columns {rows.column_names}, not question and answer")
    truth = [extract(a) for a in rows["answer"]]
    if None in truth:
        raise DataError(f"evaluation.gsm8k: row {truth.index(None)} of '{source}' has no number in its answer")
    prompts = [prompt_text(ASK.format(question=q), tokenizer) for q in rows["question"]]
    more: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "interrupted": interrupted}
    found = [extract(t) for t in generate(model, tokenizer, prompts, **more)]
    hits = sum(a == b for a, b in zip(truth, found, strict=True))
    low, high = wilson(hits, len(truth))
    return {
        "gsm8k": hits / len(truth), "gsm8k_low": low, "gsm8k_high": high, "gsm8k_n": len(truth),
        "gsm8k_numbers": sum(f is not None for f in found) / len(found),
    }  # fmt: skip
