"""Rouge-L of greedy answers to held-out rows (extra `rouge`).

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, https://aclanthology.org/W04-1013. With LCS the
longest common subsequence of the words of an answer and of its reference: P = LCS / words of the answer, R = LCS /
words of the reference, F = 2 P R / (P + R). Computed by Google's `rouge-score`, with its own tokenizer (small letters;
words are runs of a-z and 0-9, so other scripts have none) and without its stemmer; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hocket.errors import DataError, need
from hocket.evaluate.generate import generate
from hocket.evaluate.loss import mean_interval
from hocket.models.forward import IGNORE
from hocket.tree import generator

Question = tuple[list[int], str]
"""Token ids of a prompt, and the answer it should get."""


def questions(
    examples: Sequence[Any], references: Sequence[str], limit: int, *, room: int | None = None
) -> list[Question]:
    """At most `limit` of the held-out rows that ask something, always the same ones, in their order.

    A prompt is exactly what training put before the answer: all of a row's tokens up to the first that is learned.

    Args:
        examples: encoded rows.
        references: each one's whole answer, or "" where nothing is asked. Answers without a word are left out.
        room: most tokens of a prompt, or None for any.

    Raises:
        DataError: no row asks anything, or a prompt has no room.
        HocketError: `rouge-score` is not installed.
    """
    need("rouge_score", "rouge")
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=False).tokenize
    able = [i for i, text in enumerate(references) if text and words(text)]
    if not able:
        raise DataError(
            "evaluation.rouge: no held-out row has an instruction and an answer with words (of a-z and 0-9) to hold "
            "the model's to; leave it out"
        )
    # not keyed by the seed: runs of several seeds are compared on the same rows
    order = torch.randperm(len(able), generator=generator("rouge")).tolist()
    out = [(_prompt(examples[i]), references[i]) for i in sorted(able[at] for at in order[:limit])]
    if room is not None and (longest := max(len(p) for p, _ in out)) > room:
        raise DataError(
            f"evaluation.rouge_tokens: the model has no room for so many behind a prompt of {longest} tokens; lower it "
            f"by {longest - room}, or data.max_length"
        )
    return out


def rouge(
    model: Any, tokenizer: Any, asked: Sequence[Question], *, batch_size: int = 16, max_new_tokens: int = 128,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:  # fmt: skip
    """Score greedy answers; an answer without a word scores 0.

    Returns:
        `rouge_l` (mean F over rows, in [0, 1]), `rouge_l_low`, `rouge_l_high` (95 %, normal), `rouge_l_n` rows,
        `rouge_l_empty` (share of answers without a word).

    Raises:
        HocketError: `rouge-score` is not installed.
        Interrupted: as `generate`.
    """
    prompts = [prompt for prompt, _ in asked]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, interrupted=interrupted
    )
    return score(answers, [reference for _, reference in asked])


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """What `rouge` returns, of answers that are there."""
    need("rouge_score", "rouge")
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=False)
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    each = [float(scorer.score(r, a)["rougeL"].fmeasure) for a, r in zip(answers, references, strict=True)]
    low, mean, high = mean_interval(each)
    return {
        "rouge_l": mean, "rouge_l_low": max(0.0, low), "rouge_l_high": min(1.0, high), "rouge_l_n": len(each),
        "rouge_l_empty": sum(not words.tokenize(a) for a in answers) / len(each),
    }  # fmt: skip


def _prompt(example: Any) -> list[int]:
    labels = torch.as_tensor(example["labels"])
    head = int((labels != IGNORE).int().argmax())  # the first that is not -100
    return list(torch.as_tensor(example["input_ids"])[:head].tolist())
