"""Checkpoints, blobs, locks and the ledger under crashes, full disks and second processes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hocket import store, wire
from hocket.errors import StoreError
from hocket.ledger import Ledger


def state(n: int) -> dict[str, Any]:
    w = torch.arange(float(n))
    return {"n": n, "w": w, "again": w, "ids": {3: [1, 2.5, None, "x", True]}, "blob": b"\x00\xff", "none": b""}


def test_nested_state_comes_back_with_shared_tensors_shared() -> None:
    tensors, skeleton = store.flatten(state(4))
    assert len(tensors) == 3  # w once, and the two blobs
    back = store.unflatten(tensors, json.loads(json.dumps(skeleton)))
    assert back["w"] is back["again"]
    assert back["ids"] == {3: [1, 2.5, None, "x", True]}
    assert back["blob"] == b"\x00\xff"
    assert back["none"] == b""


def test_only_plain_data_is_saved() -> None:
    with pytest.raises(TypeError, match="set"):
        store.flatten({"x": {1, 2}})


def test_newest_whole_checkpoint_wins_and_old_ones_go(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        store.save(tmp_path, n, state(n), "hash")
    assert len(list(tmp_path.glob("*.hkt"))) == store.KEEP
    assert store.load(tmp_path, "hash")[0]["n"] == 3


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_torn_checkpoint_is_noticed_and_the_one_before_used(tmp_path: Path, keep: float) -> None:
    store.save(tmp_path, 1, state(1), "hash")
    torn = store.save(tmp_path, 2, state(200), "hash")
    torn.write_bytes(torn.read_bytes()[: int(keep * torn.stat().st_size)])
    back, warnings = store.load(tmp_path, "hash")
    assert back["n"] == 1
    assert str(torn) in warnings[0]
    (tmp_path / "0000000001.hkt").unlink()
    with pytest.raises(StoreError, match="no whole checkpoint"):
        store.load(tmp_path, "hash")


def test_another_recipe_an_older_format_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing to resume"):
        store.load(tmp_path)
    path = store.save(tmp_path, 1, state(1), "hash")
    with pytest.raises(StoreError, match="another recipe"):
        store.load(tmp_path, "other")
    packet = wire.Packet(path)
    wire.write_file(path, dict(packet), {**packet.meta, "format": 0})
    with pytest.raises(StoreError, match="checkpoint format 0"):
        store.load(tmp_path, "hash")


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(tmp_path, 1, state(1), "hash")

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wire, "write", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.save(tmp_path, 2, state(2), "hash")
    monkeypatch.undo()
    assert store.load(tmp_path, "hash")[0]["n"] == 1


def test_spool_spills_to_disk_and_remembers_what_a_checkpoint_needs(tmp_path: Path) -> None:
    spool = store.Spool(tmp_path / "spool", budget=300)
    blobs = {f"up/{i}": wire.pack({"w": torch.full((20,), float(i))}) for i in range(5)}
    for key, blob in blobs.items():
        spool.put(key, blob)
    assert spool.files
    for i, key in enumerate(blobs):
        assert float(spool.get(key)["w"][0]) == i
    saved = store.unflatten(*store.flatten(spool.state_dict()))
    needed = spool.files
    gone = sorted(needed)[0]
    spool.drop(gone)
    spool.tidy(keep=needed)
    assert (tmp_path / "spool" / f"{gone.replace('/', '-')}.hkt").exists()  # the checkpoint still names it
    again = store.Spool(tmp_path / "spool", budget=300)
    again.load_state_dict(saved)
    assert float(again.get(gone)["w"][0]) == int(gone[-1])
    spool.tidy(keep=spool.files)
    assert not (tmp_path / "spool" / f"{gone.replace('/', '-')}.hkt").exists()
    with pytest.raises(StoreError, match=gone.replace("/", "-")):
        again.load_state_dict(saved)


def test_spool_sweeps_what_a_crash_left(tmp_path: Path) -> None:
    (tmp_path / "stray.hkt").write_bytes(b"x")
    store.Spool(tmp_path).sweep()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    first = store.RunFolder(tmp_path / "run", new=True)
    with pytest.raises(StoreError, match="in use"):
        store.RunFolder(tmp_path / "run", new=True)
    first.ledger.touch()
    first.close()
    with pytest.raises(StoreError, match="already holds a run"):
        store.RunFolder(tmp_path / "run", new=True)
    store.RunFolder(tmp_path / "run", new=False).close()


def test_ledger_cuts_what_is_done_again_and_refuses_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.add("up", client=0, start=1.0, end=3.0, bytes=10, loss=None)
    saved = ledger.state_dict()
    ledger.add("lost", t=4.0, client=0, reason="x", value=float("nan"))
    ledger.close()
    assert len(path.read_text().splitlines()) == 2
    again = Ledger(path, saved["position"])
    again.load_totals(saved)
    assert again.bytes["up"] == 10
    assert again.seconds["up"] == 2.0
    again.close()
    assert [json.loads(line)["what"] for line in path.read_text().splitlines()] == ["up"]
    path.write_text("")
    with pytest.raises(StoreError, match="older"):
        Ledger(path, saved["position"])
