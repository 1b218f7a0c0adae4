"""Encoding and decoding of 500 MB against a copy of the same bytes, checksum included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save

from hocket import wire


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call; its result is freed outside the measurement."""
    began = time.perf_counter()
    out = work()
    took = time.perf_counter() - began
    del out
    return took


def main() -> None:
    tree = {f"layers.{i}.weight": torch.randn(1024, 1024) for i in range(120)}
    flat = memoryview(torch.cat([t.reshape(-1) for t in tree.values()]).numpy()).cast("B")
    blob = wire.pack(tree)
    works = {"copy": lambda: bytes(flat), "encode": lambda: wire.pack(tree), "decode": lambda: wire.unpack(blob)}
    walls: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(8):
        for name, work in works.items():
            walls[name].append(seconds(work))
    ratios = {
        name: [c / w for c, w in zip(walls["copy"][1:], walls[name][1:], strict=True)] for name in ("encode", "decode")
    }
    save(
        "wire",
        {
            "megabytes": round(len(blob) / 1e6, 1),
            "target": 0.3,
            "copy_gb_s": round(len(blob) / 1e9 / statistics.median(walls["copy"][1:]), 2),
            **{f"{name}_of_copy_bandwidth": round(statistics.median(r), 3) for name, r in ratios.items()},
        },
    )


if __name__ == "__main__":
    main()
