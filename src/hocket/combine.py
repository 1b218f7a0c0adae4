"""The one place where clients' updates are summed, and trees whose tensors are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """A tree that makes a tensor each time it is asked for it, so that whole trees never stand in memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a look, without making it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def part(tree: Mapping[str, Tensor], wanted: Callable[[str], bool]) -> Lazy:
    """The tensors of `tree` whose names are wanted, each made when it is asked for."""
    return Lazy([k for k in tree if wanted(k)], tree.__getitem__)


def mean(
    trees: Sequence[Mapping[str, Tensor]], weights: Sequence[float], shares: Sequence[float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Weighted means, one tensor at a time: for each name, over the trees that hold it, sum_i w_i x_i / sum_i s_i.

    Sums run in the order given (callers sort by job), so a result never depends on who arrived first. Half precision
    is summed in fp32. One tree alone comes through bit for bit. Memory: one sum and one tensor, whatever the number of
    trees, because packets decode a tensor when asked. The tensors are new, the caller's to write into.

    Args:
        shares: what each tree counts for in the divisor; none: its weight. A stale update that weighs less than its
            share makes the whole step smaller, as FedBuff's does.

    Raises:
        ValueError: the shares of the trees that hold a tensor sum to zero.
    """
    for name, held in _held(trees, weights, shares):
        yield name, _sum(name, held)


def moved(
    params: Mapping[str, Tensor],
    trees: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    shares: Sequence[float] | None = None,
    rate: float = 1.0,
) -> Iterator[tuple[str, Tensor]]:
    """`params` plus `rate` times `mean(trees, weights, shares)`, as new tensors of the same dtypes; half precision is
    rounded once. A tree alone is added in one pass over memory."""
    for name, held in _held(trees, weights, shares):
        old = wide(params[name])
        held = [(tree, rate * factor) for tree, factor in held]
        if len(held) == 1:
            ((tree, factor),) = held
            new = torch.add(old, wide(tree[name]), alpha=factor)
        else:  # summed first: added one by one, each would be rounded to the precision of the far larger `old`
            new = _sum(name, held).add_(old)
        yield name, new.to(params[name].dtype)


def difference(then: Mapping[str, Tensor], now: Mapping[str, Tensor], names: Iterable[str]) -> Lazy:
    """then - now of these tensors, each when it is asked for."""
    return Lazy(names, lambda k: then[k] - now[k])


def against(delta: Mapping[str, Tensor], then: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Lazy:
    """(then + delta) - now of delta's tensors, each when it is asked for; delta's own where nothing moved."""
    return Lazy(delta, lambda k: delta[k] if then[k] is now[k] else (then[k] - now[k]).add_(delta[k]))


def wide(x: Tensor) -> Tensor:
    """Half precision as fp32. (torch's own sums of it with a factor depend on the number of threads.)"""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def finite(x: Tensor) -> bool:
    """Whether all values are, in one pass and no memory: a finite sum has finite terms, another may just be large."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _held(
    trees: Sequence[Mapping[str, Tensor]], weights: Sequence[float], shares: Sequence[float] | None
) -> Iterator[tuple[str, list[tuple[Mapping[str, Tensor], float]]]]:
    """For each name the trees that hold it, and what each is multiplied by."""
    shares = weights if shares is None else shares
    for name in sorted({k for t in trees for k in t}):
        held = [(t, w, s) for t, w, s in zip(trees, weights, shares, strict=True) if name in t]
        total = sum(s for _, _, s in held)
        if not total > 0:
            raise ValueError(f"weights of tensor '{name}' sum to {total}")
        yield name, [(t, w / total) for t, w, _ in held]


def _sum(name: str, held: list[tuple[Mapping[str, Tensor], float]]) -> Tensor:
    (first, factor), *rest = held
    out = wide(first[name]) * factor
    for tree, factor in rest:
        out.add_(wide(tree[name]), alpha=factor)
    return out
