"""raFLoRA: each range of components is averaged over the clients that have it.

"raFLoRA", 2026, https://arxiv.org/abs/2602.13486 (abstract and a third party's implementation read: the equations are
firm, constants are not known).

    component h:  sum_{i: r_i >= h} p_i s_i B_i[:, h] A_i[h] / q_h,   q_h = sum_{i: r_i >= h} p_i;   then an SVD

so that no component fades. A component that nobody of a round has stays as it was. High ones rest on few clients. A
stale client, to whom a schedule gives a weight w_i below its share s_i, counts w_i / sum_{j: r_j >= h} s_j in component
h; those of others do not slow down with it.
Bytes a round and client, each way: s_c sum_m r_i (in_m + out_m).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.methods.base import PLAIN, method
from hocket.methods.effective import Effective
from hocket.methods.unequal import Model


@method("raflora")
@dataclass(frozen=True, config=PLAIN)
class RaFLoRA(Effective):
    """LoRA of unequal ranks: every component is averaged over those that have it."""

    def started(self, m: str, model: Model) -> int:
        return model.rank(m)

    def columns(
        self, m: str, models: Sequence[Model], weights: Sequence[float], shares: Sequence[float]
    ) -> list[Tensor]:
        having = torch.zeros(max(x.rank(m) for x in models), dtype=torch.float64)
        for x, s in zip(models, shares, strict=True):
            having[: x.rank(m)] += s
        having[having == 0] = torch.inf  # those who have it count for nothing: it stays
        return [w / having[: x.rank(m)] for x, w in zip(models, weights, strict=True)]
