"""Random vectors that every party can make again from a key: the one rule of all methods that send scalars of them.

A draw belongs to its keys, by convention (seed, tensor name), and to nothing else: not to the order of tensors, to who
drew before, to dtype or device. It is made in fp32 on the CPU and then cast and moved, because the generators of CPUs
and GPUs give other numbers. (CPUs with other vector instructions may round a number's last bit otherwise; those that
are truncated at less than 1e-3 are the same everywhere.) One generator of each thread is seeded anew for each draw.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from hocket.tree import key

T = TypeVar("T")
_own = threading.local()
LANES = 16
"""torch draws fewer normal numbers than this by another rule, one by one and slowly."""
PIECE = 1 << 16
"""Numbers drawn at a time, so that their bits stay in the processor's cache; a multiple of four."""
HALF = 1 << 15


def generator(*parts: int | str) -> torch.Generator:
    """This thread's generator, keyed anew: good until the next call."""
    if not hasattr(_own, "generator"):
        _own.generator = torch.Generator()
    g: torch.Generator = _own.generator
    return g.manual_seed(key(*parts))


def normal(shape: Sequence[int], *parts: int | str, out: Tensor | None = None) -> Tensor:
    """Standard normal numbers, fp32, on the CPU.

    Args:
        out: one-dimensional fp32 memory to draw into, at least as long as the draw or 16; the result is a view of it.
    """
    n = math.prod(shape)
    flat = torch.empty(max(n, LANES)) if out is None else out[: max(n, LANES)]
    return flat.normal_(generator=generator(*parts))[:n].view(*shape)


def truncated(shape: Sequence[int], bound: float, *parts: int | str, out: Tensor | None = None) -> Tensor:
    """Standard normal numbers conditioned on |x| <= bound, by inverting their distribution function; fp32, on the CPU.
    A longer draw of the same key begins with a shorter one, row by row.

    Each is made of 16 random bits, four of one draw of the generator, whose time is most of it: one of 65536 values
    that lie evenly, and symmetric about 0, in probability. Their variance is `variance` to one part in 10^9.
    """
    n = math.prod(shape)
    flat = torch.empty(n) if out is None else out[:n]
    g = generator(*parts)
    for piece in flat.split(PIECE) if n > PIECE else (flat,):
        words = _words(len(piece)).random_(-(1 << 63), None, generator=g)
        piece.copy_(words.view(torch.int16)[: len(piece)]).add_(0.5)  # 2^15 u, |u| < 1
        if bound < 1e-3:  # x = y + y^3 / 6 + 7 y^5 / 120 + ... with y = sqrt(pi / 2) erf(bound / sqrt(2)) u
            piece.mul_(bound / HALF)  # uniform, to the last bit of fp32
        elif bound < 1e-2:
            y = piece.mul_(math.erf(bound / math.sqrt(2)) * math.sqrt(math.pi / 2) / HALF)
            y.addcmul_(y, y * y, value=1 / 6)
        else:
            piece.mul_(math.erf(bound / math.sqrt(2)) / HALF).erfinv_().mul_(math.sqrt(2))
    return flat.view(*shape)


def _words(n: int) -> Tensor:
    """This thread's memory for the bits of `n` numbers."""
    if not hasattr(_own, "words"):
        _own.words = torch.empty(PIECE // 4, dtype=torch.int64)
    words: Tensor = _own.words[: -(-n // 4)]
    return words


def variance(bound: float) -> float:
    """Variance of `truncated` numbers: 1 - 2 b phi(b) / (2 Phi(b) - 1), about b^2 / 3 where b is small."""
    if bound < 1e-2:  # the closed form takes the difference of two numbers near 1
        return bound**2 / 3 * (1 - 2 * bound**2 / 15)
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * bound * density / math.erf(bound / math.sqrt(2))


def spread(work: Callable[[Any], T], jobs: Sequence[Any], cost: Sequence[float]) -> list[T]:
    """`work` of each job, on as many threads as torch may use, each with one of torch's: generators use one, and the
    results do not depend on how many there are.

    Args:
        cost: of each job, in any unit.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not jobs:
        return [work(job) for job in jobs]
    try:
        with ThreadPoolExecutor(min(threads, len(jobs)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            order = sorted(range(len(jobs)), key=lambda i: -cost[i])  # the long ones first
            found = {i: pool.submit(work, jobs[i]) for i in order}
            return [found[i].result() for i in range(len(jobs))]
    finally:
        torch.set_num_threads(threads)  # what threads made later begin with
