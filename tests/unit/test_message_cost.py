"""What a message costs beside its bytes: charged for every message, both ways, in runs and in plans."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from worlds import quadratic

from hocket import plan
from hocket.clock import Device
from hocket.recipe import parse

ROOT = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = {
    "model": {"source": "tiny:llama"}, "data": {"source": "rows.jsonl"}, "method": "fedavg", "turns": 3,
    "clients": {"count": 2, "device": {"step_seconds": 0.5}},
}  # fmt: skip


def seconds(sched: Any, turns: int, **device: Any) -> float:
    """Virtual seconds of a run in which nothing but these has a price."""
    free = {"down_mb_s": 1e9, "up_mb_s": 1e9, "gflops": 1e9}
    w = quadratic(clients=2, turns=turns, steps=2, sched=sched, devices=[Device(**{**free, **device})] * 2)
    w.simulation.run()
    return w.simulation.clock.now


def test_a_synchronous_turn_waits_for_two_messages() -> None:
    assert seconds("sync", 4, step_seconds=0.5) == pytest.approx(4 * 1.0, abs=1e-6)
    assert seconds("sync", 4, step_seconds=0.5, message_seconds=3.0) == pytest.approx(4 * (1.0 + 6.0), abs=1e-6)
    assert seconds("sync", 4, step_seconds=0.5, message_seconds=3.0, latency=0.25) == pytest.approx(4 * 7.5, abs=1e-6)


@pytest.mark.parametrize(("compute", "cost"), [(8.0, 3.0), (8.0, 5.0)])
def test_overlap_hides_them_behind_computation_as_it_hides_bytes(compute: float, cost: float) -> None:
    """One way at a time a turn takes max(C, D + U), where D and U have their messages' cost; see `schedules.sync`."""
    run = lambda turns: seconds("overlap", turns, step_seconds=compute / 2, message_seconds=cost, duplex=False)
    assert (run(20) - run(10)) / 10 == pytest.approx(max(compute, 2 * cost), abs=1e-6)


def test_a_plan_charges_what_a_run_does() -> None:
    bare = plan.clock(parse(RECIPE))
    device = {"step_seconds": 0.5, "message_seconds": 2.0}
    charged = plan.clock(parse(RECIPE | {"clients": {"count": 2, "device": device}}))
    assert charged["seconds"] - bare["seconds"] == pytest.approx(3 * 2 * 2.0)
    assert [charged[k] for k in ("down", "up")] == [bare[k] for k in ("down", "up")]


def test_recipes_without_it_keep_the_hash_they_had_before_there_was_this_field() -> None:
    assert parse({k: RECIPE[k] for k in ("model", "data", "method")} | {"data": {"source": "x.jsonl"}}).hash == "c4e2a8434814efbd"
    costly = parse(RECIPE | {"clients": {"count": 2, "device": {"step_seconds": 0.5, "message_seconds": 1.0}}})
    assert costly.hash != parse(RECIPE).hash
    one = parse(RECIPE | {"clients": {"count": 2, "device": {"step_seconds": 0.5}, "each": [{"message_seconds": 1.0}]}})
    assert len({one.hash, costly.hash, parse(RECIPE).hash}) == 3


def test_the_docs_have_the_figures_of_the_measured_fleet() -> None:
    """And a real run over Flower took within a tenth of what was simulated with its messages' cost."""
    result = json.loads((ROOT / "benchmarks" / "deploy" / "results" / "overlap.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", result["git"])
    section = (ROOT / "docs" / "deployment.md").read_text().split("## Overlap and asynchrony, measured")[1].split("\n## ")[0]
    shown = [line.split("|")[1:5] for line in section.splitlines() if line.startswith("|")][2:]
    middle = lambda name, side: median(r["runs"][name][side]["seconds"] for r in result["repetitions"])
    for name, cells in zip(("fedbcd", "parablock", "fedavg", "fedfa"), shown, strict=False):
        ratio = result["median"]["real_over_simulated"][name]
        figures = f"{middle(name, 'real'):.1f} s", f"{middle(name, 'simulated'):.1f} s", f"{ratio:.2f}"
        assert tuple(c.strip() for c in cells[1:]) == figures
        assert abs(ratio - 1) <= 0.1
    for pair, cells in zip(("overlap", "asynchrony"), shown[4:], strict=True):
        found = result["median"][pair]
        figures = f"{found['real']:.2f}", f"{found['simulated']:.2f}", f"{1 + found['apart']:.2f}"
        assert tuple(c.strip() for c in cells[1:]) == figures
        assert abs(found["apart"]) <= 0.1
