"""The demonstration: one recipe run twice, waiting and not waiting, and both side by side on one page."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from hocket import recipe, report, run

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "runs" / "demo"


def both(out: Path, sets: list[str]) -> list[Path]:
    """Run the recipe under `sync` and under `overlap`; the two run folders."""
    shutil.rmtree(out, ignore_errors=True)
    folders = []
    for schedule in ("sync", "overlap"):
        loaded = recipe.load(HERE / "demo.toml", [f"schedule.name={schedule}", f"name=demo-{schedule}", *sets])
        print(f"\n{loaded.name}: {loaded.method['name']} x {schedule}, {loaded.turns} turns, 4 clients", flush=True)
        with report.Progress(loaded.turns) as bar:
            folders.append(run.start(loaded, out / schedule, bar.listen))
    return folders


def main() -> None:
    folders = both(OUT, sys.argv[1:])
    sync, overlap = (report.read(f).summary() for f in folders)
    page = report.build(folders, OUT / "compare.html")
    for name, s in (("sync", sync), ("overlap", overlap)):
        moved = (s["up_bytes"] + s["down_bytes"]) / 1e6
        print(
            f"{name:8s} held-out loss {s['start_loss']:.4f} -> {s['final_loss']:.4f}   "
            f"virtual time {s['virtual_seconds']:7.1f} s   {moved:7.1f} MB"
        )
    ratio = overlap["virtual_seconds"] / sync["virtual_seconds"]
    apart = overlap["final_loss"] - sync["final_loss"]
    print(f"the same updates in {ratio:.2f} of the time; the final losses differ by {apart:+.4f}")
    print(f"report: {page}")


if __name__ == "__main__":
    main()
