"""Measured bytes against the formulas in the methods' files: one turn of each method on SmolLM2-135M, every codec."""

from __future__ import annotations

import math
from typing import Any

from common import MODEL, save

from hocket.methods import method
from hocket.models import views
from hocket.models.skeleton import skeleton
from hocket.plan import plan
from hocket.recipe import parse

CODECS = {"raw": 4.0, "half": 2.0, "int8": 1.0}


def elements(name: str) -> int:
    """Numbers a client uploads in a turn, by the formula in the method's file."""
    m = method.build(name)
    view = views.make(skeleton(MODEL), m, "causal", 0)
    shapes = {k: tuple(p.shape) for k, p in view.params.items()}
    count = lambda keep: sum(math.prod(s) for k, s in shapes.items() if keep(k))
    if name == "ffa-lora":
        return count(lambda k: ".lora_B." in k)
    if name == "fedbcd":
        first = m.blocks(shapes)[0]  # type: ignore[attr-defined]
        return count(lambda k: k in first)
    return count(lambda k: True)


def main() -> None:
    table: list[dict[str, Any]] = []
    for name in method.names():
        n = elements(name)
        for codec, per in CODECS.items():
            recipe = parse(
                {
                    "model": {"source": MODEL}, "data": {"source": "docstrings"}, "method": name, "turns": 2,
                    "codec": {"up": codec, "down": codec}, "clients": {"count": 2},
                }
            )  # fmt: skip
            p = plan(recipe)
            measured = p["clients"][0]["up"] / p["clients"][0]["jobs"]
            table.append(
                {
                    "method": name, "codec": codec, "formula_mb": round(per * n / 1e6, 4),
                    "measured_mb": round(measured / 1e6, 4), "ratio": round(measured / (per * n), 4),
                }
            )  # fmt: skip
    save("bytes", {"model": MODEL, "table": table})


if __name__ == "__main__":
    main()
