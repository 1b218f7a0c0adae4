"""Downloads as differences, where what a client holds has a shape of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import World, language

from hocket.methods.lora import A, modules

PRUNES = {"name": "hetlora", "rank": 4, "gamma": 0.5, "decay": 3.0}
CASES = [({"name": "hlora", "rank": 4}, [1, 2, 4]), (PRUNES, [2, 4, 4]), (PRUNES, None)]


def world(meth: Any, ranks: list[int] | None, down: Any) -> World:
    return language(meth=meth, ranks=ranks, down=down, turns=4, layers=2, steps=4)


@pytest.mark.parametrize(("meth", "ranks"), CASES)
def test_differences_of_which_nothing_is_lost_are_whole_downloads(meth: Any, ranks: list[int] | None) -> None:
    w, whole = world(meth, ranks, {"name": "topk", "share": 1.0}).run(), world(meth, ranks, "raw").run()
    assert w.starts.keys() == whole.starts.keys()
    for at, start in whole.starts.items():
        assert {k: v.shape for k, v in w.starts[at].items()} == {k: v.shape for k, v in start.items()}
        assert all(torch.allclose(w.starts[at][k], v, atol=1e-4) for k, v in start.items()), at
    seen = {len(s[m + A]) for s in w.starts.values() for m in modules(s)}
    assert len(seen) > 1  # clients of different ranks, or of one that shrank
