"""FedAvg, full fine-tuning: every parameter moves and travels.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
https://arxiv.org/abs/1602.05629. With FedProx and the adaptive server optimizers as options (`Method`).

    theta <- theta + eta sum_i p_i Delta_i,   Delta_i = theta_i,end - theta_i,start

Bytes a round and client: d * s_c down, d * s_c up (d parameters, s_c bytes a number; 4 with `raw`).
Exact: one local step of SGD on the full batch equals one step of centralized gradient descent.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, Method, method


@method("fedavg")
@dataclass(frozen=True, config=PLAIN)
class FedAvg(Method):
    """Full-parameter federated averaging (with FedProx and server optimizers as options)."""
