"""FedPEFT: clients train, send and average a small part of the model, or small parts added to it; the rest is frozen.

Sun et al., "Exploring Parameter-Efficient Fine-tuning for Improving Communication Efficiency in Federated Learning",
2022, https://arxiv.org/abs/2210.01708. Its four cases are head, bias, adapter and prompt, on vision transformers; here
`fedpeft-bias` is the second (Ben Zaken et al., https://arxiv.org/abs/2106.10199) and `fedpeft` takes peft's kinds of
adapter by name, in place of the third.

    client i:  minimizes f_i(phi; theta_0) over phi alone      server:  phi <- phi + eta sum_i p_i (phi_i - phi)

    fedpeft-bias:  phi are all biases, and a new head        fedpeft:  phi is what peft makes trainable, and a new head

Bytes a round and client, each way: s_c |phi|. Client memory: frozen weights + 16 |phi|. What is random in an adapter,
trained or frozen, is drawn from the run's seed and never travels.
Exact: the mean of phi; that of the adapted weights where each is linear in phi (beft, ia3, ln_tuning, c3a, fourierft,
waveft). Elsewhere (loha, lokr, vera, hira) factors are averaged one by one, as in FedIT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hocket.methods.base import PLAIN, Method, method

HEAD = re.compile(r"(?:^|\.)(?:(?:pre_)?classifier|score)\.")
"""A head that transformers draws anew for a classification."""


@dataclass(frozen=True, config=PLAIN)
class Part(Method):
    """A method that moves a small part of the model, and a new head."""

    def beside(self, names: Iterable[str]) -> list[str]:
        return [k for k in names if HEAD.search(k)]


@method("fedpeft-bias")
@dataclass(frozen=True, config=PLAIN)
class FedPEFTBias(Part):
    """Federated averaging of the biases, and of a new head."""

    view: ClassVar[Literal["full", "blocks", "lora", "biases", "adapter"]] = "biases"


@method("fedpeft")
@dataclass(frozen=True, config=PLAIN)
class FedPEFT(Part):
    """Federated averaging of any adapter that peft has under a name, and of a new head."""

    adapter: str = Field(default="ia3", description="peft's name of it: ia3, ln_tuning, loha, lokr, vera, oft, ...")
    options: dict[str, Any] = Field(default_factory=dict, description="fields of its peft config, as target_modules")

    view: ClassVar[Literal["full", "blocks", "lora", "biases", "adapter"]] = "adapter"
