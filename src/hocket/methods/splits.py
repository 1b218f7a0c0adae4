"""Blocks of tensors, and each block's share of a total."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def blocks(tree: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the tensors of each block: sorted, cut where one more would make more than 0.9 of the median size."""
    names = sorted(k for k, x in tree.items() if x.is_floating_point())
    target = int(0.9 * statistics.median([tree[k].numel() for k in names])) if names else 0
    out: list[list[str]] = []
    size = 0
    for name in names:
        n = tree[name].numel()
        if not out or size + n > target:
            out.append([])
            size = 0
        out[-1].append(name)
        size += n
    return out


def apportion(total: int, norms: Sequence[float], caps: Sequence[int]) -> list[int]:
    """`total` split in proportion to `norms`: numbers go one by one to whoever has the largest norm / (numbers + 1),
    those with a norm and none first, and none gets more than its cap. What then is left goes to those without a norm,
    by their caps."""
    total = min(total, sum(caps))
    if not all(math.isfinite(x) for x in norms):
        return apportion(total, [float(c) for c in caps], caps)  # the upload will be refused for its values
    ahead = [i for i, x in enumerate(norms) if x > 0 and caps[i] > 0]
    out = [0] * len(norms)
    for i in sorted(ahead, key=lambda i: (-norms[i], i))[:total]:
        out[i] = 1
    rest = min(total, sum(caps[i] for i in ahead))
    if rest > sum(out):
        x, cap = (torch.tensor([v[i] for i in ahead], dtype=torch.float64) for v in (norms, caps))

        def of(price: float) -> Tensor:
            return torch.minimum((x / price).floor().clamp(min=1), cap)

        low, high = 0.0, float(x.max())  # at price `high` there are too few, at `low` too many
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float(of(middle).sum()) > rest else (low, middle)
        for i, n in zip(ahead, of(high).long().tolist(), strict=True):
            out[i] = n
        while sum(out) < rest:  # equal claims, and what rounding has left
            best = max((i for i in ahead if out[i] < caps[i]), key=lambda i: (norms[i] / (out[i] + 1), -i))
            out[best] += 1
    if (left := total - sum(out)) > 0:
        others = [i for i in range(len(norms)) if i not in set(ahead)]
        spare = [caps[i] for i in others]
        for i, n in zip(others, apportion(left, [float(c) for c in spare], spare), strict=True):
            out[i] = n
    return out
