"""What Ferret's coordinates keep of an update, and what they cost.

`fidelity`: slope of the reconstruction and its relative error (root of the mean square over draws), float64, one
block of d numbers, against sqrt(d / K); also with the published code's scale and by least squares.
`cost`: one client's projection and the reconstruction of one update, over the tensors of MiniLM-L6 and SmolLM2-135M
with k = 1024, against one plain torch.randn of as many numbers as are drawn. Processor seconds of one thread, by
turns, medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save
from threadpoolctl import threadpool_limits

from hocket.methods import Local, method
from hocket.methods.ferret import COUNTS, GAMMA, SEED, Ferret
from hocket.methods.splits import blocks
from hocket.models.skeleton import skeleton
from hocket.tree import Tree, generator

D, COUNT, VISITS, REPEATS = 400, (16, 64, 256), 200, 3
K = 1024
MODELS = ("minilm-l6-v2", "smollm2-135m-instruct")


class Given:
    """A trainer that comes back with a given difference."""

    def __init__(self, delta: Tree) -> None:
        self.delta = delta

    def fit(self, *_: Any) -> Tree:
        return self.delta


def sent(m: Ferret, delta: Tree, visit: int = 0) -> Tree:
    trainer: Any = Given(delta)
    return m.train(Local(0, delta, {}, 0, 1, visit, 7, trainer), delta)


def fidelity(**fields: Any) -> dict[str, float]:
    m: Any = method.build({"name": "ferret", **fields})
    delta = torch.randn(D, dtype=torch.float64, generator=generator("delta"))
    found = torch.stack([m.effect(m.accept({"w": delta}, sent(m, {"w": delta}, i)))["w"] for i in range(VISITS)])
    slope = found @ delta / (delta @ delta)
    error = (found - delta).square().sum(1).mean().sqrt() / delta.norm()
    return {"slope": round(float(slope.mean()), 3), "error": round(float(error), 3)}


def processor(what: Callable[[], Any]) -> float:
    began = time.process_time()
    what()
    return time.process_time() - began


def cost(source: str) -> dict[str, float]:
    m: Any = method.build({"name": "ferret", "k": K})
    delta = {k: torch.randn(p.shape, generator=generator(k)).mul_(1e-3) for k, p in skeleton(source).named_parameters()}
    groups = blocks(delta)
    up = sent(m, delta)
    news = {GAMMA: up[GAMMA], COUNTS: up[COUNTS].unsqueeze(0), SEED: up[SEED]}
    drawn = sum(int(n) * sum(delta[k].numel() for k in names) for n, names in zip(up[COUNTS], groups, strict=True))
    buffer = torch.empty(1 << 24)  # one randn of all of them would not fit into memory
    ways: dict[str, Callable[[], Any]] = {
        "project": lambda: sent(m, delta),
        "reconstruct": lambda: m.apply(delta, news),
        "randn": lambda: buffer.normal_(),
    }
    took: dict[str, list[float]] = {k: [] for k in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            took[name].append(processor(way) * (drawn / len(buffer) if name == "randn" else 1))
    out: dict[str, float] = {
        "parameters": sum(x.numel() for x in delta.values()), "blocks": len(groups), "k": m.k,
        "upload_bytes": sum(x.nbytes for x in up.values()), "numbers_drawn": drawn,
    }  # fmt: skip
    for name, seconds in took.items():
        out[f"{name}_seconds"] = round(statistics.median(seconds), 3)
        out[f"{name}_ns_a_number"] = round(statistics.median(seconds) / drawn * 1e9, 3)
    for name in ("project", "reconstruct"):
        pairs = zip(took["randn"], took[name], strict=True)
        out[f"{name}_speed_against_randn"] = round(statistics.median(r / t for r, t in pairs), 2)
    return out


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        {
            "d": D, "K": k, "root_d_over_K": round((D / k) ** 0.5, 3), "unbiased": fidelity(k=k),
            "published": fidelity(k=k, scale="published"), "least_squares": fidelity(k=k, solve=True),
        }
        for k in COUNT
    ]  # fmt: skip
    save(
        "ferret",
        {
            "draws": VISITS,
            "fidelity": rows,
            "all_vectors": {"K": D, "least_squares_error": fidelity_exact()},
            "threads": 1,
            "repeats": REPEATS,
            "cost": {source: cost(source) for source in MODELS},
        },
    )


def fidelity_exact() -> float:
    """Relative error with as many vectors as numbers."""
    m: Any = method.build({"name": "ferret", "k": D, "solve": True})
    delta = {"w": torch.randn(D, dtype=torch.float64, generator=generator("delta"))}
    found = m.effect(m.accept(delta, sent(m, delta)))["w"]
    return float((found - delta["w"]).norm() / delta["w"].norm())


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
