"""What a site says of itself and of its updates, before anything is done with it: a site may be broken or lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor

from hocket.errors import WireError

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
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: not a finite number")
    return float(value)


def _whole(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 62:
        raise ValueError(f"{name}: not a whole number")
    return value


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
        norm = math.sqrt(sum(float(payload[k].double().norm()) ** 2 for k in sorted(payload)))
        if len(self.seen) >= FEW and norm > self.factor * median(self.seen):
            raise WireError(f"norm {norm:.3g} is over {self.factor:g} times the median {median(self.seen):.3g}")
        return norm

    def accept(self, norm: float) -> None:
        """Remember the norm of an update that counted."""
        if self.factor is not None:
            self.seen = [*self.seen, norm][-RECENT:]
