"""FedFa: the server's model is always that of the last Q results; every arrival makes a version and nobody waits.

Xu et al., "FedFa: A Fully Asynchronous Training Paradigm for Federated Learning", IJCAI 2024,
https://arxiv.org/abs/2404.11015 (from the abstract and three independent re-implementations; the exact rule of the
delta form was not found, so both readings are offered).

    on an arrival: push it, evict the oldest of Q, then
    model:  theta = mean of the window's client models  <=>  theta <- theta + (w_new - w_evicted) / Q
    delta:  theta <- theta + eta c sum_{window} Delta / Q     (each Delta acts Q times; c = 1 or 1/Q: in all 1 or 1/Q)
    start:  wait for Q arrivals, then step on each;  or a window filled with the start model

No staleness weight. A tensor's window holds the last Q results that have it, where clients send parts of the model; a
first window that was waited for lies in the order of its jobs.
Bytes an arrival: the method's. Server memory: Q packets; in the model form also the versions they started from.
Exact: Q = N with equal speeds: the first full window is FedAvg's round; Q = 1 in the model form is FedAsync with
alpha = 1. It is biased toward fast clients, who have more of the window (see `ca2fl`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import Lazy
from hocket.methods import Update
from hocket.schedules.asynchronous import Async
from hocket.schedules.base import PLAIN, Term, schedule

if TYPE_CHECKING:
    from hocket.server import Server


@schedule("fedfa")
@dataclass(frozen=True, config=PLAIN)
class FedFa(Async):
    """A step on every arrival, with a window of the last results."""

    window: int = Field(default=4, ge=1, description="results Q in the window")
    form: Literal["delta", "model"] = Field(default="delta", description="what the window is of")
    total_weight: Literal["1", "1/Q"] = Field(
        default="1/Q", description="what a difference comes to over its Q steps (delta form)"
    )
    start: Literal["wait", "fill"] = Field(
        default="fill", description="wait for a full window, or begin with one full of the start model"
    )

    @property
    def anchored(self) -> bool:
        return self.form == "model"

    @property
    def recalls(self) -> bool:
        return self.form == "model" and self.start == "fill"

    def ready(self, server: Server) -> bool:
        waiting = self.start == "wait" and not server.kept
        return len(server.buffer) >= (self.window if waiting else 1)

    def takes(self, server: Server) -> list[Update]:
        return super().takes(server)[: self.window if self.start == "wait" and not server.kept else 1]

    def terms(self, server: Server, batch: list[Update]) -> list[Term]:
        names = {k for u in batch for k in self._tree(server, u)}  # other tensors' windows did not move
        factor = 1 / self.window if self.form == "delta" and self.total_weight == "1/Q" else 1.0
        held: Counter[str] = Counter()
        terms = []
        for u, live in self._window(server, batch):
            mine = [k for k in live if k in names]
            held.update(mine)
            part = replace(u, payload=Lazy(mine, self._tree(server, u).__getitem__))
            terms.append(Term(server.against(part) if self.anchored else part, factor * u.weight, u.weight))
        if self.start == "fill":
            for count in sorted({self.window - held[k] for k in names} - {0}):
                rest = [k for k in names if self.window - held[k] == count]
                weight = count * sum(u.weight for u in [*server.kept, *batch]) / (len(server.kept) + len(batch))
                zero = Lazy(rest, lambda k: torch.zeros_like(server.model[k]))
                blank = server.difference(rest, server.method.prelude) if self.anchored else zero
                terms.append(Term(replace(batch[0], payload=blank), weight, weight))
        return terms

    def remember(self, server: Server, batch: list[Update]) -> list[Update]:
        return [u for u, _ in self._window(server, batch)]

    def pins(self, server: Server) -> set[int]:
        held = Counter(k for _, live in self._window(server, []) for k in live)
        moved = (k for k in server.changed if server.state["params"][k].is_floating_point())
        short = self.anchored and self.start == "fill" and any(held[k] < self.window for k in moved)
        return {server.method.prelude} if short else set()

    def _tree(self, server: Server, update: Update) -> Mapping[str, Tensor]:
        method, sent = server.method, update.payload
        # a window of tensors: what can be read only as a whole, or is of no tensor of the model, is its effect
        whole = self.anchored or method.anchored or any(k not in server.state["params"] for k in sent)
        return method.effect(sent) if whole else sent

    def _window(self, server: Server, batch: list[Update]) -> list[tuple[Update, list[str]]]:
        """Updates with those of their tensors of which they are among the last `window`, oldest first."""
        newer: Counter[str] = Counter()
        window = []
        for u in reversed([*server.kept, *batch]):
            if mine := [k for k in self._tree(server, u) if newer[k] < self.window]:
                window.append((u, mine))
            newer.update(mine)
        return window[::-1]
