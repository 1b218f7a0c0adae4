"""What methods for clients of unequal ranks share: the server's factors and how clients' views are cut from them.

The server keeps D = B A of rank R with the scale inside (s = 1): `lora_A` (R x in), `lora_B` (out x R), components in
the order in which clients get them. Client i of rank r_i gets and trains

    A_i = A[:r_i],   B_i = B[:, :r_i] / s_i,   s_i = alpha / r_i      so that s_i B_i A_i is the cut of D,

and sends differences of both; the server reads them as its model M_i = s_i (B_i + dB_i)(A_i + dA_i). So nothing is ever
averaged without its scale. Ranks are read off the shapes that arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import Lazy, finite
from hocket.methods.base import PLAIN, Client, State, Update
from hocket.methods.lora import A, B, LoRA, modules
from hocket.tree import Tree


@dataclass(frozen=True, config=PLAIN)
class Unequal(LoRA):
    """LoRA for clients of unequal ranks."""

    unequal: ClassVar[bool] = True
    increments: ClassVar[bool] = False  # a client's coordinates are others in every version
    anchored: ClassVar[bool] = True

    @property
    def additive(self) -> bool:
        return False

    @property
    def not_additive(self) -> str:
        return (
            f"'{self.name}' cuts every client's factors anew in each version; use schedule 'sync' or one without turns"
        )

    def init(self, params: Tree, seed: int) -> State:
        scaled = {m + B: params[m + B] * self.scale(m, len(params[m + A])) for m in modules(params)}
        return super().init(params | scaled, seed)

    def stored(self, module: str) -> float:
        return 1.0

    def send(self, state: State, client: Client, version: int) -> Tree:
        return self._cut(state["params"], lambda m: self.own_rank(m, client.traits))

    def own_rank(self, module: str, traits: Mapping[str, Any]) -> int:
        """Rank of a module's factors at a client to begin with."""
        top = self.rank_of(module)
        return min(traits.get("rank") or top, top)

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        view = self.send(state, client, version)  # cut anew each time, also from what the client holds already
        return {k: v for k, v in view.items() if changed.get(k, 0) > since or since < 0}

    def export(self, state: State) -> Tree:
        return self._cut(state["params"], lambda m: None)

    def _cut(self, params: Tree, rank: Callable[[str], int | None]) -> Tree:
        """The view with that rank in each module, none for all of it."""
        view = dict(params)
        for m in modules(params):
            a, b = params[m + A][: rank(m)], params[m + B][:, : rank(m)]
            view[m + A], view[m + B] = a, b / self.scale(m, len(a))
        return view

    def check(self, state: State, update: Update) -> str | None:
        """Ranks differ from client to client, none is above its client's; everything else is as the state has it."""
        params, sent = state["params"], update.payload
        for m in modules(sent):
            if m + A not in params:
                return f"unknown tensor '{m}{A if m + A in sent else B}'"
            a, b = sent.get(m + A), sent.get(m + B)
            inner, out, top = params[m + A].shape[1], params[m + B].shape[0], self.own_rank(m, update.traits)
            shapes = [tuple(x.shape) for x in (b, a) if x is not None]
            rank = next(iter(shapes[-1] if a is not None else shapes[0][::-1]), 0)
            fits = (a is None or a.shape == (rank, inner)) and (b is None or b.shape == (out, rank))
            if not (fits and 0 < rank <= top):
                return f"'{m}' has factors of shapes {shapes}, expected ({out}, r) and (r, {inner}) with r up to {top}"
            if any(x is not None and not finite(x) for x in (a, b)):
                return f"'{m}' holds values that are not finite"
        rest = {k: sent[k] for k in sent if not k.endswith((A, B))}
        return super().check(state, Update(update.job, update.client, update.version, update.turn, rest))

    def accept(self, then: Tree, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Model(self, then, payload)


class Model(Lazy):
    """A client's model as the server reads its upload: factors with s = 1 (a factor that did not come is as it was),
    and the differences of all else.

    Attributes:
        then: the server's parameters in the version the client started from.
    """

    def __init__(self, method: LoRA, then: Tree, payload: Mapping[str, Tensor]) -> None:
        self.then, self._payload = then, payload
        factors = {m + x: m for m in modules(payload) for x in (A, B)}

        def make(k: str) -> Tensor:
            if k not in factors:
                return payload[k]
            m, a = factors[k], k.endswith(A)
            rank = self.rank(m)
            start = then[k][:rank] if a else then[k][:, :rank]
            moved = payload.get(k)
            return start if moved is None else start + moved * (1 if a else method.scale(m, rank))

        super().__init__([*factors, *(k for k in payload if k not in factors)], make)

    def rank(self, module: str) -> int:
        """The client's rank in `module`."""
        a = module + A in self._payload
        return self._payload[module + A].shape[0] if a else self._payload[module + B].shape[1]
