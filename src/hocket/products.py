"""Sums of low-rank products, P = sum_j B_j A_j, without forming them: decomposition, norms, spectra.

With L = [B_1 ... B_k] (out x R) and S = [A_1; ...; A_k] (R x in), L = Q_1 R_1 and S^T = Q_2 R_2, the decomposition of
P = Q_1 (R_1 R_2^T) Q_2^T is that of an R x R core (as in FLoRIST, https://arxiv.org/abs/2506.09199):

    R_1 R_2^T = U' S V'^T,   U = Q_1 U',   V^T = V'^T Q_2^T
    ||P||_F^2 = tr(L^T L  S S^T)    (R x R Gram matrices, in float64)

Cost O((out + in) R^2 + R^3) against O(out in min(out, in)) for the dense matrix, to which `svd` changes once R is no
smaller than its sides. Half precision is widened to fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hocket.combine import finite, wide
from hocket.errors import RunError

Product = tuple[Tensor, Tensor]  # B (out x r), A (r x in)


def stack(terms: Sequence[Product]) -> Product:
    """One product that is the sum of all."""
    return torch.cat([wide(b) for b, _ in terms], dim=1), torch.cat([wide(a) for _, a in terms])


def dense(terms: Sequence[Product]) -> Tensor:
    """The sum itself (out x in)."""
    b, a = stack(terms)
    return b @ a


def svd(terms: Sequence[Product]) -> tuple[Tensor, Tensor, Tensor]:
    """U (out x k), s (k,) descending, V^T (k x in) with U diag(s) V^T the sum, k = min(R, out, in).

    The largest entry of each column of U is positive, so that signs do not depend on the solver.

    Raises:
        RunError: training diverged; factors that are finite can have a product that is not.
    """
    b, a = stack(terms)
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        u, s, vt = _decomposed(b @ a)
    else:
        (q1, r1), (q2, r2) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        u, s, vt = _decomposed(r1 @ r2.mT)
        u, vt = q1 @ u, vt @ q2.mT
    if u.is_meta:
        return u, s, vt
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(u)
    return u * sign, s, vt * sign.mT


def _decomposed(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not core.is_meta and not finite(core):
        raise RunError("products of adapters are not finite any more: lower training.lr, or set training.clip")
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    return u, s, vt


def rank_for(s: Tensor, energy: float) -> int:
    """The fewest singular values that hold this share of their squared sum; at least 1."""
    lost = s.double().square().flip(0).cumsum(0).flip(0)  # by cutting here; small values are added first, none vanishes
    return max(1, int((lost > (1 - energy) * lost[0]).sum()))


def norm(terms: Sequence[Product]) -> float:
    """Frobenius norm of the sum. Cancelling terms leave about 1e-8 of their own norms."""
    b, a = (x.double() for x in stack(terms))
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)) ** 0.5


def inner(x: Sequence[Product], y: Sequence[Product]) -> float:
    """Frobenius inner product of two sums; with `norm` their cosine."""
    (bx, ax), (by, ay) = ((b.double(), a.double()) for b, a in (stack(x), stack(y)))
    return float(((bx.mT @ by) * (ax @ ay.mT)).sum())


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the normalized singular values (Roy and Vetterli, EUSIPCO 2007); 0 for a zero matrix."""
    p = s.double()
    if not float(p.sum()) > 0:
        return 0.0
    p = p[p > 0] / p.sum()
    return float(torch.exp(-(p * p.log()).sum()))
