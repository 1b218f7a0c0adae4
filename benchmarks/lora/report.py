"""Put the committed results of the studies beside this file into docs/unequal-ranks.md, as tables and a figure.

`make lora` makes the results; this only reads them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from figures import between, page, panel  # noqa: E402

from hocket.compare import client_memory  # noqa: E402
from hocket.results import paired  # noqa: E402
from hocket.study import gather  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PAGE, FIGURE = ROOT / "docs" / "unequal-ranks.md", ROOT / "docs" / "unequal-ranks.svg"
SHOWN = ("zero-padding", "FlexLoRA", "FLoRA", "HLoRA", "HLoRA-Delta", "FedIT, mean", "FedIT, smallest")
WIDTH, HEIGHT = 460, 320


def mean(values: list[Any]) -> float | None:
    """Mean of those that are there; None unless most are."""
    there = [float(v) for v in values if v is not None and math.isfinite(float(v))]
    return statistics.fmean(there) if 2 * len(there) > len(values) else None


def shown(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def rounds(row: dict[str, Any]) -> float | None:
    """Rounds until a variant was as good as `versus` is in the end, mean over seeds; its rounds take equally long."""
    reached = [t / row["virtual_seconds"] * row["turns"] if t is not None else None for t in row["reached"]]
    return mean(reached)


def planned(result: dict[str, Any]) -> dict[str, list[int]]:
    """By variant the bytes that the least and the most demanding client need, by the plan as it is now."""
    (study,) = gather([Path(__file__).parent / f"{result['study']}.toml"])
    rates = {n: v["rate"] for n, v in result["variants"].items()}
    return {v.name: client_memory(next(iter(study.runs(v, rates[v.name]).values()))) for v in study.variant}


def table(result: dict[str, Any]) -> str:
    """Quality, speed, bytes, memory, and what the aggregation loses."""
    memory = planned(result)
    versus, count = result["versus"], len(result["seeds"])
    heads = [
        "variant", "rate", "accuracy", "F1", f"loss, mean ± sd of {count}", f"loss minus {versus} (95 %)",
        f"rounds to {versus}'s loss", "MB to it", "up MB", "down MB", "planned client memory MB", "aggregation error",
        "effective rank",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, v in result["variants"].items():
        d = v["difference"]
        low, high = (b / 1e6 for b in memory[name])
        moved = mean(v["reached_bytes"])
        cells = [
            name,
            f"{v['rate']:g}",
            f"{v['accuracy']:.3f}",
            f"{v['f1']:.3f}",
            f"{float(v['loss']):.4f}" + (f" ± {v['sd']:.4f}" if v["sd"] is not None else ""),
            f"{d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})" if d else "-",
            shown(rounds(v), 1),
            shown(None if moved is None else moved / 1e6, 1),
            f"{v['up_bytes'] / 1e6:.1f}",
            f"{v['down_bytes'] / 1e6:.1f}",
            f"{low:.1f} to {high:.1f}",
            shown(mean([mean(e) for e in v["error"]]), 3),
            shown(mean([r[-1] if r else None for r in v["effective_rank"]]), 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    where = f"Seeds {result['seeds']}; {' or '.join(map(str, result['heldout_rows']))} held-out rows; "
    return "\n".join(lines) + f"\n\n{where}commit {result['git']}."


ORDER = ("qqp-iid", "qqp-skewed", "qqp-very-skewed", "mrpc", "rte", "qqp-50")
"""The tables that have all methods."""


def overall(results: dict[str, dict[str, Any]]) -> str:
    """Each method's mean loss on each table, and its paired difference to HLoRA over all tables and seeds."""
    there = [t for t in ORDER if t in results]
    names = [n for n in results[there[0]]["variants"] if all(n in results[t]["variants"] for t in there)]
    heads = [
        "variant",
        *there,
        "mean accuracy",
        f"loss minus HLoRA over all {3 * len(there)} pairs (95 %)",
        "p",
        "lower in",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in names:
        rows = [results[t]["variants"][name] for t in there]
        mine = [float(x) for r in rows for x in r["losses"]]
        other = [float(x) for t in there for x in results[t]["variants"]["HLoRA"]["losses"]]
        d = paired(mine, other) if name != "HLoRA" else None
        cells = [
            name,
            *(f"{float(r['loss']):.3f}" for r in rows),
            f"{statistics.fmean(r['accuracy'] for r in rows):.3f}",
            f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" if d else "-",
            f"{d['p']:.2g}" if d else "-",
            f"{sum(a < b for a, b in zip(mine, other, strict=True))} of {len(mine)}" if d else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def averaged(series: list[list[Any]]) -> list[float]:
    """Mean over seeds, place by place."""
    return [statistics.fmean(map(float, column)) for column in zip(*series, strict=False)]


def figure(result: dict[str, Any]) -> str:
    """Held-out loss against megabytes moved, and effective rank against rounds."""
    rows = {k: result["variants"][k] for k in SHOWN if k in result["variants"]}
    losses = {
        k: list(
            zip(
                [m / 1e6 for m in averaged(v["moved"])], averaged([[y for _, y in c] for c in v["curves"]]), strict=True
            )
        )
        for k, v in rows.items()
    }
    ranks = {
        k: [(i + 1.0, r) for i, r in enumerate(averaged(v["effective_rank"]))]
        for k, v in rows.items()
        if any(v["effective_rank"])
    }
    panels = panel(f"held-out loss, {result['study']}", "megabytes moved, both ways", losses, 0, WIDTH, HEIGHT)
    panels += panel("effective rank, mean over modules", "round", ranks, WIDTH, WIDTH, HEIGHT, digits=0)
    return page(2 * WIDTH, HEIGHT, panels)


def fading() -> str:
    """What is left of a model that nobody trains."""
    result = json.loads((ROOT / "benchmarks" / "results" / "fixed_point.json").read_text())
    left = result["left"]
    heads = ["method", *(f"after {t}" for t in (1, 2, 3, 5, 10))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {k} | {' | '.join(f'{v[t - 1]:.3f}' for t in (1, 2, 3, 5, 10))} |" for k, v in left.items()]
    return "\n".join(lines) + f"\n\nRanks {', '.join(map(str, result['ranks']))}; commit {result['git']}."


def main() -> None:
    results = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    body = between(PAGE.read_text(), "fading", fading())
    body = between(body, "overall", overall(results))
    for name, result in results.items():
        body = between(body, name, table(result))
    PAGE.write_text(body)
    FIGURE.write_text(figure(results["qqp-skewed"]))


if __name__ == "__main__":
    main()
