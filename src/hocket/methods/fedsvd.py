"""FedSVD: FFA-LoRA whose frozen A is renewed every round by decomposing B A.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", 2025,
https://arxiv.org/abs/2505.12805; checked against the authors' code.

    clients train and send B alone;   B A = U S V^T with the mean B;   A <- V^T,  B <- U S

Bytes a round and client: up s_c sum_m r out_m, down s_c sum_m r (in_m + out_m). Exact: the mean, as in FFA-LoRA, and
the decomposition at rank r. The rows of every A lie in the span of the first one's: it is FFA-LoRA with an orthonormal
A in good order, and its capacity is that of the random A it begins with. So B's of any version are summed as
coordinates of that span, and directions that have no singular value yet lie in it too; a server optimizer leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import products
from hocket.methods.base import PLAIN, Local, State, Update, method
from hocket.methods.effective import Effective
from hocket.methods.lora import A
from hocket.methods.unequal import Model
from hocket.products import Product
from hocket.tree import Tree


@method("fedsvd")
@dataclass(frozen=True, config=PLAIN)
class FedSVD(Effective):
    """FFA-LoRA with A made orthonormal anew every round."""

    split: Literal["B"] = Field(default="B", description="the singular values go on B, so that A is orthonormal")

    def trains(self, local: Local) -> Callable[[str], bool]:
        return lambda name: not name.endswith(A)

    def check(self, state: State, update: Update) -> str | None:
        for k in update.payload:
            if k.endswith(A):
                return f"'{k}' is not a client's to change"
        return super().check(state, update)

    def started(self, m: str, model: Model) -> int:
        return model.rank(m)

    def _factors(
        self, m: str, terms: Sequence[Product], params: Tree, seed: int, version: int
    ) -> tuple[Tensor, Tensor]:
        if self.server_optimizer == "sgd":  # what is summed lies in A's span: so do directions without a singular value
            (b, rows), a = products.stack(terms), params[m + A]
            terms = [(b @ (rows.double() @ torch.linalg.pinv(a.double())).to(b), a)]
        return super()._factors(m, terms, params, seed, version)
