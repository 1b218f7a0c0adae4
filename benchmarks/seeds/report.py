"""Put the committed results of the studies beside this file into docs/kilobytes.md, as tables and a figure.

`make seeds` makes the results; this only reads them.
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

RESULTS = Path(__file__).parent / "results"
PAGE, FIGURE = ROOT / "docs" / "kilobytes.md", ROOT / "docs" / "kilobytes.svg"
TASKS = {"sst2": "SST-2", "qqp": "QQP", "mrpc": "MRPC", "rte": "RTE"}
WIDTH, HEIGHT = 460, 320


def size(bytes_: float) -> str:
    """Bytes in the unit that reads best."""
    unit = 0 if bytes_ < 1e4 else 1 if bytes_ < 1e7 else 2
    return f"{bytes_ / 1000**unit:.{1 if unit else 0}f} {('B', 'kB', 'MB')[unit]}"


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def against(row: dict[str, Any]) -> str:
    """The paired difference to the study's `versus`, with its interval."""
    d = row["difference"]
    return f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" if d else "-"


def lines(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(r)} |" for r in rows)])


def source(result: dict[str, Any]) -> str:
    """Where a table is from."""
    rows = " or ".join(map(str, result["heldout_rows"]))
    return f"\n\nSeeds {result['seeds']}; {rows} held-out rows; commit {result['git']}."


def per_job(row: dict[str, Any], way: str) -> str:
    """Bytes a client and turn."""
    return size(row[f"{way}_bytes"] / statistics.fmean(sum(jobs) for jobs in row["jobs"]))


def glue(result: dict[str, Any]) -> str:
    """One task under one partition."""
    heads = [
        "variant", "rate", "accuracy", f"loss, mean ± sd of {len(result['seeds'])}",
        f"loss minus {result['versus']} (95 %)", "up a job", "down a job", "measured client memory MB", "virtual s",
    ]  # fmt: skip
    rows = [
        [
            name, f"{v['rate']:g}", f"{v['accuracy']:.3f}", spread(v["losses"]), against(v), per_job(v, "up"),
            per_job(v, "down"), f"{v['peak_memory'] / 1e6:.0f}" if "peak_memory" in v else "-",
            f"{v['virtual_seconds']:.0f}",
        ]
        for name, v in result["variants"].items()
    ]  # fmt: skip
    return lines(heads, rows) + source(result)


def overall(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy of each method on each table, with the first task's bytes and the most memory of any."""
    there = [f"{t}-{p}" for t in TASKS for p in ("iid", "skewed") if f"{t}-{p}" in results]
    up = f"up a job, {there[0].partition('-')[0]}"
    heads = ["variant", *(t.replace("-", ", ") for t in there), "mean accuracy", up, "most memory MB"]
    rows = []
    for name in results[there[0]]["variants"]:
        mine = [results[t]["variants"][name] for t in there]
        memory = [v["peak_memory"] / 1e6 for v in mine if "peak_memory" in v]
        rows.append([
            name, *(f"{v['accuracy']:.3f}" for v in mine), f"{statistics.fmean(v['accuracy'] for v in mine):.3f}",
            per_job(mine[0], "up"), f"{max(memory):.0f}" if memory else "-",
        ])  # fmt: skip
    return lines(heads, rows)


def dolly(result: dict[str, Any]) -> str:
    """Instruction tuning: quality, and what it took to be as good as `versus` in the end."""
    versus = result["versus"]
    heads = [
        "variant", "rate", "loss, mean ± sd", "Rouge-L", f"rounds to {versus}'s loss", "bytes to it, both ways",
        "forward passes' work to it, all clients", "up a job", "measured client memory MB",
    ]  # fmt: skip
    rows = []
    for name, v in result["variants"].items():
        share = [t / v["virtual_seconds"] for t in v["reached"] if t is not None]
        every = len(share) == len(v["reached"])
        moved = [b for b in v["reached_bytes"] if b is not None]
        work = PASSES[name] * v["local_steps"]
        rows.append([
            name, f"{v['rate']:g}", spread(v["losses"]), f"{v['rouge_l']:.3f}",
            f"{statistics.fmean(share) * v['turns']:.1f}" if every else "not all reach it",
            size(statistics.fmean(moved)) if every else "-",
            f"{statistics.fmean(share) * work:.0f}" if every else "-",
            per_job(v, "up"), f"{v['peak_memory'] / 1e6:.0f}" if "peak_memory" in v else "-",
        ])  # fmt: skip
    return lines(heads, rows) + source(result)


PASSES = {"FedAvg": 3, "FedIT": 2, "FedKSeed": 2, "Ferret": 3}
"""A local step in forward passes: one forward, as much back to activations, as much again to weights; or two forwards.
What Ferret and FedKSeed draw is not in it."""


def beyond(result: dict[str, Any]) -> str:
    """FedKRSO against its combinations."""
    heads = ["variant", "rate", "accuracy", "loss, mean ± sd", f"loss minus {result['versus']} (95 %)", "up a job",
             "down a job", "virtual s in all", f"virtual s to {result['versus']}'s loss"]  # fmt: skip
    rows = []
    for name, v in result["variants"].items():
        reached = [t for t in v["reached"] if t is not None]
        some = f" ({len(reached)} of {len(v['reached'])})" if len(reached) < len(v["reached"]) else ""
        rows.append([
            name, f"{v['rate']:g}", f"{v['accuracy']:.3f}", spread(v["losses"]), against(v), per_job(v, "up"),
            per_job(v, "down"), f"{v['virtual_seconds']:.0f}",
            f"{statistics.fmean(reached):.0f}{some}" if reached else "never",
        ])  # fmt: skip
    return lines(heads, rows) + source(result)


def energy(result: dict[str, Any]) -> str:
    """What share of a gradient few directions hold."""
    rows = [[k, f"{v:.3f}"] for k, v in result["share"].items()]
    where = f"\n\nMean over {result['modules']} modules, {result['rows']} rows; commit {result['git']}."
    return lines(["directions", "share of the gradient's squared norm"], rows) + where


def figure(results: dict[str, dict[str, Any]]) -> str:
    """Mean accuracy against the bytes of an upload, on iid and on skewed labels."""
    panels = ""
    for i, (study, title) in enumerate((("sst2-skewed", "SST-2"), ("qqp-skewed", "QQP"))):
        if study not in results:
            continue
        curves = {}
        for name, v in results[study]["variants"].items():
            losses = [statistics.fmean(c[k][1] for c in v["curves"]) for k in range(len(v["curves"][0]))]
            moved = [statistics.fmean(m[k] for m in v["moved"]) for k in range(len(v["moved"][0]))]
            curves[name] = [(math.log10(m), x) for m, x in zip(moved, losses, strict=True)]
        panels += panel(f"held-out loss, {title}, Dirichlet 0.5", "bytes moved, both ways, as powers of ten", curves,
                        i * WIDTH, WIDTH, HEIGHT)  # fmt: skip
    return page(2 * WIDTH, HEIGHT, panels)


def main() -> None:
    results = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    body = between(PAGE.read_text(), "overall", overall(results))
    for name, result in results.items():
        kind = {"dolly": dolly, "beyond": beyond}.get(name.partition("-")[0], glue)
        body = between(body, name, kind(result))
    held = json.loads((ROOT / "benchmarks" / "results" / "gradient_energy.json").read_text())
    body = between(body, "energy", energy(held))
    PAGE.write_text(body)
    FIGURE.write_text(figure(results))


if __name__ == "__main__":
    main()
