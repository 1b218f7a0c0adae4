"""What a site says of itself and of its updates, before anything is done with it: a site may be broken or lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hocket.client import Weighting
from hocket.errors import WireError
from hocket.sections import Training

RECENT = 64  # updates whose norms are looked back on
FEW = 3  # updates before which no norm is called large


def told(found: Any) -> dict[str, Any]:
    """What is told beside an upload (see `hocket.deploy.nouns.Answered`), with every number finite.

    Raises:
        ValueError: something is missing or is of another kind.
    """
    if not isinstance(found, Mapping):
        raise ValueError("what is told beside it is no JSON object")
    whole = {k: _whole(found, k) for k in ("client", "version", "turn", "visit")}
    seconds = {k: max(0.0, _number(found, k, 0.0)) for k in ("waited", "computed", "kept")}
    metrics = found.get("metrics", {})
    if not isinstance(metrics, Mapping) or len(metrics) > 1000:
        raise ValueError("metrics: not numbers by name")
    numbers = {str(k)[:100]: _number(metrics, k) for k in metrics}
    counts = {k: _whole(found, k) for k in ("raw", "beside", "after") if found.get(k) is not None}
    return {**whole, **seconds, **counts, "weight": _number(found, "weight"), "metrics": numbers}


def hello(found: Mapping[str, Any]) -> dict[str, int]:
    """What a site says of itself when it has opened a run: `rows` and `version`. Raises `ValueError`."""
    said = {k: _whole(found, k) for k in ("rows", "version") if k in found}
    if said.get("rows", 1) < 1:
        raise ValueError(f"rows: {said['rows']}; a site has at least one")
    return said


def _number(found: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = found.get(name, default)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # JSON's whole numbers have no bounds
        pass
    raise ValueError(f"{name}: not a finite number")


def _whole(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 62:
        raise ValueError(f"{name}: not a whole number")
    return value


class Fitting(Mapping[str, Tensor]):
    """An upload whose float64 tensors are looked at when they are asked for: a finite one may be none in the tensor
    that it is added to, or where there is none of its name, in fp32. Asking raises `WireError` then."""

    def __init__(self, payload: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        self.payload = payload
        self.dtypes = {k: v.dtype for k, v in params.items()}

    def __getitem__(self, name: str) -> Tensor:
        x, dtype = self.payload[name], self.dtypes.get(name, torch.float32)
        if x.dtype == torch.float64 != dtype and dtype.is_floating_point and x.numel():
            largest = float(x.abs().max())
            if largest > torch.finfo(dtype).max:  # what is no number is the method's to refuse
                raise WireError(f"tensor '{name}' holds {largest:.3g}, more than {dtype} can")
        return x

    def __contains__(self, name: object) -> bool:
        return name in self.payload

    def __iter__(self) -> Iterator[str]:
        return iter(self.payload)

    def __len__(self) -> int:
        return len(self.payload)


@dataclass(frozen=True)
class Weights:
    """What updates weigh, as the recipe has it: a site's word counts only for what the server cannot know, up to what
    one job can come to.

    Attributes:
        weighting: of the recipe; rows are those that the site said it has when it joined.
        training: of the recipe; max_length: tokens of a row, of which each may be a label.
    """

    weighting: Weighting
    training: Training
    max_length: int

    def look(self, told: float, rows: int) -> float:
        """The weight of an update of a site with that many rows. Raises `WireError` if too large a one is told."""
        if self.weighting in ("uniform", "rows"):
            return 1.0 if self.weighting == "uniform" else float(rows)
        c = self.training
        most = c.steps(rows) * c.accumulation * min(c.batch_size, rows)
        most *= self.max_length if self.weighting == "tokens" else 1
        if told > most:
            raise WireError(f"weight {told:g}: a job of a site with {rows} rows has at most {most} {self.weighting}")
        return told


class Norms:
    """Refuses updates much longer than those before.

    Args:
        factor: an update may be at most this many times as long as the median of the last 64 accepted; none: no limit.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.seen: list[float] = []

    def look(self, payload: Mapping[str, Tensor]) -> float:
        """The update's 2-norm over all its tensors. Raises `WireError` if it is too large."""
        if self.factor is None:
            return 0.0
        norm = math.hypot(*(float(payload[k].double().norm()) for k in sorted(payload)))
        if not math.isfinite(norm):
            raise WireError("its norm is not finite")
        if len(self.seen) >= FEW and norm > self.factor * median(self.seen):
            raise WireError(f"norm {norm:.3g} is over {self.factor:g} times the median {median(self.seen):.3g}")
        return norm

    def accept(self, norm: float) -> None:
        """Remember the norm of an update that counted."""
        if self.factor is not None:
            self.seen = [*self.seen, norm][-RECENT:]
