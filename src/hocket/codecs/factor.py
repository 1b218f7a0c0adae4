"""Low-rank factorizations of one matrix X (m x n): `SVD`, `PCA`, `QRCP`, `CUR`, exact and from random sketches.

Each is one class of functions: `layout` (the parts for rank r, as shapes), `factor` (X to nested factors up to rank k),
`expand` (parts to matrix) and `flops`. Left factors are stored transposed, so that a row of a part is one component and
a codec that scales rows (int8) meets numbers of one size. The numbers sent:

    SVD   U_r S_r, V_r                                      r(m+n)
    PCA   mean row mu, then U_r S_r, V_r of X - 1 mu^T      r(m+n) + n
    QRCP  Q_r, trapezoid R_r of X P = Q R                   r(m+n) - r(r-1)/2     and r indices
    CUR   C = X[:,J], R = X[I,:], U = C^+ X R^+             r(m+n) + r^2          and 2r indices

Of QRCP's permutation the first r columns say everything: the others keep their order. CUR's indices tell where C and R
are rows and columns of X themselves, which `expand` puts back as they are.

Exact factorizations are LAPACK's. Randomized ones work on a sketch Q^T X of k + 10 rows, Q from the range finder with
two power iterations of Halko, Martinsson and Tropp 2011 (SIAM Review 53, algorithms 4.4 and 5.1). QRCP and CUR take
their pivots from the sketch, then the chosen columns and rows from X (Duersch and Gu 2017, SIAM J. Sci. Comput. 39;
Martinsson, Quintana-Orti, Heavner and van de Geijn 2017, same volume; for CUR Voronin and Martinsson 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hocket.codecs.base import Parts
from hocket.codecs.parts import index, positions

OVERSAMPLE = 10  # columns of a sketch beyond the rank
POWER = 2  # power iterations


class Factors(NamedTuple):
    """Nested factors of a matrix.

    Attributes:
        kept: float64 (k,), the squared norm of the approximation of rank 1..k.
        cut: rank to parts.
    """

    kept: Tensor
    cut: Callable[[int], Parts]


class Kind(Protocol):
    """A factorization. `g` is None for the exact one, else the generator of the sketches."""

    @staticmethod
    def layout(m: int, n: int, r: int, dtype: torch.dtype) -> Parts:
        """The parts as tensors on the meta device; the left factor is `l`, r rows."""

    @staticmethod
    def factor(x: Tensor, k: int, g: torch.Generator | None) -> Factors:
        """Factors up to rank k <= min(m, n)."""

    @staticmethod
    def expand(parts: Parts) -> Tensor:
        """The matrix."""

    @staticmethod
    def flops(m: int, n: int, k: int, sketched: bool) -> float:
        """Floating point operations of `factor`, leading terms."""


def _blank(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sketch(x: Tensor, k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Q with k + OVERSAMPLE orthonormal columns and Q^T X, so that Q Q^T X is nearly the best rank k has to offer.

    torch.svd_lowrank does the same but draws from torch's global generator.
    """
    width = min(k + OVERSAMPLE, *x.shape)
    q, _ = torch.linalg.qr(x @ torch.randn(x.shape[1], width, generator=g).to(x))
    for _ in range(POWER):
        q, _ = torch.linalg.qr(x.mT @ q)
        q, _ = torch.linalg.qr(x @ q)
    return q, q.mT @ x


def _sketch_flops(m: int, n: int, k: int) -> float:
    """2 POWER + 2 products with X, and QRs of a x l matrices with Q formed, 4 a l^2 each."""
    l = min(k + OVERSAMPLE, m, n)
    return 2 * m * n * l * (2 * POWER + 2) + 4 * ((POWER + 1) * m + POWER * n) * l**2


def _svd(x: Tensor, k: int, g: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """(U S)^T (k x m), V^T (k x n) and the squared singular values in float64; the largest entry of a row of V^T is
    positive, so that signs do not depend on the solver."""
    q, x = (None, x) if g is None else _sketch(x, k, g)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    u, s, vt = u[:, :k], s[:k], vt[:k]
    u = u if q is None else q @ u
    sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
    return (u * s).mT.contiguous() * sign, vt * sign, s.double().square()


class SVD(Kind):
    """The best approximation of rank r."""

    @staticmethod
    def layout(m: int, n: int, r: int, dtype: torch.dtype) -> Parts:
        return {"l": _blank(dtype, r, m), "r": _blank(dtype, r, n)}

    @staticmethod
    def factor(x: Tensor, k: int, g: torch.Generator | None) -> Factors:
        left, right, squares = _svd(x, k, g)
        return Factors(squares.cumsum(0), lambda r: {"l": left[:r], "r": right[:r]})

    @staticmethod
    def expand(parts: Parts) -> Tensor:
        return parts["l"].mT @ parts["r"]

    @staticmethod
    def flops(m: int, n: int, k: int, sketched: bool) -> float:
        """Exact: Golub and Van Loan 4th ed., figure 8.6.1, on X. Sketched: the same on l rows, and U from Q."""
        if sketched:
            l = min(k + OVERSAMPLE, m, n)
            return _sketch_flops(m, n, k) + SVD.flops(l, n, l, False) + 2 * m * l * k
        long, short = max(m, n), min(m, n)
        return 14 * long * short**2 + 8 * short**3


class PCA(SVD):
    """The SVD of what the mean row leaves: the best approximation by a mean and r components."""

    @staticmethod
    def layout(m: int, n: int, r: int, dtype: torch.dtype) -> Parts:
        return SVD.layout(m, n, r, dtype) | {"mean": _blank(dtype, n)}

    @staticmethod
    def factor(x: Tensor, k: int, g: torch.Generator | None) -> Factors:
        mean = x.mean(0)
        left, right, squares = _svd(x - mean, k, g)
        kept = len(x) * mean.double().square().sum() + squares.cumsum(0)
        return Factors(kept, lambda r: {"l": left[:r], "r": right[:r], "mean": mean})

    @staticmethod
    def expand(parts: Parts) -> Tensor:
        return torch.addmm(parts["mean"], parts["l"].mT, parts["r"])


def _pivots(x: Tensor, k: int) -> Tensor:
    """The first k columns that QR with column pivoting takes."""
    from scipy.linalg import qr  # a third of the time that importing this package's core takes

    _, order = qr(x.cpu().numpy(), mode="r", pivoting=True, check_finite=False)
    return torch.from_numpy(order[:k]).long().to(x.device)


def _pivot_flops(m: int, n: int) -> float:
    """Golub and Van Loan 4th ed., section 5.4.2, run to the end: LAPACK does not stop at a rank."""
    k = min(m, n)
    return 4 * m * n * k - 2 * k**2 * (m + n) + 4 * k**3 / 3


def _basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """QR with a diagonal that is not negative, which makes it one factorization and not 2^k."""
    q, t = torch.linalg.qr(columns)
    sign = torch.where(t.diagonal() < 0, -1.0, 1.0).to(q)
    return q * sign, t * sign.unsqueeze(1)


def _others(j: Tensor, n: int) -> Tensor:
    """A mask of the columns that are not in j."""
    return torch.ones(n, dtype=torch.bool, device=j.device).index_fill_(0, j, False)


class QRCP(Kind):
    """QR with column pivoting: r columns of X, made orthonormal, and the others' shares of them."""

    @staticmethod
    def layout(m: int, n: int, r: int, dtype: torch.dtype) -> Parts:
        triangle, rest = _blank(dtype, r * (r + 1) // 2), _blank(dtype, r, n - r)
        return {"l": _blank(dtype, r, m), "t": triangle, "r": rest, "j": _blank(index(n), r)}

    @staticmethod
    def factor(x: Tensor, k: int, g: torch.Generator | None) -> Factors:
        n = x.shape[1]
        j = _pivots(x if g is None else _sketch(x, k, g)[1], k)
        q, t = _basis(x[:, j])
        left = q.mT.contiguous()
        right = left @ x

        def cut(r: int) -> Parts:
            upper = torch.triu_indices(r, r, device=x.device).unbind()
            rest = right[:r, _others(j[:r], n)]
            return {"l": left[:r], "t": t[upper], "r": rest, "j": j[:r].to(index(n))}

        return Factors(right.double().square().sum(1).cumsum(0), cut)

    @staticmethod
    def expand(parts: Parts) -> Tensor:
        left, rest = parts["l"], parts["r"]
        r, n = len(left), len(left) + rest.shape[1]
        j = positions(parts["j"], n)
        upper = torch.triu_indices(r, r, device=left.device).unbind()
        right = left.new_zeros(r, n)
        right[:, j] = left.new_zeros(r, r).index_put_(upper, parts["t"])
        right[:, _others(j, n)] = rest
        return left.mT @ right

    @staticmethod
    def flops(m: int, n: int, k: int, sketched: bool) -> float:
        """The pivots, QR of k columns with Q formed, one product with X."""
        l = min(k + OVERSAMPLE, m, n)
        pivots = _sketch_flops(m, n, k) + _pivot_flops(l, n) if sketched else _pivot_flops(m, n)
        return pivots + 4 * m * k**2 + 2 * m * n * k


class CUR(Kind):
    """r columns and r rows of X themselves, and the r x r matrix that joins them best."""

    @staticmethod
    def layout(m: int, n: int, r: int, dtype: torch.dtype) -> Parts:
        i, j = _blank(index(m), r), _blank(index(n), r)
        return {"l": _blank(dtype, r, m), "u": _blank(dtype, r, r), "r": _blank(dtype, r, n), "i": i, "j": j}

    @staticmethod
    def factor(x: Tensor, k: int, g: torch.Generator | None) -> Factors:
        columns, rows = x, x.mT
        if g is not None:  # X is nearly Q B, and Q B (Q B)^T = (R Q^T)^T R Q^T with B^T = P R
            q, columns = _sketch(x, k, g)
            rows = torch.linalg.qr(columns.mT, mode="r").R @ q.mT
        j, i = _pivots(columns, k), _pivots(rows, k)
        left, right = x.mT[j], x[i]
        (q, t), (p, s) = _basis(left.mT), _basis(right.mT)
        core = (q.mT @ x @ p).double()  # P_C X P_R in these bases, nested in the rank
        tolerance = max(x.shape) * torch.finfo(x.dtype).eps

        def cut(r: int) -> Parts:
            inverse = [torch.linalg.pinv(a[:r, :r].double(), rtol=tolerance) for a in (t, s)]
            u = inverse[0] @ core[:r, :r] @ inverse[1].mT
            parts = {"l": left[:r], "u": u.to(x.dtype), "r": right[:r]}
            return parts | {"i": i[:r].to(index(len(x))), "j": j[:r].to(index(x.shape[1]))}

        return Factors(core.square().cumsum(0).cumsum(1).diagonal(), cut)

    @staticmethod
    def expand(parts: Parts) -> Tensor:
        left, right = parts["l"], parts["r"]
        i, j = positions(parts["i"], left.shape[1]), positions(parts["j"], right.shape[1])
        x = left.mT @ parts["u"] @ right
        x[:, j], x[i] = left.mT, right
        return x

    @staticmethod
    def flops(m: int, n: int, k: int, sketched: bool) -> float:
        """Pivots both ways, two QRs with Q formed, a product with X."""
        pivots = 2 * _pivot_flops(m, n)
        if sketched:
            l = min(k + OVERSAMPLE, m, n)
            pivots = _sketch_flops(m, n, k) + _pivot_flops(l, n) + _pivot_flops(l, m) + 2 * (m + n) * l**2
        return pivots + 4 * (m + n) * k**2 + 2 * m * n * k + 2 * n * k**2
