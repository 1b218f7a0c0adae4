"""The only "model" the core knows: a flat dict from tensor name to tensor, and the few things done to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

Tree = dict[str, Tensor]


def tmap(f: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> Tree:
    """Apply `f` name by name; all trees must have the same names as the first."""
    for other in trees[1:]:
        if other.keys() != trees[0].keys():
            odd = sorted(set(other) ^ set(trees[0]))[:3]
            raise ValueError(f"trees differ in names, for example {odd}")
    return {k: f(*(t[k] for t in trees)) for k in sorted(trees[0])}


def nbytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of the elements, in memory."""
    return sum(t.numel() * t.element_size() for t in tree.values())


def held(*nested: Mapping[Any, Any]) -> int:
    """Bytes of all tensors in nested dicts, each tensor once."""
    seen: dict[int, int] = {}
    trees = list(nested)
    while trees:
        for x in trees.pop().values():
            if isinstance(x, Tensor):
                seen[id(x)] = x.numel() * x.element_size()
            elif isinstance(x, Mapping):
                trees.append(x)
    return sum(seen.values())


def norm(tree: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all tensors, accumulated in float64 in name order."""
    return float(sum(torch.linalg.vector_norm(tree[k], dtype=torch.float64) ** 2 for k in sorted(tree)) ** 0.5)


def raw(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row major; no copy if it is a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def digest(tree: Mapping[str, Tensor]) -> str:
    """128-bit hash of names, dtypes, shapes and bytes; the same for equal trees whatever their dict order."""
    h = xxhash.xxh3_128()
    for k in sorted(tree):
        h.update(f"{k}|{tree[k].dtype}|{tuple(tree[k].shape)}|".encode())
        h.update(raw(tree[k]))
    return h.hexdigest()


def key(*parts: int | str) -> int:
    """63 bits that stand for `parts`."""
    return xxhash.xxh64("\x1f".join(map(str, parts)).encode()).intdigest() >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator keyed by its arguments, so that a draw depends on what it is for, never on who ran first.

    Example:
        >>> a, b = generator(7, "client", 3), generator(7, "client", 3)
        >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
        True
    """
    return torch.Generator().manual_seed(key(*keys))
