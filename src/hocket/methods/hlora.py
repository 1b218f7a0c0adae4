"""HLoRA: reconstruct products, average them, decompose, and give each client a cut of its rank; HLoRA-Delta keeps what
a client did not hold.

Qianli Liu et al., "HLoRA: Efficient Federated Learning System for LLM Heterogeneous Fine-Tuning", 2025,
https://arxiv.org/abs/2503.00813. Only its abstract, its aggregation formula and a third party's implementation could be
read, so this is a reconstruction: where the singular values go (`split`) and the server's rank are not known.

    client i:      T_i = trunc_{r_i}(D), trained to s_i B_i A_i
    HLoRA:         D <- trunc_R(sum_i p_i s_i B_i A_i)               = trunc_R(D + sum_i p_i (s_i B_i A_i - D))
    HLoRA-Delta:   D <- trunc_R(D + sum_i p_i (s_i B_i A_i - T_i))

A component that only clients of large rank hold counts as zero in the others' models, so HLoRA multiplies component h
by q_h = sum_{i: r_i >= h} p_i in every round, whatever training does: with no training at all sigma_h(t) = q_h^t
sigma_h(0). HLoRA-Delta (not published; made here) takes a client's update to what that client was sent, which the
server knows: no bytes more, and with no training D stays.

Bytes a round and client, each way: s_c sum_m r_i (in_m + out_m). Server memory: R (in_m + out_m), and as much for each
version that clients still work on. Exact: the average of products, up to rank R; sum_i r_i >= R + 1 loses the tail.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, method
from hocket.methods.effective import Effective
from hocket.methods.lora import A
from hocket.methods.unequal import Model


@method("hlora")
@dataclass(frozen=True, config=PLAIN)
class HLoRA(Effective):
    """LoRA of unequal ranks: products are averaged and decomposed anew (reconstruction)."""

    def started(self, m: str, model: Model) -> int:
        return len(model.then[m + A])


@method("hlora-delta")
@dataclass(frozen=True, config=PLAIN)
class HLoRADelta(Effective):
    """HLoRA whose clients count for what they changed, so that no direction fades."""

    def started(self, m: str, model: Model) -> int:
        return model.rank(m)
