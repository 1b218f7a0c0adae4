"""The ParaBlock paper's runtimes (its Table 1, partial participation, Figure 2) from hocket's plan, on shapes alone.

Nothing trains: packets have the sizes of the real models', seconds come from the virtual clock. The computing time of a
round is fitted on FedBCD, for each model and data set; all else follows. docs/paper-clock.md discusses the result.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import save

from hocket.plan import clock
from hocket.recipe import parse

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "paper-clock.svg"
MODELS = {  # shape, codec, rounds
    "8B": ("llama-3-8b", "half", 32),
    "3B": ("llama-3.2-3b", "raw", 28),
    "1.5B": ("qwen2.5-1.5b", "raw", 64),  # rounds are not known: see `qwen`
}
PAPER = {  # minutes, Table 1
    "Full FT": {"8B Alpaca": 16.0, "8B Math": 15.5, "3B Alpaca": 12.5, "3B Math": 12.3},
    "FedIT": {"8B Alpaca": 34.5, "8B Math": 23.1, "3B Alpaca": 23.8, "3B Math": 15.4},
    "FFA-LoRA": {"8B Alpaca": 30.2, "8B Math": 21.2, "3B Alpaca": 23.3, "3B Math": 14.9},
    "FLoRA": {"8B Alpaca": 65.4, "8B Math": 64.9, "3B Alpaca": 34.0, "3B Math": 29.3},
    "FedCyBGD": {"8B Alpaca": 59.9, "8B Math": 63.2, "3B Alpaca": 57.8, "3B Math": 53.3},
    "FedBCD": {"8B Alpaca": 30.2, "8B Math": 24.9, "3B Alpaca": 19.1, "3B Math": 17.3},
    "ParaBlock": {"8B Alpaca": 21.1, "8B Math": 15.8, "3B Alpaca": 11.9, "3B Math": 10.1},
}
CELLS = list(PAPER["FedBCD"])
COMPUTING: dict[str, float] = {}  # seconds of a round, fitted on FedBCD
PARTIAL = {"8B Alpaca": (28.45, 0.514), "8B Math": (28.44, 0.545)}  # ParaBlock's minutes, and their ratio to FedBCD's
QWEN = (18.48, 10.56)  # minutes of FedBCD and ParaBlock
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS = {"name": "fedbcd"}
LAYERS = {"name": "fedbcd", "blocks": 1}  # one block of all layers: FedAvg without embeddings, head and final norm


def lora(name: str, targets: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"name": name, "rank": 32, "targets": targets}


def cyclic(share: float) -> dict[str, Any]:
    return {"name": "fedcybgd", "blocks": 10, "download": share}


ROWS: list[tuple[str, str, dict[str, Any], str]] = [  # the paper's name, our variant, method, schedule
    ("FedBCD", "", BLOCKS, "sync"),
    ("ParaBlock", "", BLOCKS, "overlap"),
    ("Full FT", "layers only", LAYERS, "sync"),
    ("Full FT", "all parameters", {"name": "fedavg"}, "sync"),
    ("FedIT", "query, value", lora("fedit"), "sync"),
    ("FedIT", "all linear", lora("fedit", LINEAR), "sync"),
    ("FFA-LoRA", "query, value", lora("ffa-lora"), "sync"),
    ("FFA-LoRA", "all linear", lora("ffa-lora", LINEAR), "sync"),
    ("FLoRA", "query, value", lora("flora"), "sync"),
    ("FLoRA", "all linear", lora("flora", LINEAR), "sync"),
    ("FedCyBGD", "download 1", cyclic(1.0), "cyclic"),
    ("FedCyBGD", "download 0.5", cyclic(0.5), "cyclic"),
]
WALL: dict[str, float] = {}  # every plan made, and the seconds of a processor that it took
PLANS: dict[str, dict[str, Any]] = {}


def planned(
    model: str, method: dict[str, Any], schedule: Any, computing: float, bandwidth: float = 100.0, turns: int = 0,
    codec: str = "", **clients: Any,
) -> dict[str, Any]:  # fmt: skip
    """The plan of the paper's federation: ten clients, one link for both directions, `computing` seconds a round.

    Adds `round`, bytes of a client's round, and `delivered`, the seconds until clients hold the last version, which is
    where the paper stops counting; a plan ends with the last aggregation.
    """
    shape, usual, rounds = MODELS[model]
    turns, codec = turns or rounds, codec or usual
    device = {"step_seconds": computing, "down_mb_s": bandwidth, "up_mb_s": bandwidth, "duplex": False}
    recipe = {
        "model": {"source": f"shape:{shape}"}, "data": {"source": "docstrings"}, "turns": turns, "method": method,
        "schedule": schedule, "codec": {"up": codec, "down": codec}, "training": {"local_steps": 1},
        "clients": {"count": 10, "device": device} | clients,
    }  # fmt: skip
    if (key := json.dumps(recipe)) not in PLANS:
        began = time.process_time()
        PLANS[key] = clock(parse(recipe))
        WALL[key] = time.process_time() - began
    out = PLANS[key]
    jobs = sum(c["jobs"] for c in out["clients"])
    if method["name"] == "fedcybgd":  # who has had his turn needs no more of it
        return out | {"round": (out["up"] + out["down"]) / jobs, "delivered": out["seconds"]}
    up = out["up"] / jobs
    down = 10 * up if method["name"] == "flora" else up  # the stack of all adapters, or the mean
    delivered = out["seconds"] + down / bandwidth / 1e6
    if schedule == "overlap":  # two versions are missing at the end; only one of them if computing hid the other
        delivered = max(delivered, computing + turns * (up + down) / bandwidth / 1e6)
    return out | {"round": up + down, "delivered": delivered}


def seconds(model: str, method: dict[str, Any], schedule: Any, computing: float, *args: Any, **more: Any) -> float:
    """Seconds until the last version is delivered. Without overlap computing just adds to the rest."""
    if "overlap" in str(schedule):
        return planned(model, method, schedule, computing, *args, **more)["delivered"]
    bare = planned(model, method, schedule, 0.0, *args, **more)
    return bare["delivered"] + bare["turns"] * computing


def fit(model: str, minutes: float, *args: Any, to: str = "delivered", schedule: Any = "sync", **more: Any) -> float:
    """Seconds of computing a round with which FedBCD takes so long."""
    bare = planned(model, BLOCKS, schedule, 0.0, *args, **more)
    return (minutes * 60 - bare[to]) / bare["turns"]


def against(ours: float, paper: float) -> dict[str, float]:
    """Minutes beside minutes."""
    return {"paper": round(paper, 2), "hocket": round(ours, 2), "percent": round(100 * (ours / paper - 1), 1)}


def table() -> list[dict[str, Any]]:
    """Table 1. `implied` is the computing of a round with which a method would meet the paper."""
    rows = []
    for name, variant, method, schedule in ROWS:
        for cell in CELLS:
            model, paper, c = cell[:2], PAPER[name][cell], COMPUTING[cell]
            turns = 3 if name == "Full FT" else MODELS[model][2]
            bare = planned(model, method, schedule, 0.0, turns=turns)
            ours = seconds(model, method, schedule, c, turns=turns) / 60
            row = {"method": name, "variant": variant, "cell": cell, "rounds": turns, **against(ours, paper)}
            row |= {"gigabytes": round(bare["round"] / 1e9, 3), "computing": round(c, 1)}
            rows.append(row | {"implied": round((paper * 60 - bare["delivered"]) / turns, 1)})
            if schedule == "overlap":
                del rows[-1]["implied"]  # it hides
    return rows


def data_sets() -> list[dict[str, Any]]:
    """What a method's two runtimes say without any assumption on its bytes, if its computing is FedBCD's times a
    factor: minutes = rounds x factor x FedBCD's + rest, where the rest, communication, cannot be negative."""
    rows = []
    for name in PAPER:
        for model, (_, _, turns) in list(MODELS.items())[:2]:
            turns = 3 if name == "Full FT" else turns
            (a, x), (b, y) = ((PAPER[name][f"{model} {d}"], COMPUTING[f"{model} {d}"]) for d in ("Alpaca", "Math"))
            factor = (a - b) * 60 / turns / (x - y)
            rest = a - turns * factor * x / 60
            rows.append({"method": name, "model": model, "factor": round(factor, 2), "rest": round(rest, 1)})
    return [r for r in rows if r["method"] != "ParaBlock"]


def to_the_last_aggregation() -> dict[str, Any]:
    """ParaBlock if FedBCD is fitted on what `hocket plan` prints, which leaves the last download out."""
    out = {}
    for cell in CELLS:
        c = fit(cell[:2], PAPER["FedBCD"][cell], to="seconds")
        ours = planned(cell[:2], BLOCKS, "overlap", c)["seconds"] / 60
        out[cell] = against(ours, PAPER["ParaBlock"][cell])
    return out


def partial() -> list[dict[str, Any]]:
    """A fifth of 50 clients, 96 rounds; what returning clients missed is free, as in the paper, or charged."""
    rows = []
    sync, overlap = ({"name": name, "cohort": 10} for name in ("sync", "overlap"))
    for cell, (minutes, ratio) in PARTIAL.items():
        c = fit("8B", minutes / ratio, 100.0, 96, schedule=sync, count=50, catch_up="free")
        for catch_up in ("free", "charged"):
            for name, schedule, paper in (("FedBCD", sync, minutes / ratio), ("ParaBlock", overlap, minutes)):
                p = planned("8B", BLOCKS, schedule, c, 100.0, 96, count=50, catch_up=catch_up)
                row = {"cell": cell, "method": name, "catch_up": catch_up, **against(p["delivered"] / 60, paper)}
                rows.append(row | {"computing": round(c, 1), **{k: round(p[k] / 1e9) for k in ("down", "up")}})
    return rows


def qwen() -> list[dict[str, Any]]:
    """Rounds and block sizes with which the two known runtimes of Qwen2.5-1.5B agree with the clock, or do not."""
    rows = []
    for codec, layers, turns in (
        ("raw", 2, 28), ("half", 2, 28), ("raw", 4, 28), ("raw", 4, 32), ("raw", 2, 64), ("raw", 2, 84),
        ("half", 2, 128),
    ):  # fmt: skip
        method = {"name": "fedbcd", "layers_per_block": layers}
        bare = planned("1.5B", method, "sync", 0.0, turns=turns, codec=codec)
        c = (QWEN[0] * 60 - bare["delivered"]) / turns
        ours = seconds("1.5B", method, "overlap", c, turns=turns, codec=codec) / 60
        row = {"codec": codec, "layers_per_block": layers, "rounds": turns, "computing": round(c, 1)}
        rows.append(row | against(ours, QWEN[1]))
    return rows


def grid() -> list[dict[str, Any]]:
    """FedBCD and ParaBlock at other bandwidths and batches; computing is taken to grow in proportion to the batch."""
    rows = []
    fits = {cell: c for cell, c in COMPUTING.items() if "Alpaca" in cell} | {"1.5B": fit("1.5B", QWEN[0])}
    for cell, c in fits.items():
        for bandwidth in (50, 100, 150):
            for batch in (2, 4, 8):
                at = {"cell": cell, "bandwidth": bandwidth, "batch": batch}
                model = cell.split()[0]
                a, b = (seconds(model, BLOCKS, s, c * batch / 4, bandwidth) / 60 for s in ("sync", "overlap"))
                rows.append(at | {"FedBCD": round(a, 2), "ParaBlock": round(b, 2), "ratio": round(b / a, 3)})
    return rows


def picture(rows: list[dict[str, Any]], cell: str) -> str:
    """Runtime against bandwidth and against batch, as SVG that is legible on light and dark; rings are the paper's."""
    rows = [r for r in rows if r["cell"] == cell]
    panels = (
        ("(a) megabytes a second, batch 4", "bandwidth", [r for r in rows if r["batch"] == 4]),
        ("(b) batch, 100 megabytes a second", "batch", [r for r in rows if r["bandwidth"] == 100]),
    )
    colours = {"FedBCD": "#E69F00", "ParaBlock": "#56B4E9"}
    ring = "r='6' fill='none' stroke='#D55E00' stroke-width='2.5'"
    scale = 190 / max(r["FedBCD"] for _, _, chosen in panels for r in chosen)
    body = [f"<text x='20' y='22' font-weight='bold'>Llama-3-{cell}: minutes</text>"]
    for i, (title, axis, chosen) in enumerate(panels):
        left, floor = 20 + 440 * i, 270
        body.append(f"<text x='{left}' y='{floor + 40}'>{title}</text>")
        body.append(f"<rect x='{left}' y='{floor}' width='400' height='1' fill='#808890'/>")
        for j, row in enumerate(chosen):
            x = left + 20 + 130 * j
            body.append(f"<text x='{x + 46}' y='{floor + 18}' text-anchor='middle'>{row[axis]}</text>")
            for k, (name, colour) in enumerate(colours.items()):
                top, at = floor - row[name] * scale, x + 48 * k
                body.append(f"<rect x='{at}' y='{top:.1f}' width='44' height='{floor - top:.1f}' fill='{colour}'/>")
                body.append(f"<text x='{at + 22}' y='{top - 12:.1f}' text-anchor='middle'>{row[name]:.1f}</text>")
                if row["bandwidth"] == 100 and row["batch"] == 4:
                    body.append(f"<circle cx='{at + 22}' cy='{floor - PAPER[name][cell] * scale:.1f}' {ring}/>")
    for k, (name, colour) in enumerate(colours.items()):
        body.append(f"<rect x='{460 + 110 * k}' y='12' width='12' height='12' fill='{colour}'/>")
        body.append(f"<text x='{478 + 110 * k}' y='22'>{name}</text>")
    body.append(f"<circle cx='686' cy='18' {ring}/><text x='698' y='22'>the paper, Table 1</text>")
    return (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 880 325' font-family='system-ui, sans-serif' "
        f"font-size='13' fill='#808890'>{''.join(body)}</svg>\n"
    )


def main() -> None:
    COMPUTING.update({cell: fit(cell[:2], PAPER["FedBCD"][cell]) for cell in CELLS})
    rows, points = table(), grid()
    PICTURE.write_text(picture(points, "8B Alpaca"))
    result = {
        "table": rows, "data_sets": data_sets(), "to_the_last_aggregation": to_the_last_aggregation(),
        "partial": partial(), "qwen": qwen(), "grid": points,
    }  # fmt: skip
    wall = {"median": round(median(WALL.values()), 1), "most": round(max(WALL.values()), 1)}
    save("paper_clock", result | {"plans": len(WALL), "processor_seconds_of_a_plan": wall})
    print("\n" + " " * 25 + "".join(f"{cell:>23}" for cell in CELLS))
    print(f"{'minutes':25}" + "    paper hocket      %" * len(CELLS))
    for name, variant, _, _ in ROWS:
        cells = [r for r in rows if (r["method"], r["variant"]) == (name, variant)]
        numbers = "".join(f"{r['paper']:9.1f} {r['hocket']:6.1f} {r['percent']:+6.1f}" for r in cells)
        print(f"{f'{name}, {variant}'.removesuffix(', '):25}{numbers}")


if __name__ == "__main__":
    main()
