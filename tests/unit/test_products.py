"""Sums of products: the short ways are the dense matrix's, in its norms, its spectrum and what a cut of it loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hocket import products
from hocket.errors import RunError
from hocket.products import Product
from hocket.tree import generator

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(*shape: int, key: object = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("products", key, *shape)).to(dtype)


def sums(out: int, inner: int, *ranks: int, dtype: torch.dtype = torch.float64) -> list[Product]:
    return [(draw(out, r, key=f"b{i}", dtype=dtype), draw(r, inner, key=f"a{i}", dtype=dtype)) for i, r in enumerate(ranks)]


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Entries within a share of the largest one."""
    return bool((x - y).abs().max() <= tolerance * max(float(y.abs().max()), 1e-300))


SHAPES = [
    (30, 20, (2, 3, 4)),  # 9 of 20: through the core
    (20, 30, (2, 3, 4)),
    (25, 25, (24,)),  # one below the sides
    (12, 20, (4, 4, 4)),  # as many as the shorter side: dense
    (20, 12, (8, 1, 9)),  # above it
    (9, 1, (3,)),
    (1, 9, (1,)),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("out", "inner", "ranks"), SHAPES)
def test_the_decomposition_is_that_of_the_dense_sum(out: int, inner: int, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    terms, tolerance = sums(out, inner, *ranks, dtype=dtype), TOLERANCE[dtype]
    whole = sum(b.double() @ a.double() for b, a in terms)
    u, s, vt = products.svd(terms)
    k = min(out, inner, sum(ranks))
    assert (u.shape, s.shape, vt.shape) == ((out, k), (k,), (k, inner))
    assert {x.dtype for x in (u, s, vt)} == {dtype}
    assert close(s.double(), torch.linalg.svdvals(whole)[:k], tolerance)
    assert bool((s.diff() <= 0).all())
    assert close((u * s).double() @ vt.double(), whole, tolerance)
    assert close(products.dense(terms).double(), whole, tolerance)
    for x in (u.mT @ u, vt @ vt.mT):
        assert torch.allclose(x.double(), torch.eye(k).double(), atol=tolerance)


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_a_cut_loses_the_tail_of_the_spectrum(kept: int) -> None:
    terms = sums(30, 20, 2, 3, 4)
    whole = products.dense(terms)
    u, s, vt = products.svd(terms)
    lost = torch.linalg.matrix_norm(whole - (u * s)[:, :kept] @ vt[:kept])
    assert abs(lost - s[kept:].norm()) < 1e-10
    assert lost > 0.1


def test_signs_do_not_depend_on_the_order_of_the_terms_or_of_their_columns() -> None:
    terms = sums(30, 20, 2, 3, 4)
    u, s, vt = products.svd(terms)
    (b, a), order = products.stack(terms), torch.randperm(9, generator=generator("order"))
    for other in (terms[::-1], [(b[:, order], a[order])], [(b @ a, torch.eye(20).double())]):
        u2, s2, vt2 = (x[..., :9] if x.ndim < 2 or x.shape[0] == 30 else x[:9] for x in products.svd(other))
        assert close(s2, s, 1e-10)
        assert close(u2, u, 1e-8)
        assert close(vt2, vt, 1e-8)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


def test_norms_and_angles_are_those_of_the_dense_sums() -> None:
    x, y = sums(30, 20, 2, 3, 4), [(2 * b, a) for b, a in sums(30, 20, 5, 3)]
    p, q = products.dense(x), products.dense(y)
    assert products.norm(x) == pytest.approx(float(p.norm()), rel=1e-12)
    assert products.inner(x, y) == pytest.approx(float((p * q).sum()), rel=1e-10)
    assert products.inner(x, x) == pytest.approx(products.norm(x) ** 2, rel=1e-12)
    cosine = products.inner(x, y) / (products.norm(x) * products.norm(y))
    assert cosine == pytest.approx(float(torch.cosine_similarity(p.flatten(), q.flatten(), 0)), rel=1e-10)
    assert 0.01 < abs(cosine) < 0.99


def test_what_cancels_leaves_rounding_alone() -> None:
    x = sums(30, 20, 2, 3)
    gone = [*x, *((-b, a) for b, a in x)]
    assert products.norm(gone) < 1e-6 * products.norm(x)
    assert products.svd(gone)[1].max() < 1e-12 * products.norm(x)


def test_single_precision_is_widened_where_sums_are_squared() -> None:
    x = sums(300, 200, 8, 8, dtype=torch.float32)
    assert products.norm(x) == pytest.approx(float(sum(b.double() @ a.double() for b, a in x).norm()), rel=1e-12)


def test_half_precision_comes_out_in_single() -> None:
    x = [(b.bfloat16(), a.bfloat16()) for b, a in sums(30, 20, 2, 3)]
    assert {t.dtype for t in (*products.stack(x), products.dense(x), *products.svd(x))} == {torch.float32}
    assert close(products.dense(x).double(), sum(b.double() @ a.double() for b, a in x), 1e-6)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.1, 1), (0.5, 1), (0.63, 1), (0.65, 2), (0.8, 2), (0.95, 3), (0.999, 4), (1.0, 4)]
)
def test_the_fewest_values_that_hold_a_share_of_the_energy(energy: float, rank: int) -> None:
    s = torch.tensor([0.8, 0.5, 0.3, 0.1414]) * 7  # squares 0.64, 0.25, 0.09, 0.02
    assert products.rank_for(s, energy) == rank


def test_all_the_energy_is_all_that_is_not_zero() -> None:
    assert products.rank_for(torch.tensor([3.0, 2.0, 1e-3, 0.0, 0.0]).double(), 1.0) == 3
    assert products.rank_for(torch.tensor([1.0, 1e-12]).double(), 1.0) == 2
    assert products.rank_for(torch.zeros(4), 0.9) == 1


@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_values_count_each_and_a_single_one_counts_once(n: int) -> None:
    assert products.effective_rank(torch.full((n,), 0.3)) == pytest.approx(n)
    assert products.effective_rank(torch.tensor([5.0] + [0.0] * n)) == 1
    assert products.effective_rank(products.svd([(draw(12, 1), draw(1, 9))])[1]) == pytest.approx(1)


def test_effective_rank_is_the_spectrum_s_entropy_whatever_its_scale() -> None:
    s = torch.tensor([2.0, 1.0, 1.0])
    assert products.effective_rank(s) == pytest.approx(2**1.5)  # entropy of (1/2, 1/4, 1/4): 1.5 bits
    assert products.effective_rank(1e-3 * s) == pytest.approx(products.effective_rank(s))


@pytest.mark.parametrize("ranks", [(2, 3), (20, 3)])
def test_nothing_has_no_norm_and_no_rank(ranks: tuple[int, ...]) -> None:
    zero = [(torch.zeros_like(b), a) for b, a in sums(30, 20, *ranks)]
    u, s, vt = products.svd(zero)
    assert not s.any()
    assert all(torch.isfinite(x).all() for x in (u, vt))
    assert products.norm(zero) == products.effective_rank(s) == 0


@pytest.mark.parametrize("ranks", [(2, 3), (20, 3)])
def test_a_product_that_is_not_finite_is_an_error_that_says_what_to_do(ranks: tuple[int, ...]) -> None:
    large = [(1e30 * b, 1e30 * a) for b, a in sums(30, 20, *ranks, dtype=torch.float32)]
    assert all(torch.isfinite(x).all() for x in products.stack(large))
    with pytest.raises(RunError, match=r"training\.lr"):
        products.svd(large)
    assert products.svd([(b.double(), a.double()) for b, a in large])[1][0] > 1e60


def test_shapes_alone_are_enough_for_a_plan() -> None:
    terms = [(b.to("meta"), a.to("meta")) for b, a in sums(30, 20, 2, 3)]
    u, s, vt = products.svd(terms)
    assert (u.shape, s.shape, vt.shape) == ((30, 5), (5,), (5, 20))
