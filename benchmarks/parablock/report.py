"""Put the committed results of the studies beside this file into docs/parablock.md, as tables and a figure.

`hocket compare benchmarks/parablock/*.toml --jobs 2 --results benchmarks/parablock/results` makes the results; this only reads them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hocket.compare import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE, FIGURE = Path(__file__).parent / "results", ROOT / "docs" / "parablock.md", ROOT / "docs" / "parablock.svg"
STUDIES = ("parablock-math", "parablock-alpaca", "parablock-overlap", "parablock-skew")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#882255", "#117733", "#AA4499")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 440, 300, 60, 36, 48


def rates(result: dict[str, Any]) -> str:
    """What each rate gave on the tuning split."""
    lines = ["| variant | held-out loss by rate, on the tuning split |", "|---|---|"]
    for name, v in result["variants"].items():
        tried = ", ".join(f"{r}: {x:.4f}" + (" *" if float(r) == v["rate"] else "") for r, x in v["tuning"].items())
        lines.append(f"| {name} | {tried} |")
    return "\n".join(lines)


def panel(result: dict[str, Any], x0: int, y0: int) -> str:
    """Loss (mean and standard deviation over seeds) against virtual time to the end of the run, a dot a variant."""
    rows = result["variants"]
    losses = [v["loss"] for v in rows.values() if math.isfinite(v["loss"])]
    spread = max(max(losses) - min(losses), 1e-3)
    low, high = min(losses) - 0.15 * spread, max(losses) + 0.15 * spread
    longest = max(v["virtual_seconds"] for v in rows.values()) * 1.05
    px = lambda t: x0 + LEFT + t / longest * (WIDTH - LEFT - 20)
    py = lambda y: y0 + TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
    out = [f"<text x='{x0 + 8}' y='{y0 + 20}' font-weight='bold'>{result['study'].removeprefix('parablock-')}</text>"]
    for i in range(5):
        y = low + (high - low) * (i + 0.5) / 5
        out.append(f"<line x1='{px(0)}' x2='{px(longest)}' y1='{py(y):.1f}' y2='{py(y):.1f}' stroke='#808080' opacity='.25'/>")
        out.append(f"<text x='{x0 + LEFT - 6}' y='{py(y) + 4:.1f}' text-anchor='end' font-size='11'>{y:.3f}</text>")
    for i in range(5):
        t = longest * i / 4
        out.append(f"<text x='{px(t):.1f}' y='{y0 + HEIGHT - 28}' text-anchor='middle' font-size='11'>{t:.0f}</text>")
    out.append(f"<text x='{px(longest / 2):.1f}' y='{y0 + HEIGHT - 10}' text-anchor='middle'>virtual seconds of the run</text>")
    for i, (name, v) in enumerate(rows.items()):
        x, y, sd, colour = px(v["virtual_seconds"]), py(v["loss"]), v["sd"] or 0.0, COLOURS[i % len(COLOURS)]
        out.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{py(v['loss'] - sd):.1f}' y2='{py(v['loss'] + sd):.1f}' stroke='{colour}'/>")
        out.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{colour}'/>")
        side = "end" if x > x0 + 0.62 * WIDTH else "start"
        shift = -9 if side == "end" else 9
        out.append(f"<text x='{x + shift:.1f}' y='{y + 4:.1f}' text-anchor='{side}' font-size='11' fill='{colour}'>{name}</text>")
    return "".join(out)


def between(text: str, key: str, body: str) -> str:
    """`text` with what stands between the marks of `key` replaced."""
    start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{body}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    results = {s: json.loads((RESULTS / f"{s}.json").read_text()) for s in STUDIES}
    text = PAGE.read_text()
    for name, result in results.items():
        note = f"{result['heldout_rows']} held-out rows, seeds {result['seeds']}, commit {result['git']}."
        text = between(text, name, f"{table(result)}\n\n{note}")
    text = between(text, "rates", rates(results["parablock-math"]))
    PAGE.write_text(text)
    panels = [panel(r, WIDTH * (i % 2), HEIGHT * (i // 2)) for i, r in enumerate(results.values())]
    FIGURE.write_text(
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {2 * WIDTH} {2 * HEIGHT}' "
        f"font-family='system-ui, sans-serif' font-size='13' fill='#808890'>{''.join(panels)}</svg>\n"
    )


if __name__ == "__main__":
    main()
