"""Put the committed results of the studies beside this file into docs/parablock.md, as tables and a figure.

`make parablock` makes the results; this only reads them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from hocket.results import table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from figures import COLOURS, between, line, page, text  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PAGE, FIGURE = ROOT / "docs" / "parablock.md", ROOT / "docs" / "parablock.svg"
STUDIES = ("parablock-math", "parablock-alpaca", "parablock-overlap", "parablock-skew")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 440, 300, 60, 36, 48


def rates(result: dict[str, Any]) -> str:
    """What each rate gave on the tuning split."""
    lines = ["| variant | held-out loss by rate, on the tuning split |", "|---|---|"]
    for name, v in result["variants"].items():
        tried = ", ".join(f"{r}: {x:.4f}" + (" *" if float(r) == v["rate"] else "") for r, x in v["tuning"].items())
        lines.append(f"| {name} | {tried} |")
    return "\n".join(lines)


def memory(result: dict[str, Any]) -> str:
    """What a client holds, planned from shapes and measured, in MB."""
    parts = ("parameters", "gradients", "optimizer", "activations", "peak")
    lines = [f"| method | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name, v in result["methods"].items():
        both = (v["planned_measured_bytes"][part] for part in parts)
        lines.append(f"| {name} | {' | '.join(f'{a / 1e6:.1f} / {b / 1e6:.1f}' for a, b in both)} |")
    return "\n".join(lines)


def panel(result: dict[str, Any], x0: int, y0: int) -> str:
    """Mean loss over seeds against virtual time to the end of the run, a dot a variant; bars are the standard deviation
    over seeds once what all variants of a seed have in common is taken out."""
    rows = result["variants"]
    losses = [v["loss"] for v in rows.values() if math.isfinite(v["loss"])]
    spread = max(max(losses) - min(losses), 1e-3)
    low, high = min(losses) - 0.15 * spread, max(losses) + 0.15 * spread
    longest = max(v["virtual_seconds"] for v in rows.values()) * 1.05
    px = lambda t: x0 + LEFT + t / longest * (WIDTH - LEFT - 20)
    py = lambda y: y0 + TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
    out = [text(x0 + 8, y0 + 20, result["study"].removeprefix("parablock-"), "start", 13, font_weight="bold")]
    for i in range(5):
        y, t = low + (high - low) * (i + 0.5) / 5, longest * i / 4
        out.append(line(px(0), py(y), px(longest), py(y), "#808080", 0.25))
        out.append(text(x0 + LEFT - 6, py(y) + 4, f"{y:.3f}", "end"))
        out.append(text(px(t), y0 + HEIGHT - 28, f"{t:.0f}"))
    out.append(text(px(longest / 2), y0 + HEIGHT - 10, "virtual seconds of the run", size=13))
    middle = [sum(v["losses"][i] for v in rows.values()) / len(rows) for i in range(len(result["seeds"]))]
    taken: list[float] = []
    for i, (name, v) in sorted(enumerate(rows.items()), key=lambda row: row[1][1]["loss"]):
        sd = statistics.stdev(x - m for x, m in zip(v["losses"], middle, strict=True))
        x, colour = px(v["virtual_seconds"]), COLOURS[i % len(COLOURS)]
        out.append(line(x, min(py(v["loss"] - sd), py(low)), x, max(py(v["loss"] + sd), py(high)), colour))
        out.append(f"<circle cx='{x:.1f}' cy='{py(v['loss']):.1f}' r='4.5' fill='{colour}'/>")
        right, y = x > x0 + 0.62 * WIDTH, py(v["loss"]) + 4
        while any(abs(y - other) < 12 for other in taken):
            y -= 1
        taken.append(y)
        out.append(text(x - 9 if right else x + 9, y, name, "end" if right else "start", fill=colour))
    return "".join(out)


def main() -> None:
    results = {s: json.loads((RESULTS / f"{s}.json").read_text()) for s in STUDIES}
    body = PAGE.read_text()
    for name, result in results.items():
        count = " or ".join(map(str, result["heldout_rows"]))
        note = f"{count} held-out rows, seeds {result['seeds']}, commit {result['git']}."
        body = between(body, name, f"{table(result)}\n\n{note}")
    body = between(body, "rates", rates(results["parablock-math"]))
    measured = json.loads((ROOT / "benchmarks" / "results" / "memory_plan.json").read_text())
    body = between(body, "memory", memory(measured))
    PAGE.write_text(body)
    panels = [panel(r, WIDTH * (i % 2), HEIGHT * (i // 2)) for i, r in enumerate(results.values())]
    FIGURE.write_text(page(2 * WIDTH, 2 * HEIGHT, "".join(panels)))


if __name__ == "__main__":
    main()
