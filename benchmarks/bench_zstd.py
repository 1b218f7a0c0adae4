"""Codec zstd, and what GradualDiff-Fed saves with it: MiniLM, all of it fine-tuned on MRPC by four clients.

Of two steps of that run, in fp32 and in 16-bit copies of its versions: the weights, the XOR of two versions one after
the other, their difference, a client's update. What remains of the weights' bytes, and MB/s of a tensor's bytes,
medians of repetitions that take turns; beside it the checksum of a version.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save

from hocket import wire
from hocket.codecs import codec, sent_raw
from hocket.executors import Inline
from hocket.experiment import Experiment
from hocket.methods import Client, Update, method
from hocket.methods.gradualdiff import GradualDiff, bits, checksum, composed
from hocket.recipe import parse
from hocket.simulate import Simulation
from hocket.tree import Tree, nbytes

TURNS, LOOKED_AT, REPEATS = 6, (1, 6), 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECIPE = {
    "turns": TURNS,
    "model": {"source": "minilm-l6-v2", "task": "classification"},
    "data": {"source": "data/glue_mrpc/train.jsonl.gz", "limit": 600, "max_length": 64},
    "method": {"name": "gradualdiff", "log": TURNS},
    "training": {"lr": 5e-5, "batch_size": 8, "local_steps": 4},
    "clients": {"count": 4},
    "engine": {"threads": 1},
}


def trained() -> tuple[list[Tree], list[Tree], list[float]]:
    """The server's versions, one upload of each turn, and the turns' losses."""
    x = Experiment(parse(RECIPE))
    server = x.server()
    versions, uploads, losses = [server.state["params"]], [], []
    step = server.step

    def stepping() -> Any:
        first = dict(server.buffer[0].payload) if server.buffer else {}
        if (record := step()) is not None:
            versions.append(server.state["params"])
            uploads.append(first)
            losses.append(record["loss"])
        return record

    server.step = stepping  # type: ignore[method-assign]
    Simulation(server, x.recipe.devices(), x.steps, x.down, x.up, Inline(x.setting())).run()
    return versions, uploads, losses


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def xor(a: Tree, b: Tree) -> Tree:
    """Bits that differ, of the tensors that do."""
    return {k: bits(b[k]) ^ bits(a[k]) for k in b if b[k] is not a[k]}


def rows(versions: list[Tree], uploads: list[Tree]) -> list[dict[str, Any]]:
    """A row for each kind of tensor, dtype and version."""
    table = []
    for name, dtype in DTYPES.items():
        cast = lambda tree, d=dtype: {k: v.to(d) for k, v in tree.items()}
        for v in LOOKED_AT:
            before, after = cast(versions[v - 1]), cast(versions[v])
            kinds = {
                "weights": after,
                "xor": xor(before, after),
                "difference": {k: after[k] - before[k] for k in after},
                "update": cast(uploads[v - 1]),
            }
            if v == LOOKED_AT[-1]:  # for who missed three versions
                log = [xor(cast(versions[i]), cast(versions[i + 1])) for i in range(v - 4, v)]
                kinds["xor over four steps"] = composed(log)
            for kind, tree in kinds.items():
                table.append({"dtype": name, "version": v, "what": kind, **measured(tree, after, dtype)})
        print(name, flush=True)
    return table


def measured(tree: Tree, weights: Tree, dtype: torch.dtype) -> dict[str, Any]:
    """Share of the bytes of weights and MB/s; in fp32 at two levels."""
    mb, out = nbytes(tree) / 1e6, {}
    inner = {k: x for k, x in tree.items() if "embeddings" not in k}
    for level in (1, 3) if dtype == torch.float32 else (1,):
        c = codec.build({"name": "zstd", "level": level})
        blob = c.encode(tree)
        decoded = c.decode(blob)
        walls: dict[str, list[float]] = {"encode": [], "decode": []}
        for _ in range(REPEATS if level == 1 else 1):
            walls["encode"].append(seconds(lambda c=c: c.encode(tree)))
            walls["decode"].append(seconds(lambda d=decoded: [d[k] for k in d]))
        out[f"level {level}"] = {
            "of_weights": round(len(blob) / nbytes(weights), 4),
            "of_weights_without_embeddings": round(
                c.size(inner) / nbytes({k: x for k, x in weights.items() if "embeddings" not in k}), 4
            ),
            **{f"{k}_mb_s": round(mb / statistics.median(w)) for k, w in walls.items()},
            "sent_raw": sent_raw(wire.Packet(blob).meta),
        }
    return out


def methods(versions: list[Tree]) -> list[dict[str, Any]]:
    """Bytes of one download in each form that the method has, through zstd, as a share of FedAvg's fp32 weights."""
    table = []
    whole = nbytes(versions[0])
    for more in (
        {}, {"difference": "float"}, {"difference": "float", "precision": "half"},
        {"difference": "float", "share": 0.1}, {"difference": "float", "precision": "half", "share": 0.1},
    ):  # fmt: skip
        m: Any = method.build({"name": "gradualdiff", **more})
        assert isinstance(m, GradualDiff)
        state = m.init(versions[0], 0)
        sizes: dict[str, list[float]] = {"raw": [], "zstd": []}
        for v in range(1, TURNS + 1):
            moved = {k: versions[v][k] - versions[v - 1][k] for k in versions[v]}
            state = m.step(state, [Update(0, 0, v - 1, v - 1, moved)], [1.0])
            sent = m.ship(state, Client(0), v, v - 1, dict.fromkeys(moved, v))
            for c, found in sizes.items():
                found.append(codec.build(c).size(sent) / whole)
        table.append({"fields": more, **{f"{c}_of_weights": round(statistics.mean(x), 4) for c, x in sizes.items()}})
    return table


def main() -> None:
    versions, uploads, losses = trained()
    now, before = versions[-1], versions[-2]
    m = method.build("gradualdiff")
    news = xor(before, now)
    assert isinstance(m, GradualDiff)
    sums = statistics.median(seconds(lambda: checksum(now)) for _ in range(5))
    apply = statistics.median(seconds(lambda: m.apply(before, news)) for _ in range(5))
    save(
        "zstd",
        {
            "model": "minilm-l6-v2, 4 clients, 4 steps of AdamW a turn at 5e-5, MRPC",
            "loss": [round(x, 4) for x in losses],
            "megabytes": round(nbytes(now) / 1e6, 1),
            "checksum_gb_s": round(nbytes(now) / 1e9 / sums, 2),
            "apply_xor_gb_s": round(nbytes(now) / 1e9 / apply, 2),
            "method": methods(versions),
            "table": rows(versions, uploads),
        },
    )


if __name__ == "__main__":
    main()
