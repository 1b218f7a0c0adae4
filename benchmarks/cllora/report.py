"""Put the committed results beside this file into docs/cllora.md, as tables and a figure.

`make cllora` makes the results; this only reads them. Losses are nats a token. With cells 0 (neither), L (unequal
lengths), Q (unequal quality) and B (both), for each seed: the effect of lengths is (L - 0 + B - Q) / 2, that of quality
(Q - 0 + B - L) / 2, and their interaction B - L - Q + 0. Means over seeds with Student's 95 % interval.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hocket.results import paired

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from figures import COLOURS, between, line, page, text  # noqa: E402

HERE = Path(__file__).parent
PAGE, FIGURE = ROOT / "docs" / "cllora.md", ROOT / "docs" / "cllora.svg"
CELLS = ("neither", "lengths", "quality", "both")
SIZES = {"small": "1.35 M", "tiny": "0.38 M"}
Losses = dict[str, list[float]]  # of every cell, by seed


def outcomes(study: dict[str, Any], alone: dict[str, list[Any]]) -> dict[str, Losses]:
    """What is looked at. Losses on own rows are means over the tokens of all clients' own rows, less the start model's:
    these rows are others in another partition."""

    def own(clients: list[Any], losses: list[float]) -> float:
        gains = [x - c["own_start"] for x, c in zip(losses, clients, strict=True)]
        return statistics.fmean(gains, [c["own_tokens"] for c in clients])

    of = study["variants"]
    return {
        "federated, everybody's rows": {c: of[c]["losses"] for c in CELLS},
        "federated, own rows": {c: list(map(own, alone[c], of[c]["clients"])) for c in CELLS},
        "alone, everybody's rows": {c: [statistics.fmean(x["loss"] for x in s) for s in alone[c]] for c in CELLS},
        "alone, own rows": {c: [own(s, [x["own"] for x in s]) for s in alone[c]] for c in CELLS},
    }


def effects(of: Losses) -> dict[str, list[float]]:
    """The effects of the two axes and their interaction, by seed."""
    rows = list(zip(*(of[c] for c in CELLS), strict=True))
    return {
        "lengths": [(u - n + b - q) / 2 for n, u, q, b in rows],
        "quality": [(q - n + b - u) / 2 for n, u, q, b in rows],
        "interaction": [b - u - q + n for n, u, q, b in rows],
    }


def interval(values: list[float], against: list[float] | None = None) -> dict[str, float]:
    """Mean over seeds of a difference, its 95 % interval and p."""
    found = paired(values, against or [0.0] * len(values))
    assert found, "a run diverged"
    return found


def shown(d: dict[str, float]) -> str:
    return f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"


def perplexity(losses: list[float]) -> str:
    return f"{statistics.fmean(map(math.exp, losses)):.1f}"


def entry(kind: str, losses: list[float]) -> str:
    """Perplexity; on own rows the loss, which is less the start model's."""
    return f"{statistics.fmean(losses):+.3f}" if kind.endswith("own rows") else perplexity(losses)


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in [heads, ["---"] * len(heads), *rows])


def cells(found: dict[str, dict[str, Losses]], studies: dict[str, Any], base: dict[str, float]) -> str:
    """Perplexities of every cell, on own rows losses less the start model's; the last two columns on the shortest and
    the longest quarter of held-out rows."""
    kinds = list(next(iter(found.values())))
    rows = []
    for size, of in found.items():
        rows.append([SIZES[size], "start model", f"{math.exp(base[size]):.1f}", *["-"] * (len(kinds) + 1)])
        for c in CELLS:
            bins = [[g[k] for k in sorted(g)] for g in studies[size]["variants"][c]["groups"]]
            ends = [perplexity([b[0] for b in bins]), perplexity([b[-1] for b in bins])]
            rows.append([SIZES[size], c, *(entry(k, of[k][c]) for k in kinds), *ends])
    return table(["parameters", "unequal", *kinds, "federated, shortest", "federated, longest"], rows)


def effect_rows(found: dict[str, dict[str, Losses]]) -> str:
    rows = []
    for size, of in found.items():
        for kind, losses in of.items():
            rows.append([SIZES[size], kind, *(shown(interval(e)) for e in effects(losses).values())])
    return table(["parameters", "loss", "lengths", "quality", "interaction"], rows)


def claims(found: dict[str, dict[str, Losses]], studies: dict[str, Any]) -> str:
    """Differences of effects, and of the amount of spoiled answers from their inequality."""
    rows = []
    for where in ("everybody's rows", "own rows"):
        for axis in ("lengths", "quality"):
            for size, of in found.items():
                mine, theirs = (effects(of[f"{who}, {where}"])[axis] for who in ("federated", "alone"))
                what = f"effect of {axis} federated minus alone, {where}"
                rows.append([what, SIZES[size], shown(interval(mine, theirs))])
    for axis in ("lengths", "quality"):
        tiny, small = (effects(found[s]["federated, everybody's rows"])[axis] for s in ("tiny", "small"))
        rows.append([f"effect of {axis} federated, 0.38 M minus 1.35 M", "both", shown(interval(tiny, small))])
    for size, study in studies.items():
        clean, alike, unequal = (study["variants"][c]["losses"] for c in ("neither", "quality, alike", "quality"))
        rows.append(["answers spoiled alike minus none spoiled", SIZES[size], shown(interval(alike, clean))])
        rows.append(["as many spoiled, unequally minus alike", SIZES[size], shown(interval(unequal, alike))])
    return table(["difference of losses", "parameters", "mean (95 %)"], rows)


def weights(study: dict[str, Any]) -> str:
    rows = []
    for name, v in study["variants"].items():
        rows.append([name, perplexity(v["losses"]), shown(v["difference"]) if v["difference"] else "-"])
    rate = study["variants"][study["versus"]]["rate"]
    where = f"Seeds {study['seeds']}, {study['heldout_rows'][0]} held-out rows, rate {rate:g}; commit {study['git']}."
    return table(["an update weighs", "perplexity", f"loss minus {study['versus']} (95 %)"], rows) + f"\n\n{where}"


def held(alone: dict[str, list[Any]]) -> str:
    """What clients hold, in the larger model's study (the smaller one's is the same)."""
    rows = []
    for c in CELLS:
        of: Callable[[str], list[list[float]]] = lambda key, c=c: [[x[key] for x in seed] for seed in alone[c]]
        apart = lambda key, of=of: statistics.fmean(max(x) / statistics.fmean(x) for x in of(key))
        total = lambda key, of=of: statistics.fmean(map(sum, of(key)))
        share = [x / r for xs, rs in zip(of("corrupted"), of("rows"), strict=True) for x, r in zip(xs, rs, strict=True)]
        rows.append([
            c, f"{total('rows'):.0f}", f"{min(map(min, of('tokens'))):.0f} to {max(map(max, of('tokens'))):.0f}",
            f"{total('cut'):.0f}", f"{max(map(max, of('cut'))):.0f}", f"{total('lost'):.0f}",
            f"{min(share):.2f} to {max(share):.2f}", f"{apart('seconds'):.2f}",
        ])  # fmt: skip
    heads = ["unequal", "rows", "tokens of a client", "rows cut", "most of a client", "tokens lost", "share spoiled"]
    return table([*heads, "slowest client / mean"], rows)


def figure(found: dict[str, dict[str, Losses]]) -> str:
    """Every effect with its interval, a panel for each axis."""
    points = [
        (axis, k, j, kind, interval(effects(losses)[axis]))
        for axis in ("lengths", "quality", "interaction")
        for j, of in enumerate(found.values())
        for k, (kind, losses) in enumerate(of.items())
    ]
    kinds = list(next(iter(found.values())))
    low, high = min(0.0, *(d["low"] for *_, d in points)), max(0.0, *(d["high"] for *_, d in points))
    left, wide, gap, tall = 190, 230, 50, 60 + 44 * len(kinds)
    out = []
    for panel, axis in enumerate(("lengths", "quality", "interaction")):
        x0 = left + panel * (wide + gap)
        px = lambda v, x0=x0: x0 + (v - low) / (high - low) * wide
        out.append(text(x0 + wide / 2, 18, f"effect of {axis}" if panel < 2 else axis, size=13, font_weight="bold"))
        out.append(line(px(0), 28, px(0), tall - 26, "#808080", 0.6))
        ticks = [v for v in (low, 0.0, high) if v == 0 or abs(px(v) - px(0)) > 40]
        out += [text(px(v), tall - 10, f"{v:+.2f}" if v else "0") for v in ticks]
        for name, k, j, _, d in points:
            if name == axis:
                y = 46 + 44 * k + 14 * j
                out.append(line(px(d["low"]), y, px(d["high"]), y, COLOURS[j]))
                out.append(f"<circle cx='{px(d['mean']):.1f}' cy='{y}' r='3.5' fill='{COLOURS[j]}'/>")
    out += [text(left - 10, 56 + 44 * k, kind, "end") for k, kind in enumerate(kinds)]
    out += [text(10 + 80 * j, 18, SIZES[s], "start", fill=COLOURS[j]) for j, s in enumerate(found)]
    return page(left + 3 * (wide + gap), tall, "".join(out))


def main() -> None:
    read = lambda name: json.loads((HERE / name).read_text())
    local, studies = read("local.json"), {s: read(f"results/{s}.json") for s in SIZES}
    found = {s: outcomes(studies[s], local[s]["cells"]) for s in SIZES}
    study = studies["small"]
    rates = " and ".join(f"{s['variants']['neither']['rate']:g}" for s in studies.values())
    where = f"\n\nMeans over seeds {study['seeds']}, {study['heldout_rows'][0]} held-out rows, rates {rates}; "
    where += f"commit {study['git']}; alone: {local['git']}."
    body = between(PAGE.read_text(), "held", held(local["small"]["cells"]))
    body = between(body, "cells", cells(found, studies, {s: local[s]["base"] for s in SIZES}) + where)
    body = between(body, "effects", effect_rows(found))
    body = between(body, "claims", claims(found, studies))
    PAGE.write_text(between(body, "weights", weights(read("results/weights.json"))))
    FIGURE.write_text(figure(found))


if __name__ == "__main__":
    main()
