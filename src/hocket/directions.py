"""Random directions of a whole model, added to it in place: theta += sum_k c_k z_k with z_k = N(0, I) drawn anew.

z_k of a tensor is `draws.normal(shape, seed_k, name)`, so it depends on nothing else. It is drawn and added in pieces
that stay in the processor's cache, so no tensor of it stands in memory unless it is to be used again; tensors go to as
many threads as torch has (its generators let go of the interpreter), and the same bits come of any number of them.
On a GPU pieces are drawn on the CPU and moved, so directions are the same there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hocket import draws
from hocket.draws import LANES
from hocket.tree import key

PIECE = (1 << 15) - LANES
"""Numbers drawn at a time on a CPU: too few for torch to share them out among threads, and a multiple of LANES."""
MOVED = 1 << 20
"""Numbers moved to a GPU at a time."""

Terms = Sequence[tuple[int, float]]
"""(k, coefficient of z_k)"""


def pieces(n: int, *parts: int | str, size: int = PIECE) -> Iterator[tuple[slice, Tensor]]:
    """`draws.normal((n,), *parts)`, piece by piece from one buffer that each piece overwrites.

    torch draws normal numbers in groups of LANES, so a draw goes on where it stopped if pieces are whole groups.

    Args:
        size: of a piece, a multiple of LANES.
    """
    if n <= size + LANES:
        yield slice(0, n), draws.normal((n,), *parts)
        return
    g, buffer, at = torch.Generator().manual_seed(key(*parts)), torch.empty(size + LANES), 0
    while at < n:
        m = size if n - at >= size + LANES else n - at
        yield slice(at, at + m), buffer[:m].normal_(generator=g)
        at += m


class Directions:
    """z_0, z_1, ... over named tensors.

    Args:
        seed: all of them derive from it.
        room: numbers of z that may be kept for the next call: those of the largest tensors that fit. A kept tensor is
            drawn again only when another direction of it was used last.
    """

    def __init__(self, seed: int, room: int = 0) -> None:
        self.seed, self.room = seed, room
        self._kept: dict[str, Tensor] | None = None
        self._which: dict[str, int] = {}  # whose numbers these are

    def add(self, tensors: Mapping[str, Tensor], terms: Terms) -> None:
        """tensors += sum of c z_k over the terms (k, c), in place and in their order. Shapes alone stay as they are."""
        if any(t.is_meta for t in tensors.values()):
            return
        if self._kept is None:
            self._kept = self._chosen(tensors)
        order = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
        workers = torch.get_num_threads()
        if workers == 1 or sum(t.numel() for t in tensors.values()) * len(terms) < 4 * PIECE:
            self._add(order, tensors, terms)
            return
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda name: self._add([name], tensors, terms), order))

    def _chosen(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        left, chosen = self.room, {}
        for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
            if tensors[name].numel() <= left:
                chosen[name] = torch.empty(tensors[name].numel(), device=tensors[name].device)
                left -= tensors[name].numel()
        return chosen

    def _add(self, names: Iterable[str], tensors: Mapping[str, Tensor], terms: Terms) -> None:
        for name in names:
            x = tensors[name]
            flat = x.view(-1) if x.is_contiguous() else None
            for k, c in terms:
                for at, z in self._pieces(name, x, k, None if flat is None else PIECE if x.is_cpu else MOVED):
                    # the sum is made in the wider precision of both and rounded once
                    (x if flat is None else flat[at]).add_(z.view(x.shape) if flat is None else z, alpha=c)

    def _pieces(self, name: str, x: Tensor, k: int, size: int | None) -> Iterator[tuple[slice, Tensor]]:
        n = x.numel()
        size = n + (-n) % LANES if size is None else size
        kept = None if self._kept is None else self._kept.get(name)
        if kept is not None and self._which.get(name) == k:
            yield from ((slice(at, at + size), kept[at : at + size]) for at in range(0, n, size))
            return
        for at, z in pieces(n, key(self.seed, k), name, size=size):
            here = z.to(x.device)
            if kept is not None:
                kept[at] = here
            yield at, here
        if kept is not None:
            self._which[name] = k
