"""GradualDiff-Fed: FedAvg of full weights in which the server sends differences of its model, not the model.

"GradualDiff-Fed: A Federated Learning Specialized Framework for Large Language Model", https://arxiv.org/abs/2506.19164.
A reconstruction: only that paper's abstract was at hand. It says that weight differences travel instead of weights;
what a difference is, how it is coded, and what becomes of who missed some, is decided here.

    client:    theta_i <- theta_{v-1} and what has come;  trains;  sends Delta_i = theta_i,end - theta_i,start
    xor:       theta_v = theta_{v-1} + eta sum_i p_i Delta_i;                D_v = bits(theta_v) XOR bits(theta_{v-1})
    float:     D_v = C(eta sum_i p_i Delta_i + e_{v-1}),  e_v = eta sum_i p_i Delta_i + e_{v-1} - D_v;
               theta_v = theta_{v-1} + D_v              C: as it is, in bf16, or the largest entries alone
    everyone:  theta_v from theta_{v-1} and D_v by the same operations; with D_v comes a 128-bit checksum of theta_v

Bytes a round and client: up d s_c; down d s_w as xor (s_w = 4: the server holds fp32), 4 d as float, 2 d with
`precision = "half"`, and of `share` s of the entries s d (4 or 2, and 1 to 4 for where it is). So nothing is saved
against FedAvg before a codec: `codec.down = "zstd"` makes d s_w less (docs/methods-seeds.md has what was measured).
Who missed versions gets, as xor, one set of differences for all of them (XOR composes), if the server still has them:
it keeps those of the last `log` versions, d s_w bytes each. Float differences cannot be summed to the same bits, so
each missed one is sent; the server keeps only as many as cost no more than the weights. Others get changed weights.
Client memory: as FedAvg. The server also keeps e, one fp32 copy, if C loses something.
Exact: xor is FedAvg to the bit, and so is float with `server_lr = 1` (D_v is then what FedAvg adds; schedules that set
rates round the last bit otherwise); with any C all clients have the server's model to the bit, on any device, for they
only add. Approximate: the server's model under a lossy C; sum_v D_v + e_v = sum_v of the mean steps. A lossy codec.down
is refused: clients would drift from the server, and the checksum say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.codecs.parts import index
from hocket.combine import mean, wide
from hocket.errors import HocketError
from hocket.methods.base import PLAIN, Client, Method, State, Update, method
from hocket.methods.replay import Replay, without
from hocket.tree import Tree, digest, nbytes

AT = "#at"
"""Positions of a tensor's entries that are sent, where it is not sent whole."""
SUM = "#sum"
"""The checksum of a version."""
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@method("gradualdiff")
@dataclass(frozen=True, config=PLAIN)
class GradualDiff(Replay):
    """Full-parameter federated averaging that sends differences of the model, with a checksum a version."""

    difference: Literal["xor", "float"] = Field(
        default="xor", description="which bits changed (exact; shorter by codec.down = 'zstd'), or the numbers added"
    )
    precision: Literal["exact", "half"] = Field(
        default="exact", description="half: float differences in bf16; what is lost is added to the next one"
    )
    share: float = Field(
        default=1.0, gt=0, le=1, description="share of each tensor's entries in a float difference; the rest waits"
    )
    log: int = Field(
        default=4, ge=1, description="versions whose xor differences the server keeps, a copy of the model each"
    )

    verbatim: ClassVar[str] = (
        "every client's model must be the server's to the bit; use 'raw' or 'zstd', and method.difference = 'float' "
        "with method.precision or method.share to send less"
    )

    @model_validator(mode="after")
    def _one_way(self) -> GradualDiff:
        if self.lossy and self.difference == "xor":
            field = "precision = 'half'" if self.precision == "half" else f"share = {self.share}"
            raise ValueError(f"{field}: an XOR of bits cannot be rounded; use difference = 'float'")
        return self

    @property
    def lossy(self) -> bool:
        """Whether a difference is less than the step it stands for."""
        return self.precision == "half" or self.share < 1

    def covers(self, name: str) -> bool:
        return True

    def init(self, params: Tree, seed: int) -> State:
        return super().init(params, seed) | {"residual": {}, "sum": checksum(params)}

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        old = state["params"]
        if self.difference == "xor":
            after = super().step(state, updates, weights, shares)
            new = after["params"]
            news = {k: bits(new[k]) ^ bits(old[k]) for k in sorted(new) if new[k] is not old[k]}
            return self.told(state, after | {"params": old}, news)
        slots, residual, news = dict(state["slots"]), dict(state["residual"]), {}
        for k, delta in mean([u.payload for u in updates], weights, shares):
            if self.server_optimizer == "sgd":
                move = delta.mul_(self.server_lr)
            else:
                move, slots[k] = self._server_step(delta, slots.get(k, {}))
            move = move + residual[k] if k in residual else move
            news |= (sent := self._shortened(k, move))
            if self.lossy:
                residual[k] = added(move, sent, k, -1)
        return self.told(state, state | {"slots": slots, "residual": residual}, news)

    def _shortened(self, name: str, move: Tensor) -> Tree:
        """C(move): all of it or, where that is less, its largest entries and where they are."""
        short = move.to(torch.bfloat16) if self.precision == "half" else move
        kept = max(1, int(self.share * move.numel()))
        where = index(move.numel())
        if kept * (short.element_size() + where.itemsize) >= short.nbytes:
            return {name: short}
        at = move.reshape(-1).abs().topk(kept, sorted=False).indices.sort().values
        return {name: short.reshape(-1)[at], name + AT: at.to(where)}

    def told(self, before: State, after: State, news: Tree) -> State:
        after = super().told(before, after, news)
        if self.difference == "xor":  # all that are kept cost one set to send: memory is the limit, not bytes
            log = before["news"] | {str(after["version"]): news}
            after["news"] = {v: log[v] for v in sorted(log, key=int)[-self.log :]}
        return after | {"last": {}, "sum": checksum(after["params"])}

    def apply(self, held: Tree, news: Mapping[str, Tensor]) -> Tree:
        out = dict(held)
        for k in sorted(k for k in news if not k.endswith(AT)):
            if self.difference == "xor":
                out[k] = (bits(held[k]) ^ news[k].to(held[k].device)).view(held[k].dtype)
            else:
                out[k] = added(held[k], news, k)
        return out

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        dense = Method.ship(self, state, client, version, since, changed)
        if since == version:
            return dense
        seal = {f"{version}/{SUM}": state["sum"]}
        missed = [str(v) for v in range(max(since, 0) + 1, version + 1)]
        if since < 0 or any(v not in state["news"] for v in missed):
            return dense | seal
        log = [state["news"][v] for v in missed]
        if self.difference == "xor":
            news = {f"{version}/{k}": x for k, x in composed(log).items()}
        else:
            news = {f"{v}/{k}": x for v, step in zip(missed, log, strict=True) for k, x in step.items()}
        return (news if nbytes(news) <= nbytes(dense) else dense) | seal

    def load(self, held: Tree, payload: Mapping[str, Tensor]) -> Tree:
        """The next version of what is held. Raises `HocketError` if it is not the server's to the bit."""
        seals = [k for k in payload if k.endswith("/" + SUM)]
        out = super().load(held, without(payload, seals))
        for k in seals:
            if not torch.equal(checksum(out), payload[k].cpu()):
                raise HocketError(
                    f"version {k.partition('/')[0]}: this client's model is not the server's, its checksum differs; "
                    "what it held before had changed: drop it and fetch the whole model"
                )
        return out


def bits(x: Tensor) -> Tensor:
    """The same memory as integers."""
    return x.view(INTS[x.element_size()])


def composed(log: Sequence[Tree]) -> Tree:
    """One set of XOR differences that does what these do one after the other."""
    names = sorted({k for news in log for k in news})
    return {k: reduce(torch.bitwise_xor, [news[k] for news in log if k in news]) for k in names}


def added(x: Tensor, news: Mapping[str, Tensor], name: str, factor: float = 1) -> Tensor:
    """x plus `factor` times what the news say of the tensor `name`, as a new tensor; half precision is rounded once."""
    old = wide(x)
    move = news[name].to(old)
    if name + AT in news:
        at = news[name + AT].to(x.device).long()
        return old.reshape(-1).index_add(0, at, move, alpha=factor).reshape(x.shape).to(x.dtype)
    return torch.add(old, move, alpha=factor).to(x.dtype)


def checksum(params: Mapping[str, Tensor]) -> Tensor:
    """128 bits of names, shapes, dtypes and values, as 16 bytes."""
    if any(x.is_meta for x in params.values()):
        return torch.empty(16, dtype=torch.uint8, device="meta")
    return torch.tensor(list(bytes.fromhex(digest(params))), dtype=torch.uint8)
