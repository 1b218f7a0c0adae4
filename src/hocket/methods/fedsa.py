"""FedSA-LoRA: clients share A alone; each keeps a B, and a new head, of its own.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
https://arxiv.org/abs/2410.01463 (after its code, Pengxin-Guo/FedSA-LoRA).

    client i:  W_i = W_0 + s B_i A;   moves A, B_i and its head;   sends the change of A
    server:    A <- sum_i p_i A_i                                          B_i, head_i stay, and never are on the wire

Bytes a round and client, each way: s_c sum_m r in_m. Client memory: B_i and head_i, from job to job.
Exact: the mean of A; with frozen equal B_i also that of the products. There is no global model: what counts is each
client's own, on its own held-out rows, and such a score compares to other methods' models on these rows only. A client
that never trained has the start model's B = 0 and head. While B_i = 0 no gradient reaches A, so a client's very first
step moves B_i and the head alone. An update that is lost takes its change of A with it; what it did to B_i stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.methods.base import PLAIN, Local, State, Update, method
from hocket.methods.lora import A, LoRA
from hocket.tree import Tree

OWN = "personal/"
"""Of a client's own tensors in its memory."""


@method("fedsa-lora")
@dataclass(frozen=True, config=PLAIN)
class FedSALoRA(LoRA):
    """LoRA with a common A, and B and head personal: half the bytes, and a model for each client."""

    personal: ClassVar[bool] = True

    def train(self, local: Local, start: Tree) -> Tree:
        begin = self.personalized(start, local.memory)
        delta = local.fit(begin, self.trains(local), self.mu)
        local.memory.update({OWN + k: begin[k] + d for k, d in delta.items() if not k.endswith(A)})
        return {k: d for k, d in delta.items() if k.endswith(A)}

    def personalized(self, view: Tree, memory: Mapping[str, Tensor]) -> Tree:
        return view | {k: memory[OWN + k] for k in view if OWN + k in memory}

    def check(self, state: State, update: Update) -> str | None:
        for k in update.payload:
            if not k.endswith(A):
                return f"'{k}' is its client's own and not to be shared"
        return super().check(state, update)

    def layers(
        self, before: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float], after: State
    ) -> dict[str, dict[str, float]]:
        """Nothing: what clients' products are, the server does not know."""
        return {}
