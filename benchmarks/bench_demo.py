"""The demonstration as a result: losses with intervals, virtual times, bytes, and the picture in the README."""

from __future__ import annotations

import sys
from pathlib import Path

from common import save

from hocket import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
import demo

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "demo.svg"
COLOURS = {"down": "#56B4E9", "compute": "#009E73", "up": "#E69F00"}
WIDTH, LANE, GAP, LEFT = 900, 7, 9, 110


def picture(runs: list[report.Run]) -> str:
    """The lanes of both runs on one time axis, as SVG that is legible on light and dark."""
    until = max(r.seconds for r in runs)
    scale = (WIDTH - LEFT - 20) / until
    body, y = [], 26
    for run in runs:
        names = {c["id"]: c["name"] for c in run.manifest["clients"]}
        schedule = run.manifest["schedule"]
        body.append(f"<text x='8' y='{y}' font-weight='bold'>{schedule}: {run.seconds:.0f} virtual seconds</text>")
        y += 10
        for client, name in names.items():
            body.append(f"<text x='{LEFT - 8}' y='{y + 2 * LANE}' text-anchor='end'>{name}</text>")
            size = f"width='{until * scale:.1f}' height='{3 * LANE}'"
            body.append(f"<rect x='{LEFT}' y='{y}' {size} fill='#808080' opacity='.12'/>")
            for c, lane, start, end, _, _ in run.lanes:
                if c == client and end > start:
                    top = y + list(COLOURS).index(lane) * LANE
                    body.append(
                        f"<rect x='{LEFT + start * scale:.1f}' y='{top}' width='{(end - start) * scale:.1f}' "
                        f"height='{LANE - 1}' fill='{COLOURS[lane]}'/>"
                    )
            y += 3 * LANE + GAP
        y += 26
    for i, (lane, colour) in enumerate(COLOURS.items()):
        text = {"down": "downloading", "compute": "computing", "up": "uploading"}[lane]
        x = LEFT + 130 * i
        body.append(f"<rect x='{x}' y='{y - 22}' width='12' height='12' fill='{colour}'/>")
        body.append(f"<text x='{x + 18}' y='{y - 12}'>{text}</text>")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {y}' font-family='system-ui, sans-serif' "
        f"font-size='13' fill='#808890'>{''.join(body)}</svg>\n"
    )


def main() -> None:
    folders = demo.both(demo.OUT, sys.argv[1:])
    runs = [report.read(f) for f in folders]
    result: dict = {"model": runs[0].manifest["model"], "threads": runs[0].manifest["threads"], "runs": {}}
    for run in runs:
        s, last = run.summary(), run.evals[-1]
        result["runs"][run.manifest["schedule"]] = {
            "start_loss": round(s["start_loss"], 4), "final_loss": round(s["final_loss"], 4),
            "final_interval": [round(last["loss_low"], 4), round(last["loss_high"], 4)], "heldout_rows": last["n"],
            "virtual_seconds": round(s["virtual_seconds"], 1), "wall_seconds": run.manifest["wall_seconds"],
            "megabytes": round((s["up_bytes"] + s["down_bytes"]) / 1e6, 1),
            "computing": {k: round(v, 3) for k, v in s["busy"].items()},
        }  # fmt: skip
    a, b = result["runs"]["sync"], result["runs"]["overlap"]
    result["virtual_time_ratio"] = round(b["virtual_seconds"] / a["virtual_seconds"], 3)
    PICTURE.write_text(picture(runs))
    save("demo", result)


if __name__ == "__main__":
    main()
