"""The one place where clients' updates are summed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def mean(trees: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    """Weighted means, one tensor at a time: for each name, over the trees that hold it, sum_i w_i x_i / sum_i w_i.

    Sums run in the order given (callers sort by job), so a result never depends on who arrived first. Half precision
    is summed in fp32. One tree alone comes through bit for bit. Memory: one sum and one tensor, whatever the number of
    trees, because packets decode a tensor when asked.

    Raises:
        ValueError: the weights of the trees that hold a tensor sum to zero.
    """
    for name in sorted({k for t in trees for k in t}):
        held = [(t, w) for t, w in zip(trees, weights, strict=True) if name in t]
        total = sum(w for _, w in held)
        if not total > 0:
            raise ValueError(f"weights of tensor '{name}' sum to {total}")
        out = None
        for t, w in held:
            x = t[name]
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            out = x * (w / total) if out is None else out.add_(x, alpha=w / total)
        assert out is not None  # `held` has at least the tree the name came from
        yield name, out
