"""What a comparison came to: paired differences, tables, files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from hocket.ledger import plain


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float] | None:
    """Mean of a - b over the same seeds, its 95 % interval and two-sided p; None for fewer than two seeds."""
    d = [x - y for x, y in zip(a, b, strict=True)]
    if len(d) < 2 or not all(map(math.isfinite, d)):
        return None
    mean, spread = statistics.fmean(d), statistics.stdev(d) / math.sqrt(len(d))
    half = float(stats.t.ppf(0.975, len(d) - 1)) * spread
    p = float(2 * stats.t.sf(abs(mean) / spread, len(d) - 1)) if spread else float(mean == 0)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def table(result: Mapping[str, Any]) -> str:
    """A study's result, fresh or read from its file, as a Markdown table."""
    versus, count = result["versus"], len(result["seeds"])
    longest = result["variants"][versus]["virtual_seconds"]
    timed = any(t is not None for v in result["variants"].values() for t in v.get("reached", []))
    heads = [
        "variant",
        "rate",
        f"{'own ' * bool(result.get('on_own_rows'))}held-out loss, mean ± sd of {count}",
        f"minus {versus} (95 %)",
        "p",
        "virtual s",
        "ratio",
    ]
    heads += [f"as good as {versus}, virtual s"] * timed + ["up MB", "down MB"]
    answered = [k for k in ("gsm8k", "rouge_l") if any(k in v for v in result["variants"].values())]
    heads += answered
    rows = [heads, ["---"] * len(heads)]
    if result["base_loss"] is not None:
        rows.append(["start model", "-", f"{result['base_loss']:.4f}", *["-"] * (len(heads) - 3)])
    for name, v in result["variants"].items():
        d = v["difference"]
        rows.append(
            [
                name + " (personalized)" * bool(v.get("personal")),
                f"{v['rate']:g}",
                f"{float(v['loss']):.4f}" + (f" ± {v['sd']:.4f}" if v["sd"] is not None else ""),
                f"{d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})" if d else "-",
                f"{d['p']:.2g}" if d else "-",
                f"{v['virtual_seconds']:.1f}",
                f"{v['virtual_seconds'] / longest:.2f}",
                *[_when(v.get("reached", []))] * timed,
                f"{v['up_bytes'] / 1e6:.1f}",
                f"{v['down_bytes'] / 1e6:.1f}",
                *(f"{v[k]:.1%}" if k in v else "-" for k in answered),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _when(reached: Sequence[float | None]) -> str:
    """Mean over the seeds that got there, and how many did if not all."""
    times = [t for t in reached if t is not None]
    if not times:
        return "-"
    return f"{statistics.fmean(times):.1f}" + (
        f" ({len(times)} of {len(reached)})" if len(times) < len(reached) else ""
    )


def write(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """One JSON file a study; losses that are not finite are strings in it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, result in results.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    return paths
