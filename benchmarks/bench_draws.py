"""Random vectors by the keyed rule against one plain torch.randn of as many numbers, over the tensors of real models.

For each tensor of MiniLM-L6 and of SmolLM2-135M one normal and one truncated draw (at 1/sqrt(d), d the tensor's size),
keyed by seed and name: all of them, and those below 10,000 numbers alone. `speed` is torch.randn's seconds over the
rule's, in new memory each time (as one calls randn) and into memory that is used again (as methods do). Processor
seconds of one thread, what is compared by turns, medians of ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save
from threadpoolctl import threadpool_limits

from hocket import draws
from hocket.models.skeleton import skeleton

MODELS = ("minilm-l6-v2", "smollm2-135m-instruct")
SMALL, REPEATS = 10_000, 7
Shapes = dict[str, tuple[int, ...]]


def seconds(what: Callable[[], Any], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        what()
    return (time.process_time() - began) / times


def compared(shapes: Shapes) -> dict[str, float]:
    """Speeds of both kinds of draws, in both kinds of memory; and nanoseconds a number of each."""
    sizes = {k: torch.Size(s).numel() for k, s in shapes.items()}
    total = sum(sizes.values())
    times = max(1, 2_000_000 // total)
    whole, part = torch.empty(total), torch.empty(max(max(sizes.values()), draws.LANES))

    def each(draw: Callable[[str], Any]) -> Callable[[], Any]:
        return lambda: [draw(k) for k in shapes] and None

    ways: dict[str, Callable[[], Any]] = {
        "randn": lambda: torch.randn(total) is None,
        "normal": each(lambda k: draws.normal(shapes[k], 7, k) is None),
        "truncated": each(lambda k: draws.truncated(shapes[k], sizes[k] ** -0.5, 7, k) is None),
        "randn, again": lambda: whole.normal_(),
        "normal, again": each(lambda k: draws.normal(shapes[k], 7, k, out=part) is None),
        "truncated, again": each(lambda k: draws.truncated(shapes[k], sizes[k] ** -0.5, 7, k, out=part) is None),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(REPEATS + 1):
        for name, way in ways.items():
            took = seconds(way, times)
            if i:  # the first is to warm up
                found[name].append(took)
    out: dict[str, float] = {"tensors": len(shapes), "numbers": total}
    for name, took in found.items():
        out[f"ns: {name}"] = round(statistics.median(took) / total * 1e9, 3)
    for name in ("normal", "truncated", "normal, again", "truncated, again"):
        plain = found["randn, again" if "again" in name else "randn"]
        out[f"speed: {name}"] = round(statistics.median(p / t for p, t in zip(plain, found[name], strict=True)), 2)
    return out


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {"threads": 1, "repeats": REPEATS, "target_speed": 0.5, "small": f"below {SMALL} numbers"}
    for source in MODELS:
        shapes = {k: tuple(p.shape) for k, p in skeleton(source).named_parameters()}
        small = {k: s for k, s in shapes.items() if torch.Size(s).numel() < SMALL}
        result[source] = {"all": compared(shapes), "small": compared(small)}
    save("draws", result)


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
