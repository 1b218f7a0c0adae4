"""One self-contained HTML page for a run, or for several side by side."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from hocket.errors import StoreError
from hocket.report import charts
from hocket.report.tables import PARTS, Run, clock, read

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6b7b; --line: #d9e0e7; --card: #f6f8fa; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8edf2; --soft: #9fb0c0; --line: #33414e; --card: #1a222b; --page: #11171d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { margin: .3rem 0; }
.soft { color: var(--soft); }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
details { margin-top: 1rem; } pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: 8px; }
"""
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect width='9' height='6' y='1' rx='2' fill='%23009E73'/%3E"
    "%3Crect x='7' width='9' height='6' y='9' rx='2' fill='%23E69F00'/%3E%3C/svg%3E"
)


def build(runs: list[Path], out: Path) -> Path:
    """Write the page; returns `out`.

    Raises:
        StoreError: a folder is no run, or the page cannot be written.
    """
    if not runs:
        raise StoreError("no run given; name at least one run folder")
    loaded = [read(r) for r in runs]
    if len({r.label for r in loaded}) < len(loaded):  # runs of one name are told apart by their folders
        for run in loaded:
            run.label = f"{run.label} ({run.path.name})"
    names = " and ".join(r.label for r in loaded)
    figures: list[str] = []
    body = _several(loaded, figures) if len(loaded) > 1 else _one(loaded[0])
    body += _charts(loaded, figures)
    for run in loaded:
        body += _clients(run) + _memory(run)
    for run in loaded:
        body += _details(run)
    text = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>hocket: {escape(names)}</title><link rel='icon' href=\"{ICON}\"><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{body}<script>{''.join(figures)}</script></body></html>\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write '{out}': {error.strerror}") from error
    return out


def _cards(pairs: list[tuple[str, str]]) -> str:
    return (
        "<div class='cards'>" + "".join(f"<div class='card'>{escape(k)}<b>{v}</b></div>" for k, v in pairs) + "</div>"
    )


def _title(run: Run) -> str:
    m = run.manifest
    parts = [m.get("method"), m.get("schedule"), m.get("codec")]
    point = " × ".join(escape(str(p)) for p in parts if p)
    state = "" if run.finished else " · <b>not finished</b>"
    return f"<p class='soft'>{point} · {escape(str(m.get('model', '')))}{state}</p>"


def _one(run: Run) -> str:
    s = run.summary()
    pairs = [
        (f"{'own ' * run.personal}held-out loss", _loss(s)),
        (run.clock, duration(s["virtual_seconds"])),
        ("down", size(s["down_bytes"])),
        ("up", size(s["up_bytes"])),
        *([("of those, heads and norms", size(s["beside_bytes"]))] if s["beside_bytes"] else []),
        *([(f"catching up, {s['catch_up']}", size(s["catch_up_bytes"]))] if s["catch_up_bytes"] else []),
        ("turns · updates", f"{s['versions']} · {s['updates']}"),
        ("jobs lost", str(s["lost"])),
        *([("staleness, mean · most", f"{s['staleness']:.1f} · {s['stalest']}")] if s["stalest"] else []),
        *([("server memory", size(s["server_memory"]))] if s["server_memory"] else []),
        *([("packets it keeps", size(s["server_packets"]))] if s["server_packets"] else []),
        *([("tensors no codec made smaller", f"{s['raw_tensors']:,}")] if s["raw_tensors"] else []),
        *([("steps skipped, not finite", str(s["skipped"]))] if s["skipped"] else []),
    ]
    for key in ("accuracy", "gsm8k", "rouge_l"):
        if s[key] is not None:
            pairs.append((key, f"{s[key]:.1%}"))
    return f"<h1>{escape(s['name'])}</h1>{_title(run)}{_cards(pairs)}"


def _several(runs: list[Run], figures: list[str]) -> str:
    first = runs[0].summary()
    rows = []
    for run in runs:
        s = run.summary()
        same = run.personal == runs[0].personal  # else the losses are of other rows
        reach = run.reached(first["final_loss"]) if first["final_loss"] is not None and same else None
        time = s["virtual_seconds"] / first["virtual_seconds"] if first["virtual_seconds"] else float("nan")
        moved, base = s["down_bytes"] + s["up_bytes"], first["down_bytes"] + first["up_bytes"]
        busy = list(s["busy"].values())
        rows.append(
            [
                escape(s["name"]), escape(f"{run.manifest.get('method')} × {run.manifest.get('schedule')}"), _loss(s),
                duration(s["virtual_seconds"]), f"{time:.2f} ×", duration(reach) if reach is not None else "-",
                size(moved), f"{moved / base:.2f} ×" if base else "-",
                f"{sum(busy) / len(busy):.0%}" if busy else "-", str(s["lost"]),
            ]
        )  # fmt: skip
    head = [
        "run", "method × schedule", "held-out loss", clock(runs), "ratio", "time to first run's loss", "bytes",
        "ratio", "clients computing", "lost",
    ]  # fmt: skip
    names = escape(" / ".join(r.summary()["name"] for r in runs))
    return f"<h1>{names}</h1>" + table("Runs side by side; ratios are to the first.", head, rows, "runs")


def _charts(runs: list[Run], figures: list[str]) -> str:
    html = ""
    if any(r.evals for r in runs):
        html += "<h2>Held-out loss</h2>"
        if any(r.personal for r in runs):
            html += (
                "<p class='soft'>Of a personalized run: each client's own model on the client's own held-out rows; it "
                "does not compare to losses on the common rows.</p>"
            )
        html += "<div class='grid'>"
        for x, what in (("version", "turns"), ("t", clock(runs)), ("bytes", "bytes moved")):
            html += _place(charts.loss_curves(runs, x), f"loss-{x}", f"Held-out loss against {what}", figures)
        html += "</div>"
    until = max(r.seconds for r in runs) * 1.01 or 1.0
    html += (
        "<h2>Who did what, when</h2><p class='soft'>Each client has three lanes: downloading, computing, uploading. "
    )
    html += "Gaps in the middle lane are waiting.</p>"
    for i, run in enumerate(runs):
        name = run.summary()["name"]
        html += f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        html += _place(charts.lanes(run, until), f"lanes-{i}", f"Lanes of the clients of {name}", figures)
        html += f"<p class='soft'>{escape(charts.lane_note(run))}</p>"
    return html


def _place(figure: go.Figure, key: str, label: str, figures: list[str]) -> str:
    spec = figure.to_plotly_json()
    data = json.dumps([spec["data"], spec["layout"]], default=_plain).replace("<", "\\u003c")
    figures.append(f"(f=>Plotly.newPlot('{key}',f[0],f[1],{{responsive:true,displayModeBar:false}}))({data});")
    return f"<div id='{key}' role='img' aria-label=\"{escape(label, quote=True)}\"></div>"


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value.to_plotly_json()


def _clients(run: Run) -> str:
    about, simulated = {c["id"]: c for c in run.manifest.get("clients", [])}, not run.manifest.get("deployed")
    own = (run.evals[-1] if run.evals else {}).get("clients", [])
    rows = []
    for c, v in sorted(run.clients.items()):
        a = about.get(c, {})
        jobs = max(v["jobs"], 1)
        busy = v["compute"] / run.seconds if run.seconds else 0.0
        rows.append(
            [
                escape(str(a.get("name", c))), f"{a.get('rows', run.rows.get(c, 0)):,}",
                *([f"{a.get('step_seconds', 0):g} s"] if simulated else []),
                *([f"{a.get('down_mb_s', 0):g} / {a.get('up_mb_s', 0):g} MB/s"] if simulated else []),
                f"{v['jobs']:.0f}", f"{v['lost']:.0f}",
                f"{busy:.0%}", f"{1 - busy:.0%}", size(v["down_bytes"]), size(v["up_bytes"]), f"{v['loss'] / jobs:.3f}",
                *([f"{own[c]:.3f}"] if own else []),
            ]
        )  # fmt: skip
    if len(rows) > 200:
        rows = [*rows[:200], [f"and {len(rows) - 200} more", *[""] * (len(rows[0]) - 1)]]
    head = [
        "client" if simulated else "site", "rows", *(["step", "link down / up"] if simulated else []),
        "jobs", "lost", "computing", "waiting", "down", "up", "train loss",
        *(["own held-out loss"] if own else []),
    ]  # fmt: skip
    name = run.summary()["name"]
    return f"<h2>Clients of {escape(name)}</h2>" + table(
        f"Shares are of the run's {duration(run.seconds)}.", head, rows, "clients"
    )


def _memory(run: Run) -> str:
    """What each client's machine holds, by part and at the end of each phase: planned / measured."""
    about = {c["id"]: c["name"] for c in run.manifest.get("clients", [])}
    rows = []
    for c in sorted(run.planned.keys() | run.measured.keys())[:200]:
        cells = []
        for key in PARTS:
            both = (of.get(c, {}).get(key) for of in (run.planned, run.measured))
            cells.append(" / ".join("-" if n is None else size(n) for n in both))
        rows.append([escape(str(about.get(c, c))), *cells])
    if not rows:
        return ""
    name = escape(run.summary()["name"])
    return f"<h2>Memory of a client of {name}, planned and measured</h2>" + table(
        "Bytes on the device that trains, planned / measured; the largest of a client's jobs. First by part, then what "
        "is there at the end of each phase, and at most.",
        ["client", *PARTS.values()], rows, "memory",
    )  # fmt: skip


def _details(run: Run) -> str:
    recipe = escape((run.path / "recipe.toml").read_text())
    manifest = escape(json.dumps(run.manifest, indent=2))
    name = escape(run.summary()["name"])
    return (
        f"<details><summary>Recipe and manifest of {name}</summary><pre>{recipe}</pre><pre>{manifest}</pre></details>"
    )


def table(caption: str, head: list[str], rows: list[list[str]], key: str) -> str:
    """An HTML table; cells are already escaped."""
    top = "".join(f"<th scope='col'>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table class='{key}'><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _loss(s: dict[str, Any]) -> str:
    if s["final_loss"] is None:
        return "-"
    return f"{s['start_loss']:.3f} → {s['final_loss']:.3f}" if s["start_loss"] is not None else f"{s['final_loss']:.3f}"


def duration(seconds: float) -> str:
    """Seconds for people: 12.3 s, 4.5 min, 6.7 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(n: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n:.0f} B"
