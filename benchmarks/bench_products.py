"""Sums of low-rank products through their factors against the dense matrix: ten clients' adapters of rank 16 on a
2048 x 2048 weight. Seconds of the decomposition and of the Frobenius norm, both of the sum as the server has it: ten
pairs of factors. Seconds are those of one thread's processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import save
from threadpoolctl import threadpool_limits
from torch import Tensor

from hocket import products
from hocket.products import Product
from hocket.tree import generator

SIDE, CLIENTS, RANK, REPEATS = 2048, 10, 16, 5


def adapters(side: int) -> list[Product]:
    """What clients send: factors that have been trained a little from common ones, weighed."""
    g = generator("products", side)
    b, a = torch.randn(side, RANK, generator=g), torch.randn(RANK, side, generator=g)
    draw = lambda x: x + 0.3 * torch.randn(x.shape, generator=g)
    return [(draw(b) / CLIENTS, draw(a)) for _ in range(CLIENTS)]


def timed(what: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """The best of some runs in processor seconds, and what came out."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        out = what()
        best = min(best, time.process_time() - began)
    return best, out


def apart(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


def main() -> None:
    torch.set_num_threads(1)
    small = adapters(256)
    products.svd(small), products.norm(small), torch.linalg.svd(products.dense(small))  # load what is loaded late
    terms = adapters(SIDE)
    core, (u, s, vt) = timed(lambda: products.svd(terms), REPEATS)
    dense, (_, exact, _) = timed(lambda: torch.linalg.svd(products.dense(terms), full_matrices=False))
    gram, size = timed(lambda: products.norm(terms), REPEATS)
    formed, whole = timed(lambda: float(torch.linalg.vector_norm(products.dense(terms), dtype=torch.float64)), REPEATS)
    save(
        "products",
        {
            "side": SIDE,
            "clients": CLIENTS,
            "rank": RANK,
            "threads": 1,
            "targets": {"svd_speedup": 20},
            "svd": {
                "core_seconds": round(core, 4),
                "dense_seconds": round(dense, 2),
                "speedup": round(dense / core, 1),
                "apart_values": apart(s, exact[: len(s)]),
                "apart_product": apart((u * s) @ vt, products.dense(terms)),
            },
            "norm": {
                "gram_seconds": round(gram, 5),
                "dense_seconds": round(formed, 4),
                "speedup": round(formed / gram, 1),
                "apart": abs(size - whole) / size,
            },
        },
    )


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
