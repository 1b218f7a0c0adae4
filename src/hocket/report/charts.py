"""The charts of a report as plotly figures: curves of held-out loss, and the lane chart."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from hocket.report.tables import LANES, Run, clock, thin

# Okabe and Ito's palette: told apart by colour-blind readers, and legible on light and dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
LANE_COLOURS = {"down": "#56B4E9", "compute": "#009E73", "up": "#E69F00"}
LANE_NAMES = {"down": "downloading", "compute": "computing", "up": "uploading"}
MOST_CLIENTS = 16
GREY = "rgba(128,128,128,0.25)"
AXES = {"version": ("turns", 1.0), "t": ("time, s", 1.0), "bytes": ("megabytes moved", 1e-6)}


def _layout(height: int, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": GREY, "zerolinecolor": GREY, "linecolor": GREY}
    return {
        "height": height, "margin": {"l": 60, "r": 15, "t": 10, "b": 50}, "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": "#808080", "size": 12}, "xaxis": axis, "yaxis": axis,
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom"}, "hovermode": "closest", **more,
    }  # fmt: skip


def loss_curves(runs: list[Run], x: str) -> go.Figure:
    """Held-out loss of each run against `x` ("version", "t" or "bytes")."""
    title, scale = AXES[x]
    figure = go.Figure()
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        points = thin(run.curve(x))
        figure.add_scatter(
            x=[a * scale for a, _ in points], y=[b for _, b in points], name=run.summary()["name"],
            mode="lines+markers", line={"color": colour, "width": 2}, marker={"size": 6},
        )  # fmt: skip
    figure.update_layout(**_layout(320, showlegend=len(runs) > 1))
    figure.update_xaxes(title=f"{clock(runs)}, s" if x == "t" else title)
    figure.update_yaxes(title="held-out loss")
    return figure


def lanes(run: Run, until: float) -> go.Figure:
    """For each client what it was downloading, computing and uploading; the gaps are waiting."""
    clients = sorted(run.clients)[:MOST_CLIENTS]
    names = {c["id"]: c["name"] for c in run.manifest.get("clients", [])}
    rows = {(c, lane): 3 * i + j + 0.6 * i for i, c in enumerate(clients) for j, lane in enumerate(LANES)}
    figure = go.Figure()
    for lane in LANES:
        bars = [b for b in run.lanes if b[1] == lane and b[0] in clients]
        text = [
            f"{names.get(c, c)} · turn {turn}<br>{LANE_NAMES[lane]} {start:.1f}-{end:.1f} s"
            + (f"<br>{size / 1e6:.2f} MB" if size else "")
            for c, _, start, end, turn, size in bars
        ]
        figure.add_bar(
            orientation="h", base=[b[2] for b in bars], x=[b[3] - b[2] for b in bars],
            y=[rows[b[0], lane] for b in bars], width=0.9, name=LANE_NAMES[lane], marker={"color": LANE_COLOURS[lane]},
            hovertext=text, hoverinfo="text",
        )  # fmt: skip
    ticks = [rows[c, "compute"] for c in clients]
    figure.update_layout(**_layout(90 + 58 * len(clients), barmode="overlay", bargap=0))
    figure.update_yaxes(tickvals=ticks, ticktext=[str(names.get(c, c)) for c in clients], autorange="reversed")
    figure.update_yaxes(showgrid=False, zeroline=False, automargin=True)
    figure.update_xaxes(title=f"{run.clock}, s", range=[0, until])
    return figure


def lane_note(run: Run) -> str:
    """What the lane chart leaves out, or ""."""
    notes = []
    if len(run.clients) > MOST_CLIENTS:
        notes.append(f"the first {MOST_CLIENTS} of {len(run.clients)} clients")
    if run.uses > len(run.lanes):
        notes.append(f"the first {len(run.lanes)} of {run.uses} lane uses")
    return f"Shown are {' and '.join(notes)}." if notes else ""


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]
