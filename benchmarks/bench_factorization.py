"""Exact against randomized factorizations of a 4096 x 4096 matrix at rank 64: seconds, what they lose, GFLOP/s.

Two matrices: one whose singular values fall as 1/i, and noise out of which 16 directions stand. Seconds are those of
one thread's processor, so that other work on the machine does not count. GFLOP/s divide `Codec.flops` by them, and so
judge these formulas. Then every codec on an update of all of SmolLM2-135M (four steps of AdamW on docstrings): its
packet's share of the raw packet, what is lost, and seconds of encoding; low rank and topk at an equal share of bytes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import MODEL, save
from threadpoolctl import threadpool_limits
from torch import Tensor

from hocket.codecs import codec, factor, sent_raw
from hocket.experiment import Experiment
from hocket.methods import Local
from hocket.recipe import parse
from hocket.tree import Tree, generator

SIZE, RANK, SHARE = 4096, 64, 0.125
KINDS: dict[str, type[factor.Kind]] = {"svd": factor.SVD, "pca": factor.PCA, "qrcp": factor.QRCP, "cur": factor.CUR}
SPECS: dict[str, Any] = {
    "half": "half", "int8": "int8", "int4": "int4", "sign": "sign",
    "topk": {"name": "topk", "share": SHARE / 2},  # fp32 values and int32 indices: eight bytes for four
    **{kind: {"name": kind, "bytes": SHARE} for kind in KINDS},
    **{f"{k}, int8": {"name": "chain", "codecs": [{"name": k, "bytes": SHARE}, "int8"]} for k in ("svd", "pca")},
}  # fmt: skip


def update() -> Tree:
    """What a client that fine-tunes everything sends."""
    recipe = parse(
        {
            "model": {"source": MODEL}, "method": "fedavg", "turns": 1, "clients": {"count": 1},
            "data": {"source": "docstrings", "packages": ["numpy"], "max_length": 128, "heldout_limit": 8},
            "training": {"lr": 2e-5, "batch_size": 4, "local_steps": 4},
        }
    )  # fmt: skip
    experiment = Experiment(recipe)
    start = experiment.view.start()
    local = Local(0, start, {}, 0, 1, 0, 0, experiment.trainer)
    return experiment.method.train(local, start)


def matrix(spectrum: str, n: int) -> Tensor:
    """`decaying`: singular values 1, 1/2, 1/3 ... `noise`: Gaussian, and 16 directions 1.5 to 3 times as strong as its
    strongest."""
    g = generator("factorization", spectrum, n)
    if spectrum == "decaying":
        u, v = (torch.linalg.qr(torch.randn(n, n, generator=g))[0] for _ in range(2))
        return u / torch.arange(1, n + 1) @ v.mT
    u, v = (torch.linalg.qr(torch.randn(n, 16, generator=g))[0] for _ in range(2))
    return torch.randn(n, n, generator=g) + u * torch.linspace(1.5, 3, 16) * 2 * n**0.5 @ v.mT


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def timed(kind: type[factor.Kind], x: Tensor, sketched: bool) -> tuple[float, float]:
    """Seconds of one factorization, and what it loses."""
    g = generator("factorization") if sketched else None
    began = time.process_time()
    parts = kind.factor(x, RANK, g).cut(RANK)
    took = time.process_time() - began
    return took, norm(x - kind.expand(parts)) / norm(x)


def main() -> None:
    torch.set_num_threads(1)
    warm = torch.randn(512, 512)
    for kind in KINDS.values():
        timed(kind, warm, True), timed(kind, warm, False)
    rows = []
    for spectrum in ("decaying", "noise"):
        x = matrix(spectrum, SIZE)
        for name, kind in KINDS.items():
            exact, exact_lost = timed(kind, x, False)
            quick, quick_lost = min(timed(kind, x, True) for _ in range(3))
            rows.append(
                {
                    "codec": name,
                    "spectrum": spectrum,
                    "exact_seconds": round(exact, 2),
                    "randomized_seconds": round(quick, 3),
                    "speedup": round(exact / quick, 1),
                    "exact_lost": round(exact_lost, 4),
                    "randomized_lost": round(quick_lost, 4),
                    "lost_ratio": round(quick_lost / exact_lost, 4),
                    "exact_gflop_s": round(kind.flops(SIZE, SIZE, RANK, False) / exact / 1e9, 1),
                    "randomized_gflop_s": round(kind.flops(SIZE, SIZE, RANK, True) / quick / 1e9, 1),
                }
            )
            print(rows[-1], flush=True)
    tree = update()
    raw, whole, sizes = codec.build("raw").size(tree), sum(norm(x) ** 2 for x in tree.values()) ** 0.5, []
    for name, spec in SPECS.items():
        c = codec.build(spec)
        began = time.process_time()
        blob = c.encode(tree)
        took = time.process_time() - began
        out = c.decode(blob)
        lost = sum(norm(tree[k] - out[k]) ** 2 for k in tree) ** 0.5 / whole
        sizes.append(
            {
                "codec": name,
                "share": round(len(blob) / raw, 4),
                "lost": round(lost, 4),
                "seconds": round(took, 1),
                "gflop": round(c.work(tree) / 1e9, 1),
                "sent_raw": sent_raw(out.packet.meta),
            }
        )
        print(sizes[-1], flush=True)
    save(
        "factorization",
        {
            "size": SIZE,
            "rank": RANK,
            "threads": 1,
            "targets": {"speedup": 10, "lost_ratio": 1.05},
            "rows": rows,
            "update": {"model": MODEL, "tensors": len(tree), "share": SHARE, "codecs": sizes},
        },
    )


if __name__ == "__main__":
    with threadpool_limits(1):  # SciPy's LAPACK has threads of its own
        main()
