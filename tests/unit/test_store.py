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


def blob(i: int) -> bytes:
    return wire.pack({"w": torch.full((20,), float(i))})


def spooled(folder: Path, keys: str, budget: int = 0) -> store.Spool:
    spool = store.Spool(folder / "spool", budget)
    for i, key in enumerate(keys):
        spool.put(f"up/{key}", blob(i))
    return spool


def on_disk(folder: Path) -> str:
    return "".join(sorted(p.stem[-1] for p in (folder / "spool").glob("*.hkt")))


def test_spool_spills_to_disk_and_comes_back(tmp_path: Path) -> None:
    spool = spooled(tmp_path, "abcde", budget=300)
    assert 0 < len(spool.files) < 5
    saved = store.unflatten(*store.flatten(spool.state_dict()))
    again = store.Spool(tmp_path / "spool", budget=300)
    again.load_state_dict(saved)
    for i, key in enumerate("abcde"):
        assert float(again.get(f"up/{key}")["w"][0]) == i


def test_a_dropped_file_goes_at_once_unless_a_kept_checkpoint_names_it(tmp_path: Path) -> None:
    """So that a run with few checkpoints does not fill the disk."""
    spool = spooled(tmp_path, "ab")
    spool.drop("up/a")
    assert on_disk(tmp_path) == "b"
    store.save(tmp_path / "checkpoint", 1, {}, "hash", spool)
    spool.drop("up/b")
    spool.put("up/c", blob(2))
    assert on_disk(tmp_path) == "bc"
    for step in range(2, 2 + store.KEEP):
        assert on_disk(tmp_path) == "bc"
        store.save(tmp_path / "checkpoint", step, {}, "hash", spool)
    assert on_disk(tmp_path) == "c"


def test_a_resumed_run_keeps_the_files_of_every_kept_checkpoint(tmp_path: Path) -> None:
    spool = spooled(tmp_path, "ab")
    store.save(tmp_path / "checkpoint", 1, {"n": 1}, "hash", spool)
    spool.drop("up/a")
    spool.put("up/c", blob(2))
    store.save(tmp_path / "checkpoint", 2, {"n": 2, "spool": spool.state_dict()}, "hash", spool)
    spool.put("up/d", blob(3))  # then it crashes
    again = store.Spool(tmp_path / "spool", 0)
    state, _ = store.load(tmp_path / "checkpoint", "hash", again)
    again.load_state_dict(state["spool"])
    again.sweep()
    assert state["n"] == 2
    assert on_disk(tmp_path) == "abc"
    store.save(tmp_path / "checkpoint", 3, {}, "hash", again)
    assert on_disk(tmp_path) == "bc"


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_checkpoint_whose_files_are_gone_or_damaged_is_skipped(tmp_path: Path, harm: str) -> None:
    spool = spooled(tmp_path, "a")
    store.save(tmp_path / "checkpoint", 1, {"n": 1}, "hash", spool)
    spool.put("up/b", blob(1))
    newest = store.save(tmp_path / "checkpoint", 2, {"n": 2}, "hash", spool)
    path = tmp_path / "spool" / "up-b.hkt"
    path.unlink() if harm == "gone" else path.write_bytes(path.read_bytes()[:-1] + b"!")
    state, warnings = store.load(tmp_path / "checkpoint", "hash", store.Spool(tmp_path / "spool", 0))
    assert state["n"] == 1
    assert newest.name in warnings[0]
    assert "up-b.hkt" in warnings[0]
    assert not newest.exists()


def test_a_torn_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    for step in (1, 2):
        torn = store.save(tmp_path / "checkpoint", step, {"n": step}, "hash")
    torn.write_bytes(torn.read_bytes()[:-9])
    store.load(tmp_path / "checkpoint", "hash")
    assert torn.exists()  # a reader that does not go on with the run changes nothing
    spool = store.Spool(tmp_path / "spool")
    store.load(tmp_path / "checkpoint", "hash", spool)
    assert not torn.exists()
    store.save(tmp_path / "checkpoint", 2, {"n": 2}, "hash", spool)
    assert [p.stem[-1] for p in sorted((tmp_path / "checkpoint").glob("*.hkt"))] == ["1", "2"]


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


def test_the_manifest_keeps_the_start_and_gets_the_end(tmp_path: Path, stories: Path) -> None:
    from hocket import run
    from hocket.errors import Interrupted
    from hocket.recipe import parse

    rows = "\n".join(json.dumps({"text": f"the dog {i} ran"}) for i in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = parse(
        {
            "turns": 2, "model": {"source": str(stories), "device": "cpu"}, "data": {"source": str(tmp_path / "rows.jsonl")},
            "method": {"name": "fedbcd"}, "clients": {"count": 2}, "training": {"local_steps": 1}, "engine": {"spool_mb": 0},
        }
    )  # fmt: skip
    read = lambda: json.loads((tmp_path / "run" / "manifest.json").read_text())
    stop = run.Stop()

    def after_one_turn(record: dict[str, Any]) -> None:
        stop.signal = 2 if record["what"] == "step" else None

    with pytest.raises(Interrupted):
        run.start(recipe, tmp_path / "run", after_one_turn, stop)
    assert read()["finished"] is None
    began = "2020-01-01T00:00:00+00:00"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**read(), "created": began}))
    run.resume(tmp_path / "run")
    assert read()["created"] == began < read()["finished"]
    kept = sorted((tmp_path / "run" / "checkpoint").glob("*.hkt"))
    named = {f"{k.replace('/', '-')}.hkt" for p in kept for k in wire.Packet(p).meta["files"]}
    assert {p.name for p in (tmp_path / "run" / "spool").iterdir()} == named
