"""A site that misbehaves in every way, beside one that does not: nothing hangs, and each refusal is written down.

Workers are processes, couriers Flower's own client app, the server is the real one; only Flower's transport between
them is left out, which other tests have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import RECIPE, WORDS, write
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from rogue import FAULTS

from hocket import recipe, store
from hocket.deploy import client_app
from hocket.deploy.courier import SOCKET
from hocket.deploy.flower import FlowerLink
from hocket.deploy.serving import serve
from hocket.deploy.sites import shared

REASONS = {
    "nan": "not finite", "shape": "shape", "name": "unknown tensor", "version": "names another", "again": "names another",
    "norm": "times the median", "damaged": "rejected", "short": "rejected", "large": "bytes; at most",
    "told": "loss: not a finite number", "never": "deadline",
}  # fmt: skip
NAMES = ("honest", "rogue")


class Beside:
    """What a server app sees of Flower: nodes that answer a message at a time, here with the client app at once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as in a task's process
        self.folders, self.replies = list(folders), dict[str, Message]()
        self.locks = [threading.Lock() for _ in folders]

    def get_node_ids(self) -> list[int]:
        return list(range(1, len(self.folders) + 1))

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        (message,) = messages
        key = f"{id(message)}-{time.monotonic_ns()}"
        threading.Thread(target=self.handle, args=(key, message), daemon=True).start()
        return [key]

    def handle(self, key: str, message: Message) -> None:
        i = message.metadata.dst_node_id - 1
        config = {"site": NAMES[i], "folder": str(self.folders[i])}
        with self.locks[i]:
            self.replies[key] = client_app.app(message, Context(1, i + 1, config, RecordDict(), {}))

    def pull_messages(self, keys: Sequence[str]) -> list[Message]:
        return [self.replies.pop(k) for k in keys if k in self.replies]


@pytest.fixture
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The folders of an honest and a rogue site, whose workers run."""
    folders, running = [], []
    for i, name in enumerate(NAMES):
        here = tmp_path_factory.mktemp(name)
        write(here / "rows.jsonl", [{"text": " ".join(WORDS[(i + j * k) % 6] for k in range(9))} for j in range(8)])
        (here / "site.toml").write_text(f'name = "{name}"\n[data]\nsource = "rows.jsonl"\n')
        run = ["-m", "hocket.deploy.work"] if name == "honest" else [str(Path(__file__).with_name("rogue.py"))]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        running.append(subprocess.Popen([sys.executable, *run, here / "site.toml", here / "own"], env=env))
        folders.append(here / "own")
    try:
        until = time.monotonic() + 120
        while not all((f / SOCKET).exists() for f in folders):
            assert time.monotonic() < until
            time.sleep(0.1)
        yield folders
    finally:
        for p in running:
            p.kill()
            p.wait()


def test_whatever_a_site_does_the_others_go_on_and_it_is_written_down(tmp_path: Path, sites: list[Path]) -> None:
    write(tmp_path / "held.jsonl", [{"text": "sun moon star sky"}])
    deadline = 'name = "sync"\ndeadline = 15.0'
    text = RECIPE.format(
        turns=len(FAULTS), count=2, sites='"honest", "rogue"', schedule=deadline,
        data=f'source = "at the sites"\nheldout_source = "{tmp_path / "held.jsonl"}"',
    )  # fmt: skip
    (tmp_path / "recipe.toml").write_text(text + "norm_limit = 5.0\n")
    made = recipe.load(tmp_path / "recipe.toml")
    grid: Any = Beside(sites)
    link = lambda path: FlowerLink(grid, "r", shared(made), NAMES, path / "arriving", poll=0.02, patience=60, pause=0.2)
    run = serve(made, tmp_path / "run", link)
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    lost = {r["turn"]: r for r in rows if r["what"] == "lost"}
    for turn, fault in enumerate(FAULTS[1:], 1):
        assert lost[turn]["client"] == 1
        assert REASONS[fault] in lost[turn]["reason"], (fault, lost[turn])
    assert [r["updates"] for r in rows if r["what"] == "step"] == [2] + [1] * (len(FAULTS) - 1)
    assert rows[-1]["what"] == "end"
    saved, _ = store.load(run / "checkpoint", recipe.load(run / "recipe.toml").hash)
    assert all(torch.isfinite(v).all() for v in saved["engine"]["server"]["state"]["params"].values())
