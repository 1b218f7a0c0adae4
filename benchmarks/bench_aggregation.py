"""Server time and memory per update of 500 MB, against one pass over memory.

The tree has SmolLM2-135M's shapes (30 layers and an embedding of 113 MB, the largest tensor), in fp32 and in bf16. Raw
packets wait in files whose pages are in memory, so nothing waits for a disk; times are the processor's, of one thread,
which other programs disturb less than the wall clock. In one run:

* a pass: `torch.add(y, x, out=y)` over the whole tree, two reads and a write; `copy`: one read and one write;
* new: copying the tree into memory that the process did not have before; a step makes the next model, so what the
  system takes for fresh pages is in it, whole where a single update is a step;
* verify: the checksum of a packet file, once per packet where it enters (an engine that wrote the file itself, as the
  simulation does, has no need to);
* receive: opening a packet and `Server.receive` (shapes, every value finite);
* step: `Server.step`, per update.

Every ratio is to the passes measured next to it. Memory: how far a fresh process that holds the start model rises while
it receives buffers and steps, in models: the server's model and the next one, and what the schedule keeps beside them
(versions, sums); packets should add at most one tensor (0.21 models) whatever their number.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import save

from hocket import wire
from hocket.codecs import codec
from hocket.methods import Client, Job, Update, method
from hocket.schedules import schedule
from hocket.server import Server
from hocket.store import Spool
from hocket.tree import Tree, nbytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILES = 2  # each far larger than any cache
STEPS = 3  # counted; those before them fill windows and caches
VARIANTS: dict[str, tuple[Any, int, int]] = {  # schedule, clients, steps before the count
    "fedasync, fresh": ("fedasync", 1, 2),
    "fedasync, 3 versions stale": ("fedasync", 4, 4),
    "fedbuff, M = 4": ({"name": "fedbuff", "buffer": 4}, 8, 2),
    "fedbuff, M = 10": ({"name": "fedbuff", "buffer": 10}, 20, 2),
    "fedfa, window of 4 differences": ({"name": "fedfa", "window": 4}, 4, 4),
    "fedfa, window of 4 models": ({"name": "fedfa", "window": 4, "form": "model"}, 4, 8),
    "ca2fl, M = 4, caches of clients": ({"name": "ca2fl", "buffer": 4, "caches": "clients"}, 4, 2),
    "ca2fl, M = 4, caches of server": ({"name": "ca2fl", "buffer": 4}, 4, 2),
}


def model(dtype: torch.dtype, scale: float = 1.0) -> Tree:
    """Random numbers in the shapes of a small language model."""
    shapes = {"embed.weight": (49152, 576), "norm.weight": (576,)}
    for i in range(30):
        for name, rows, columns in (
            ("q", 576, 576), ("k", 192, 576), ("v", 192, 576), ("o", 576, 576),
            ("gate", 1536, 576), ("up", 1536, 576), ("down", 576, 1536),
        ):  # fmt: skip
            shapes[f"layers.{i}.{name}.weight"] = (rows, columns)
        shapes |= {f"layers.{i}.norm_{n}.weight": (576,) for n in (1, 2)}
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=g).mul_(scale).to(dtype) for k, s in shapes.items()}


class Packets(Spool):
    """A spool into which the same few files are put again and again under other names."""

    def __init__(self, folder: Path, blob: bytes) -> None:
        super().__init__(folder, 0)
        for i in range(FILES):
            self.put(f"source/{i}", blob)

    def source(self, i: int) -> Path:
        """One of the files."""
        return self._path(f"source/{i % FILES}")

    def arrive(self, job: int) -> None:
        """The packet of `job` is there."""
        self._path(f"up/{job}").unlink(missing_ok=True)  # of the variant before
        os.link(self.source(job), self._path(f"up/{job}"))
        self._files.add(f"up/{job}")


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of one call; its result is freed outside the measurement."""
    began = time.process_time()
    out = work()
    took = time.process_time() - began
    del out
    return took


def aggregations(variant: str, params: Tree, packets: Packets) -> Iterator[tuple[int, float, float]]:
    """(updates, seconds of receiving them, seconds of the step), step after step."""
    sched, clients, before = VARIANTS[variant]
    m, s = method.build("fedavg"), schedule.build(sched)
    raw = codec.build("raw")
    server = Server(m, s, dict(params), [Client(c) for c in range(clients)], 1000, 0)
    waiting: list[Job] = []
    took: list[float] = []

    def receive() -> None:
        job = waiting.pop(0)
        payload = raw.decode(packets.get(f"up/{job.id}"))
        assert server.receive(Update(job.id, job.client, job.version, job.turn, payload)) is None

    for n in range(before + STEPS):
        waiting += [replace(j, payload={}) for j in server.poll()]  # what travelled would keep old versions alive
        while not s.ready(server):
            packets.arrive(waiting[0].id)
            took.append(seconds(receive))
        step = seconds(server.step)
        if n >= before:
            yield len(took), sum(took), step
        took = []


def passes(params: Tree, other: Tree) -> float:
    """Seconds of one pass."""

    def work() -> None:
        for k in params:
            torch.add(other[k], params[k], out=other[k])

    return statistics.median(seconds(work) for _ in range(3))


def speed(kind: str, folder: Path) -> dict[str, Any]:
    """Ratios of one dtype."""
    params, update = model(DTYPES[kind]), model(DTYPES[kind], 1e-3)
    other = {k: torch.zeros_like(v) for k, v in params.items()}
    packets = Packets(folder, wire.pack(update, {"codec": "raw", "tensors": {}}))
    copy = statistics.median(seconds(lambda: [other[k].copy_(v) for k, v in params.items()]) for _ in range(5))
    verify = [seconds(lambda: wire.Packet(packets.source(0))) / passes(params, other) for _ in range(5)]
    new = [seconds(lambda: {k: v.clone() for k, v in params.items()}) / passes(params, other) for _ in range(5)]
    result: dict[str, Any] = {
        "megabytes": round(nbytes(params) / 1e6, 1),
        "pass_ms": round(passes(params, other) * 1e3, 1),
        "copy_ms": round(copy * 1e3, 1),
        "new": round(statistics.median(new), 2),
        "verify": round(statistics.median(verify), 2),
    }
    for variant in VARIANTS:
        rows = [
            (got / n / unit, step / n / unit)
            for n, got, step in aggregations(variant, params, packets)
            for unit in [passes(params, other)]
        ]
        got, step, both = (statistics.median(r) for r in zip(*((g, s, g + s) for g, s in rows), strict=True))
        result[variant] = {"receive": round(got, 2), "step": round(step, 2), "update": round(both, 2)}
        print(kind, variant, result[variant], file=sys.stderr)
    return result


def memory(variant: str, folder: Path) -> dict[str, float]:
    """Peak of resident memory above what was held before, while one buffer is received and aggregated, in models."""
    params = model(torch.float32)
    packets = Packets(folder, wire.pack(model(torch.float32, 1e-3), {"codec": "raw", "tensors": {}}))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    updates, *_ = next(aggregations(variant, params, packets))
    return {"updates": updates, "models": round((_status("VmHWM") - before) / nbytes(params), 2)}


def _status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def main() -> None:
    result: dict[str, Any] = {"target_passes": 3, "threads": 1}
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        for kind in DTYPES:
            result[kind] = speed(kind, Path(folder) / kind)
    largest = max(v.numel() for v in model(torch.float32).values()) * 4
    result["memory"] = {"largest_tensor_mb": round(largest / 1e6, 1)}
    for variant in VARIANTS:
        out = subprocess.run([sys.executable, __file__, variant], capture_output=True, text=True, check=True)
        result["memory"][variant] = json.loads(out.stdout)
    save("aggregation", result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
            print(json.dumps(memory(sys.argv[1], Path(folder))))
    else:
        main()
