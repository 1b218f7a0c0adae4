"""Put the committed results of the studies beside this file into docs/asynchronous.md, as tables and a figure.

`make async` makes the results; this only reads them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from hocket.report.tables import first

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from figures import COLOURS, between, line, page, path, text  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PAGE, FIGURE = ROOT / "docs" / "asynchronous.md", ROOT / "docs" / "asynchronous.svg"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 320, 56, 40, 48
SEMI = "SAFA"


def mean(values: list[float | None]) -> float | None:
    """Mean of those that are there; None unless most are."""
    there = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(there) if 2 * len(there) > len(values) else None


def shown(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def faster(result: dict[str, Any], name: str, than: str) -> float | None:
    """How many times sooner a variant is as good as `than` is in the end: mean over seeds of the ratio of times."""
    rows = result["variants"]
    ratios: list[float | None] = []
    for mine, theirs in zip(rows[name]["curves"], rows[than]["curves"], strict=True):
        when = first([tuple(p) for p in mine], theirs[-1][1])
        ratios.append(theirs[-1][0] / when if when else None)
    return mean(ratios)


def pull(row: dict[str, Any]) -> float | None:
    """How much better the model is for the fastest half of the clients than for the slowest: difference of own
    held-out losses, mean over seeds. Clients are numbered by speed. What `versus` shows is due to their texts."""
    if not all(row["clients"]):
        return None
    half = len(row["clients"][0]) // 2
    return statistics.fmean(statistics.fmean(c[half:]) - statistics.fmean(c[:half]) for c in row["clients"])


def table(result: dict[str, Any], accuracy: bool = False) -> str:
    """Quality, speed, bytes and bias of every variant."""
    rows, versus = result["variants"], result["versus"]
    base = pull(rows[versus])
    heads = ["variant", "rate", "accuracy" if accuracy else "perplexity", f"loss minus {versus} (95 %)"]
    heads += [f"times faster than {versus}", *([f"than {SEMI}"] if SEMI in rows else []), "updates", "up MB", "down MB"]
    lines = [f"| {' | '.join([*heads, 'pull toward fast clients'])} |", "|---" * (len(heads) + 1) + "|"]
    for name, v in rows.items():
        d, bias = v["difference"], pull(v)
        quality = f"{v['accuracy']:.3f}" if accuracy else shown(statistics.fmean(math.exp(x) for x in v["losses"]), 1)
        cells = [
            name,
            f"{v['rate']:g}",
            quality,
            f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" if d else "-",
            shown(None if name == versus else faster(result, name, versus)),
            *([shown(None if name == SEMI else faster(result, name, SEMI))] if SEMI in rows else []),
            f"{statistics.fmean(sum(j) for j in v['jobs']):.0f}",
            f"{v['up_bytes'] / 1e6:.0f}",
            f"{v['down_bytes'] / 1e6:.0f}",
            shown(None if bias is None or base is None else bias - base, 3, "+"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    where = f"Means over seeds {result['seeds']}; {' or '.join(map(str, result['heldout_rows']))} held-out rows; "
    return "\n".join(lines) + f"\n\n{where}commit {result['git']}."


def spread(result: dict[str, Any]) -> dict[str, list[tuple[float, float | None]]]:
    """For each schedule (speed spread, times faster than the synchronous one at that spread)."""
    out: dict[str, list[tuple[float, float | None]]] = {}
    for name in result["variants"]:
        kind, _, factor = name.rpartition(", ")
        out.setdefault(kind, []).append((float(factor), faster(result, name, f"FedAvg, {factor}")))
    return out


def spread_table(result: dict[str, Any]) -> str:
    """Speed-up by spread."""
    found = spread(result)
    factors = [f for f, _ in found["FedAvg"]]
    lines = [f"| schedule | {' | '.join(f'1 to {f:g}' for f in factors)} |", "|---" * (len(factors) + 1) + "|"]
    lines += [f"| {k} | {' | '.join(shown(x) for _, x in points)} |" for k, points in found.items() if k != "FedAvg"]
    return "\n".join(lines) + f"\n\nMeans over seeds {result['seeds']}; commit {result['git']}."


def axes(title: str, x0: int, xs: list[tuple[float, str]], ys: list[tuple[float, str]], below: str) -> str:
    """Frame, ticks and words of one panel."""
    out = [text(x0 + 8, 20, title, "start", 13, font_weight="bold"), text(x0 + WIDTH / 2, HEIGHT - 8, below, size=12)]
    out += [line(x0 + LEFT, y, x0 + WIDTH - 20, y, "#808080", 0.25) for y, _ in ys]
    out += [text(x0 + LEFT - 6, y + 4, s, "end") for y, s in ys]
    out += [text(x, HEIGHT - 28, s) for x, s in xs]
    return "".join(out)


def curves(result: dict[str, Any], x0: int) -> str:
    """Perplexity against virtual time of the variants whose packets are raw, mean over seeds."""
    rows = {n: v for n, v in result["variants"].items() if "," not in n}
    lines = {
        n: [(p[0][0], math.exp(statistics.fmean(q[1] for q in p))) for p in zip(*v["curves"], strict=False)]
        for n, v in rows.items()
    }
    end = max(t for c in lines.values() for t, _ in c)
    every = [y for c in lines.values() for _, y in c[1:]]
    low, high = min(every) * 0.99, max(every) * 1.01
    px = lambda t: x0 + LEFT + t / end * (WIDTH - LEFT - 90)
    py = lambda y: TOP + (high - min(y, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    out = [axes(
        result["study"], x0, [(px(end * i / 4), f"{end * i / 4:.0f}") for i in range(5)],
        [(py(y), f"{y:.0f}") for y in ticks], "virtual seconds",
    )]  # fmt: skip
    taken: list[float] = []
    for i, (name, c) in sorted(enumerate(lines.items()), key=lambda item: item[1][1][-1][1]):
        out.append(path([(px(t), py(y)) for t, y in c[1:]], COLOURS[i]))
        y = py(c[-1][1]) + 4
        while any(abs(y - other) < 12 for other in taken):
            y += 1
        taken.append(y)
        out.append(text(px(end) + 6, y, name, "start", fill=COLOURS[i]))
    return "".join(out)


def speedups(result: dict[str, Any], x0: int) -> str:
    """Times faster than the synchronous schedule against the spread of speeds, on a logarithmic axis."""
    found = spread(result)
    factors = [f for f, _ in found["FedAvg"]]
    top = max([x for points in found.values() for _, x in points if x is not None] + [1.0]) * 1.1
    px = lambda f: x0 + LEFT + math.log(f / factors[0]) / math.log(factors[-1] / factors[0]) * (WIDTH - LEFT - 90)
    py = lambda y: TOP + (top - y) / top * (HEIGHT - TOP - BOTTOM)
    out = [axes(
        "times faster than synchronous", x0, [(px(f), f"{f:g}") for f in factors],
        [(py(top * i / 4), f"{top * i / 4:.1f}") for i in range(5)], "slowest client's step / fastest client's step",
    )]  # fmt: skip
    taken: list[float] = []
    for i, (name, points) in enumerate(found.items()):
        there = [(px(f), py(x)) for f, x in points if x is not None]
        if name == "FedAvg" or not there:
            continue
        y = there[-1][1] + 4
        while any(abs(y - other) < 12 for other in taken):
            y += 1
        taken.append(y)
        out.append(path(there, COLOURS[i]) + text(there[-1][0] + 6, y, name, "start", fill=COLOURS[i]))
    return "".join(out)


def main() -> None:
    results = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    body = PAGE.read_text()
    for name, result in results.items():
        done = spread_table(result) if name == "wikitext-spread" else table(result, accuracy=name == "sst2")
        body = between(body, name, done)
    PAGE.write_text(body)
    panels = curves(results["wikitext-sections"], 0) + speedups(results["wikitext-spread"], WIDTH)
    FIGURE.write_text(page(2 * WIDTH, HEIGHT, panels))


if __name__ == "__main__":
    main()
