"""Draws that everybody can make again: they depend on their keys alone."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from hocket import draws


@pytest.mark.parametrize("n", [1, 5, 15, 16, 17, 1000])
def test_a_draw_depends_on_its_keys_alone(n: int) -> None:
    first = draws.normal((n,), 7, "a")
    draws.normal((33,), 7, "b")
    torch.manual_seed(3)
    assert torch.equal(draws.normal((n,), 7, "a"), first)
    assert torch.equal(draws.normal((n,), 7, "a", out=torch.empty(2000)), first)
    assert not torch.equal(draws.normal((n,), 7, "b"), first)
    assert not torch.equal(draws.normal((n,), 8, "a"), first)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    draws.normal((20,), 1)
    draws.truncated((20,), 0.1, 1)
    assert torch.equal(torch.rand(3), want)


def test_threads_do_not_draw_from_each_other() -> None:
    want = [draws.normal((100_000,), i) for i in range(4)]
    got: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: draws.normal((100_000,), i)})) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(got[i], want[i]) for i in range(4))


@pytest.mark.parametrize("bound", [1e-5, 1e-3, 0.009, 0.011, 0.3, 2.0])
def test_truncated_numbers_have_the_variance_of_the_conditioned_normal(bound: float) -> None:
    x = draws.truncated((400_000,), bound, 1, "v").double()
    assert float(x.abs().max()) <= bound * (1 + 1e-6)
    assert float(x.var()) == pytest.approx(draws.variance(bound), rel=0.01)
    t = torch.linspace(-bound, bound, 200_001, dtype=torch.float64)  # by quadrature
    weight = torch.exp(-(t**2) / 2)
    assert draws.variance(bound) == pytest.approx(float((weight * t**2).sum() / weight.sum()), rel=1e-4)


def test_the_variance_in_d_dimensions_is_about_a_third_of_one_over_d() -> None:
    for d in (1000, 100_000):
        assert 1 / draws.variance(1 / math.sqrt(d)) == pytest.approx(3 * d, rel=1e-3)


@pytest.mark.parametrize("n", [1, 3, draws.PIECE - 1, draws.PIECE + 5])
@pytest.mark.parametrize("bound", [1e-4, 5e-3, 0.5])
def test_a_longer_truncated_draw_begins_with_a_shorter_one(n: int, bound: float) -> None:
    long = draws.truncated((3 * draws.PIECE,), bound, 5)
    assert torch.equal(long[:n], draws.truncated((n,), bound, 5, out=torch.empty(4 * draws.PIECE)))
    assert torch.equal(draws.truncated((7, 50), 0.01, 5)[:3], draws.truncated((3, 50), 0.01, 5))


@pytest.mark.parametrize("bound", [5e-4, 5e-3, 0.05, 1.0])
def test_truncated_numbers_have_the_conditioned_normal_distribution(bound: float) -> None:
    x = draws.truncated((200_000,), bound, 3).double()
    u = torch.erf(x / 2**0.5) / math.erf(bound / 2**0.5)  # uniform in (-1, 1) if they do
    assert float(u.abs().max()) <= 1
    got = torch.histc(u, 100, -1, 1) - 2000
    assert float((got**2).sum() / 2000) == pytest.approx(99, abs=70)  # chi square, five standard deviations
    assert float(u.mean()) == pytest.approx(0, abs=5 * (1 / 3 / 200_000) ** 0.5)
    for shift in (1, 2, 3, 4):  # four come from one draw
        assert float((u[shift:] * u[:-shift]).mean()) == pytest.approx(0, abs=5 / 3 / 200_000**0.5)
