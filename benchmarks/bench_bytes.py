"""Bytes of real packets against the formulas in the methods' files, and against the plan: SmolLM2-135M, every codec."""

from __future__ import annotations

import math
from typing import Any

import torch
from common import MODEL, save

from hocket.codecs import codec as codecs
from hocket.methods import Local, method
from hocket.models import views
from hocket.models.skeleton import skeleton
from hocket.plan import ShapeTrainer, plan
from hocket.recipe import parse

METHODS = ("fedavg", "fedbcd", "fedit", "ffa-lora")  # those that send the numbers of their weights themselves
CODECS = {"raw": (4, 0), "half": (2, 0), "int8": (1, 4)}  # bytes a number, bytes a row


def formula(name: str, shapes: dict[str, tuple[int, ...]], number: int, row: int) -> int:
    """Bytes a client uploads in a turn, by the formula in the method's file."""
    m = method.build(name)
    if name == "ffa-lora":
        shapes = {k: s for k, s in shapes.items() if ".lora_B." in k}
    if name == "fedbcd":
        shapes = {k: shapes[k] for k in m.cut(shapes)[0]}  # type: ignore[attr-defined]
    rows = sum(s[0] if len(s) > 1 else 1 for s in shapes.values())
    return number * sum(map(math.prod, shapes.values())) + row * rows


def main() -> None:
    table: list[dict[str, Any]] = []
    for name in METHODS:
        m = method.build(name)
        view = views.make(skeleton(MODEL), m, "causal", 0)
        shapes = {k: tuple(p.shape) for k, p in view.params.items()}
        local = Local(0, {k: torch.empty(0) for k in shapes}, {}, 0, 2, 0, 0, ShapeTrainer([1]))
        only = m.trains(local)
        update = {k: torch.randn(s) for k, s in shapes.items() if only(k)}
        for codec, (number, row) in CODECS.items():
            sent = len(codecs.build(codec).encode(update))
            expected = formula(name, shapes, number, row)
            recipe = parse(
                {
                    "model": {"source": MODEL}, "data": {"source": "docstrings"}, "method": name, "turns": 1,
                    "codec": {"up": codec}, "clients": {"count": 1},
                }
            )  # fmt: skip
            table.append(
                {
                    "method": name, "codec": codec, "formula_bytes": expected, "packet_bytes": sent,
                    "planned_bytes": plan(recipe)["up"], "packet_to_formula": round(sent / expected, 4),
                }
            )  # fmt: skip
    save("bytes", {"model": MODEL, "table": table})


if __name__ == "__main__":
    main()
