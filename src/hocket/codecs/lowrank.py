"""Low-rank updates: `svd`, `pca`, `qrcp`, `cur`, after "fully asynchronous federated learning with PCA, QRCP, CUR",
OpenReview YY0oSXqG5x.

A reconstruction: only that paper's abstract was at hand. It says that GPT-2's updates travel as PCA, QRCP or CUR
factors under an asynchronous server. What is sent, and the choices the abstract leaves open, are these:

    X = a matrix of the *update* (m x n); the server gets and adds X_r, of rank r:
    svd    X_r = U_r S_r V_r^T                                   r(m+n)                numbers
    pca    X_r = 1 mu^T + U_r S_r V_r^T of X - 1 mu^T            r(m+n) + n            (mu the mean row)
    qrcp   X_r = Q_r R_r P^T                                     r(m+n) - r(r-1)/2     and r indices
    cur    X_r = C U R, U = C^+ X R^+                            r(m+n) + r^2          and 2r indices

Exact: with r = min(m, n) nothing is lost; in the Frobenius norm pca errs no more than svd, and svd no more than qrcp.
Approximate: everything else, and randomized factors (see `factor`). An update is as a rule of full rank: `feedback`
sends later what is left out now. Choices: differences of weights, not weights (of which a low rank is no model) nor
gradients; tensor by tensor; the mean is over rows; the rank is the user's rule.

What happens to a tensor: vectors, scalars and integers travel as they are; more than two dimensions are seen as first x
rest; where some rows are zero (embeddings of tokens that nobody met) only the others are factored, and their indices
sent; if factors would take no fewer bytes, if values are not finite (the server then says so) or if LAPACK gives up,
the tensor travels raw, and its meta says why (see `sent_raw`). Half precision is factored and sent in fp32.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.codecs import factor
from hocket.codecs.base import PLAIN, Codec, Parts, codec
from hocket.codecs.parts import declared, index, positions, shaped, wide
from hocket.combine import finite
from hocket.tree import Tree, generator, nbytes

SMALL = 256  # a matrix with fewer rows or columns is factored exactly: LAPACK takes milliseconds
RANK = 16


@dataclass(frozen=True, config=PLAIN)
class LowRank(Codec):
    """A matrix as factors. The rank is given, or follows from a share of energy or of bytes."""

    kind: ClassVar[type[factor.Kind]]
    differences = True

    rank: int | None = Field(default=None, ge=1, description=f"the rank; {RANK} if nothing else decides it")
    energy: float | None = Field(
        default=None, gt=0, le=1, description="the smallest rank that keeps this share of each matrix' squared norm"
    )
    bytes: float | None = Field(
        default=None, gt=0, le=1, description="the largest rank within this share of each matrix' bytes, at least 1"
    )
    algorithm: Literal["auto", "exact", "randomized"] = Field(
        default="auto",
        description="auto: randomized if rank + 10 is at most a quarter of both sides and these are >= 256",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> LowRank:
        given = [k for k in ("rank", "energy", "bytes") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both decide the rank; give one of rank, energy, bytes")
        return self

    def __str__(self) -> str:
        rule = next((f"{k}={v}" for k in ("energy", "bytes") if (v := getattr(self, k))), str(self.rank or RANK))
        return f"{self.name}({rule}{'' if self.algorithm == 'auto' else ',' + self.algorithm})"

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        if not _matrix(x):
            return {"": x}, None
        body, head = x.reshape(len(x), -1), {}
        if not x.is_meta:
            changed = (body != 0).any(1)
            rows = changed.nonzero().squeeze(1)
            head = {"rows": rows.to(index(len(x)))}
            if nbytes(head) + len(rows) * body[0].nbytes < body.nbytes:
                body = body[rows]
            else:
                head = {}
        try:
            parts = self._factored(name, body, self._budget(x) - nbytes(head))
        except _Raw as reason:
            return (head | {"": body}, declared(x)) if head else ({"": x}, {"raw": str(reason)})
        return head | parts, declared(x)

    def _factored(self, name: str, x: Tensor, budget: float) -> Parts:
        """The parts of a matrix. Raises `_Raw` with the reason if it is to be sent as it is."""
        m, n = x.shape
        trials = self._trials(m, n, x.dtype, budget)
        if not trials or (x.is_meta and self.energy):  # without values this energy may take them all
            raise _Raw("factors are no smaller")
        if x.is_meta:
            return self.kind.layout(m, n, trials[0][0], wide(x.dtype))
        peak = float(x.abs().amax())
        if not 1e-150 < peak < 1e150:  # nan too
            raise _Raw("values that are not finite, or whose squares are not")
        y = x.to(wide(x.dtype) if 1e-15 < peak < 1e15 else torch.float64)
        goal = self.energy and self.energy * float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2
        for k, sketched in trials:
            try:
                found = self.kind.factor(y, k, generator("lowrank", name, m, n) if sketched else None)
                r = k if goal is None else 1 + int((found.kept < goal).sum())
                if r > k:
                    continue
                parts = found.cut(r)
            except torch.linalg.LinAlgError as error:
                raise _Raw("LAPACK did not converge") from error
            parts = {k: v.to(wide(x.dtype)) if v.is_floating_point() else v for k, v in parts.items()}
            if all(finite(v) for v in parts.values()):
                return parts
            raise _Raw("factors are not finite")
        raise _Raw("factors that keep this energy are no smaller")

    def _budget(self, x: Tensor) -> float:
        return (self.bytes or 0) * x.nbytes

    def _trials(self, m: int, n: int, dtype: torch.dtype, budget: float) -> list[tuple[int, bool]]:
        """Ranks to try in turn, and whether by sketches; none if factors cannot be smaller than the matrix."""
        ranks, size = range(1, min(m, n) + 1), partial(self._size, m, n, dtype)
        cap = bisect_left(ranks, m * n * dtype.itemsize, key=size)
        sketched = partial(self._sketched, m, n)
        if self.energy:
            tries = [*takewhile(lambda k: k < cap and sketched(k), (RANK << i for i in count())), cap]
        elif self.bytes:
            tries = [max(1, bisect_right(ranks, budget, key=size))]
        else:
            tries = [self.rank or RANK]
        return [(k, sketched(k)) for k in tries if 0 < k <= cap]

    def _size(self, m: int, n: int, dtype: torch.dtype, r: int) -> int:
        return nbytes(self.kind.layout(m, n, r, wide(dtype)))

    def _sketched(self, m: int, n: int, k: int) -> bool:
        pays = min(m, n) >= max(SMALL, 4 * (k + factor.OVERSAMPLE))
        return pays if self.algorithm == "auto" else self.algorithm == "randomized"

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        if meta is None or "raw" in meta:
            return parts[""]
        shape, dtype = shaped(meta)
        m, n = shape[0], math.prod(shape[1:])
        rows = positions(parts["rows"], m) if "rows" in parts else None
        parts = {k: v for k, v in parts.items() if k != "rows"}
        k = m if rows is None else len(rows)
        if "" in parts:
            _same(parts, {"": torch.empty(k, n, dtype=dtype, device="meta")})
            body = parts[""]
        else:
            _same(parts, self.kind.layout(k, n, len(parts["l"]), wide(dtype)))
            body = self.kind.expand(parts).to(dtype)
        if rows is None:
            return body.reshape(shape)
        return body.new_zeros(m, n).index_copy_(0, rows, body).reshape(shape)

    def flops(self, name: str, x: Tensor) -> float:
        """Of all ranks that are tried, as if every row had changed: with `energy` this is the most it can take."""
        if not _matrix(x):
            return 0.0
        m, n = len(x), x[0].numel()
        return sum(self.kind.flops(m, n, *trial) for trial in self._trials(m, n, x.dtype, self._budget(x)))


class _Raw(Exception):
    """Why a matrix is sent as it is."""


def _matrix(x: Tensor) -> bool:
    return x.ndim > 1 and x.is_floating_point() and x.numel() > 0


def _same(parts: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Parts in the shapes and dtypes that the declared shape asks for, or `ValueError`."""
    found, wanted = ({k: (tuple(v.shape), v.dtype) for k, v in tree.items()} for tree in (parts, expected))
    if found != wanted:
        raise ValueError(f"parts are {found}, expected {wanted}")


@codec("svd")
@dataclass(frozen=True, config=PLAIN)
class Svd(LowRank):
    """Truncated singular value decomposition: no r(m+n) numbers come closer by rank."""

    kind = factor.SVD


@codec("pca")
@dataclass(frozen=True, config=PLAIN)
class Pca(LowRank):
    """Principal components: the mean row, and the SVD of what it leaves."""

    kind = factor.PCA


@codec("qrcp")
@dataclass(frozen=True, config=PLAIN)
class Qrcp(LowRank):
    """QR with column pivoting."""

    kind = factor.QRCP


@codec("cur")
@dataclass(frozen=True, config=PLAIN)
class Cur(LowRank):
    """Columns and rows of the update itself. Between them stands an inverse: do not chain it with int8 or half, which
    ruin it where singular values fall steeply."""

    kind = factor.CUR
