"""A site's worker that misbehaves, another way each turn: `python rogue.py SITE.toml FOLDER`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hocket import wire
from hocket.deploy.sites import opener, read
from hocket.deploy.worker import Worker

FAULTS = ["none", "nan", "shape", "name", "version", "again", "norm", "damaged", "short", "large", "told", "never"]
"""By turn; `again` is the update of a turn before, as it was."""


class Rogue(Worker):
    """The real worker, whose answers are spoiled on their way out."""

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        found = super().answer(question)
        return self.spoil(found) if "told" in found else found

    def spoil(self, found: dict[str, Any]) -> dict[str, Any]:
        told, path = found["told"], Path(found["packet"])
        fault, old = FAULTS[told["turn"]], wire.Packet(path.read_bytes())
        if fault == "none":
            self.before = dict(told), path.read_bytes()
        if fault == "never":
            time.sleep(3600)
        if fault in ("nan", "norm", "shape", "name"):
            change = {
                "nan": lambda k, v: (k, v * float("nan")), "norm": lambda k, v: (k, v * 10),
                "shape": lambda k, v: (k, torch.cat([v, v])), "name": lambda k, v: (f"x.{k}", v),
            }[fault]  # fmt: skip
            path.write_bytes(wire.pack(dict(change(k, v) for k, v in old.items()), old.meta))
        if fault == "version":
            told = told | {"version": told["version"] - 1}
        if fault == "again":
            told, blob = self.before
            path.write_bytes(blob)
        if fault == "damaged":
            blob = bytearray(path.read_bytes())
            blob[-5] ^= 1
            path.write_bytes(blob)
        if fault == "short":
            path.write_bytes(path.read_bytes()[:1000])
        if fault == "told":
            told = told | {"metrics": {"loss": "low"}}
        size = 1 << 40 if fault == "large" else path.stat().st_size
        return {"told": told, "packet": str(path), "size": size}


if __name__ == "__main__":
    Rogue(Path(sys.argv[2]), opener(read(Path(sys.argv[1])), Path(sys.argv[1]).parent)).serve()
