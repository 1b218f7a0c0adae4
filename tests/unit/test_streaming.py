"""Packets of any size pass through files, never through memory as a whole."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import quadratic

from hocket import codecs, store
from hocket.client import work
from hocket.errors import StoreError


@pytest.mark.parametrize("spec", ["raw", "int8", {"name": "feedback", "codec": "topk"}, {"name": "chain", "codecs": ["half", "zstd"]}], ids=str)
def test_what_is_written_is_what_would_be_encoded(spec: object) -> None:
    codec = codecs.build(spec)
    tree = {k: torch.randn(40, 30) for k in "ab"}
    one: dict[str, torch.Tensor] = {}
    two: dict[str, torch.Tensor] = {}
    for _ in range(2):  # what is remembered from the first is part of the second
        file = io.BytesIO()
        blob = codec.encode(tree, one)
        assert codec.write(file, tree, two) == len(blob)
        assert file.getvalue() == blob


def test_a_job_leaves_the_same_packet_in_a_file(tmp_path: Path) -> None:
    world = quadratic(clients=1, turns=2, weights=[1])
    server, setting = world.simulation.server, world.simulation.executor.setting  # type: ignore[attr-defined]
    (job,) = server.poll()
    view = dict(server.state["params"])
    held = work(setting, replace(job, payload={}), view, {})
    into = tmp_path / "update.hkt"
    filed = work(setting, replace(job, payload={}), view, {}, into=into)
    assert into.read_bytes() == held.blob
    assert filed.blob == b""
    assert (filed.weight, filed.metrics, filed.raw) == (held.weight, held.metrics, held.raw)


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        store.put(tmp_path / "x", fail)
    assert not (tmp_path / "x").exists()


def test_writing_takes_no_memory_that_grows_with_the_packet(tmp_path: Path) -> None:
    """A process that may have 300 MB more than it has writes 400 MB of tensors it holds."""
    code = f"""
import resource, torch
from pathlib import Path
from hocket import codecs, store
tree = {{str(i): torch.full((10_000_000,), float(i)) for i in range(10)}}
used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
store.put(Path({str(tmp_path / 'big')!r}), lambda f: codecs.build('raw').write(f, tree))
try:
    codecs.build('raw').encode(tree)
except MemoryError:
    print('as a whole it does not fit')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "as a whole it does not fit", done.stderr
    assert (tmp_path / "big").stat().st_size > 400_000_000
