"""What the server adds up: against the formula in float64, one tensor at a time, and nothing that is not finite."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from hocket import store, wire
from hocket.combine import finite, mean, moved
from hocket.methods import Client, Update, method
from hocket.schedules import schedule
from hocket.server import Server
from hocket.tree import generator

G = generator("aggregation")
HALVES = [torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=G).to(dtype)


# --- the formula -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shares", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_mean_is_the_formula(dtype: torch.dtype, tolerance: float, shares: list[float] | None) -> None:
    weights = [3.0, -1.0, 0.25]
    trees = [{"a": draw(50, dtype=dtype), "b": draw(7, dtype=dtype)} for _ in range(3)]
    del trees[1]["b"]
    out = dict(mean(trees, weights, shares))
    for k, who in (("a", [0, 1, 2]), ("b", [0, 2])):
        total = sum((shares or weights)[i] for i in who)
        want = sum(weights[i] * trees[i][k].double() for i in who) / total
        assert torch.allclose(out[k].double(), want, atol=tolerance, rtol=tolerance)
        assert out[k].dtype == (torch.float32 if dtype in HALVES else dtype)  # half precision is summed in fp32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("n", [1, 4])
def test_moved_is_params_plus_the_mean_rounded_once(dtype: torch.dtype, n: int) -> None:
    params, trees, weights = {"w": draw(999, dtype=dtype)}, [{"w": draw(999, dtype=dtype)} for _ in range(n)], [0.7] * n
    ((_, out),) = moved(params, trees, weights, [1.0] * n, rate=0.3)
    want = params["w"].double() + 0.3 * 0.7 / n * sum(t["w"].double() for t in trees)
    error = (out.double() - want).abs() / want.abs().clamp(min=1)
    assert out.dtype == dtype
    assert error.max() <= (0.501 if dtype in HALVES else 4) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_one_tree_alone_comes_through_bit_for_bit(dtype: torch.dtype) -> None:
    x, w = draw(1001, dtype=dtype), draw(1001, dtype=dtype)
    for weight in (1.0, 0.1, 7.0):
        assert torch.equal(dict(mean([{"w": x}], [weight]))["w"].to(dtype), x)
        assert torch.equal(dict(moved({"w": w}, [{"w": x}], [weight]))["w"], w + x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_sums_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """The work is cut elsewhere, so other elements are the odd ones out at the end of a vector."""
    params, trees = {"w": draw(100_003, dtype=dtype)}, [{"w": draw(100_003, dtype=dtype)} for _ in range(3)]
    before, out = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out.append([dict(moved(params, trees[:n], [0.3] * n, [1.0] * n))["w"] for n in (1, 3)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in out[1:] for a, b in zip(out[0], other, strict=True))


def test_sums_write_into_nothing_that_they_were_given() -> None:
    params, tree = {"w": draw(9)}, {"w": draw(9)}
    kept = params["w"].clone(), tree["w"].clone()
    for trees in ([tree], [tree, tree]):
        for out in (dict(mean(trees, [1.0] * len(trees))), dict(moved(params, trees, [1.0] * len(trees)))):
            out["w"].zero_()
    assert torch.equal(params["w"], kept[0])
    assert torch.equal(tree["w"], kept[1])


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [-1.0, -1.0], [float("nan"), 1.0]])
def test_weights_that_do_not_sum_to_something_positive_are_an_error(weights: list[float]) -> None:
    tree = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="'w' sum to"):
        dict(mean([tree, tree], weights))
    with pytest.raises(ValueError, match="'w' sum to"):
        dict(moved(tree, [tree, tree], weights))


# --- finite --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 517, 1000])
def test_what_is_not_finite_is_found(dtype: torch.dtype, bad: float, at: int) -> None:
    x = draw(1001, dtype=dtype)
    assert finite(x)
    x[at] = bad
    assert not finite(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_large_values_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    x = torch.full((1001,), torch.finfo(dtype).max, dtype=dtype)
    assert finite(x)
    assert finite(-x)
    x[::2] *= -1
    assert finite(x)
    x[500] = float("nan")
    assert not finite(x)


@pytest.mark.parametrize("x", [torch.empty(0), torch.empty(0, 3).half(), torch.arange(5), torch.tensor([True]), torch.tensor(1.0)])
def test_other_tensors_are_finite(x: Tensor) -> None:
    assert finite(x)


def test_infinities_that_cancel_are_found() -> None:
    assert not finite(torch.tensor([float("inf"), -float("inf")]))


# --- memory --------------------------------------------------------------------------------------------------------------
class Watched(Mapping[str, Tensor]):
    """A packet stand-in: makes its tensors anew, and notes how many of all that were made are still alive."""

    alive: ClassVar[list[weakref.ref[Tensor]]] = []
    most: ClassVar[int] = 0

    def __init__(self, tree: dict[str, Tensor]) -> None:
        self.tree = tree

    def __getitem__(self, name: str) -> Tensor:
        out = self.tree[name].clone()
        Watched.alive = [*(r for r in Watched.alive if r() is not None), weakref.ref(out)]
        Watched.most = max(Watched.most, len(Watched.alive))
        return out

    def __contains__(self, name: object) -> bool:
        return name in self.tree

    def __iter__(self) -> Iterator[str]:
        return iter(self.tree)

    def __len__(self) -> int:
        return len(self.tree)


@pytest.mark.parametrize(
    ("sched", "tensors"),
    [
        ("sync", 1),
        ("fedasync", 1),
        ({"name": "fedbuff", "buffer": 10}, 1),
        ({"name": "fadas", "buffer": 10}, 1),
        ({"name": "fedfa", "window": 10}, 1),
        ({"name": "fedfa", "window": 10, "form": "model"}, 1),
        ({"name": "fedfa", "window": 10, "start": "wait"}, 1),
        ({"name": "ca2fl", "buffer": 10, "caches": "clients"}, 1),
        ({"name": "ca2fl", "buffer": 10}, 2),  # a difference of two packets
        ("safa", 1),
        ("port", 2),  # the tensor before is let go when the next is there
    ],
    ids=str,
)
def test_one_tensor_of_all_packets_is_in_memory(sched: object, tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten clients, several buffers: at no time do two updates' tensors (or a tensor of each packet) stand side by side."""
    m, s = method.build("fedavg"), schedule.build(sched)
    m = s.adapt(m)
    params = {f"layers.{i}.w": draw(6, 5) for i in range(4)}
    server = Server(m, s, params, [Client(c) for c in range(10)], 1000, 0)
    monkeypatch.setattr(Watched, "most", 0)
    monkeypatch.setattr(Watched, "alive", [])
    steps = 0
    for _ in range(6):
        for j in server.poll():
            payload = Watched({k: draw(6, 5) for k in params})
            assert server.receive(Update(j.id, j.client, j.version, j.turn, payload, 1.0 + j.client)) is None
        while server.step():
            steps += 1
    assert steps >= 4
    assert 1 <= Watched.most <= tensors


# --- packets are verified once -------------------------------------------------------------------------------------------
def test_a_spooled_packet_is_verified_after_a_resume_and_not_each_time_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(wire.Packet, "_hash", lambda self, f=wire.Packet._hash: (hashed.append(self.where), f(self))[1])
    spool = store.Spool(tmp_path / "spool", 0)
    spool.put("up/1", wire.pack({"w": torch.arange(3.0)}))
    for _ in range(3):
        assert torch.equal(spool.get("up/1")["w"], torch.arange(3.0))
    assert hashed == []
    store.save(tmp_path / "checkpoint", 1, {"spool": spool.state_dict()}, "hash", spool)
    again = store.Spool(tmp_path / "spool", 0)
    state, _ = store.load(tmp_path / "checkpoint", "hash", again)
    again.load_state_dict(state["spool"])
    assert torch.equal(again.get("up/1")["w"], torch.arange(3.0))
    assert len([w for w in hashed if "up-1" in w]) == 1
