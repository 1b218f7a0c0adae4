"""Unequal quality: a share of each client's answers is spoiled, on some clients more than on others.

CLLoRA (https://arxiv.org/abs/2502.18910) compares clients whose texts are unequal in quality, without saying how they
were made so. Here client i has the share rho_i of its rows spoiled, with rho_i ~ Beta(alpha m, alpha (1 - m)) of mean
m: for small alpha clients are clean or spoiled throughout, for large alpha all alike. The Beta is cut into as many
equal parts as there are clients, each client gets the mean of one part, and the seed says which; so the mean over
clients is m exactly. The words of a spoiled answer are shuffled, or half of them left out, or half of them said twice,
each in a third of the rows: it holds as many words as before on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import special

from hocket.data.templates import ANSWER, pick
from hocket.errors import DataError
from hocket.tree import generator


def rates(mean: float, alpha: float, clients: int, seed: int) -> list[float]:
    """The share of spoiled rows of each client."""
    a, b, q = alpha * mean, alpha * (1 - mean), np.linspace(0, 1, clients + 1)
    x, y = special.betaincinv(a, b, q), special.betaincinv(b, a, 1 - q)  # y = 1 - x, exact where x is all but 1
    # integral of x up to a cut: m I_x(a + 1, b), or from the other end
    low, high = mean * special.betainc(a + 1, b, x), mean - (1 - q) + (1 - mean) * special.betainc(b + 1, a, y)
    below = np.where(x < 0.5, low, high)
    parts = clients * np.diff(below)
    order = torch.randperm(clients, generator=generator(seed, "corruption"))
    return [float(parts[i]) for i in order]


def choose(parts: Sequence[Sequence[int]], shares: Sequence[float], seed: int) -> list[list[int]]:
    """The rows of each client that are spoiled, of those it trains on."""
    chosen = []
    for c, (part, share) in enumerate(zip(parts, shares, strict=True)):
        order = torch.randperm(len(part), generator=generator(seed, "corruption", c)).tolist()
        chosen.append(sorted(part[at] for at in order[: round(share * len(part))]))
    return chosen


def spoil(row: Mapping[str, Any], number: int, fields: Mapping[str, str], seed: int) -> dict[str, Any]:
    """A row with its answer spoiled, keyed by the seed and the row's number.

    Raises:
        DataError: the row has no answer: it is text alone.
    """
    answer = pick(row, "output", ANSWER, fields)
    if not answer:
        raise DataError(f"data.corruption: row {number} has no answer to spoil; it is for rows with an instruction")
    names = (fields["output"],) if "output" in fields else ANSWER
    column = next(name for name in names if pick(row, "output", (name,), {}) == answer)
    return {**row, column: words(answer, generator(seed, "corruption", "row", number))}


def words(text: str, g: torch.Generator) -> str:
    """A text with its words shuffled, half of them left out (one stays), or half of them (at least one) twice."""
    old = text.split()
    way = int(torch.randint(3, (1,), generator=g))
    order = torch.randperm(len(old), generator=g).tolist()
    if way == 0:
        if order == sorted(order):
            order = order[1:] + order[:1]
        return " ".join(old[i] for i in order)
    half = set(order[: max(1, len(old) // 2)])
    if way == 1:
        return " ".join(old[i] for i in sorted(half))
    return " ".join(w for i, w in enumerate(old) for _ in range(2 if i in half else 1))
