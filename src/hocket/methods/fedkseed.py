"""FedKSeed: all parameters, tuned by two losses a step; what travels are scalars of K directions known to everybody.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes", ICML 2024, https://arxiv.org/abs/2312.06353.

    client i, each step:  k ~ uniform in 1..K;   g = (f(theta + eps z_k) - f(theta - eps z_k)) / 2 eps
                          theta <- theta - eta g z_k;   sends (k, g)
    server:               A_k <- A_k + sum_i p_i sum over i's steps of eta g;   sends A
    everyone:             theta <- theta - sum_k (A_k now - A_k held) z_k       (over the k that changed)

z_k is a standard normal vector that derives from (run, k, tensor's name), see `hocket.directions`.
Bytes a round and client: down 4 K; up 6 a step (8 if K > 32768) and 4 for eta. Dense weights travel to clients that
hold nothing, and after steps that are not sums of scalars (a server optimizer, schedules that mix models).
Client memory: weights + the activations of inference + z of the largest tensor (`keep`); no gradients, no state.
A rebuild costs as many draws of d numbers as directions changed: at most min(K, steps of all updates), at most K
however many versions were missed.
Exact: holders of consecutive versions have the same bits, as the server; in exact arithmetic the server's step is the
mean of the clients' models, and dropped steps are in neither. Rounded: the walk theta + eps z, - 2 eps z, back, in the
model's precision (half precision loses small steps on the client, not in what is sent); versions that are caught up
with at once. Approximate: g z, of which E|g z|^2 = (d + 2) |grad f|^2, so that eta must shrink like 1/d.
theta - theta_0 stays in the span of K vectors for ever.
Published code: copies the server's model to clients instead of rebuilding it; leaves a client's weights at -eps z where
it drops a step; z depends on the device and on the order of tensors; eta enters after summing, so a rate that changes
breaks the rebuild (it refuses one; here A holds eta g, and rates are constant as in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.combine import Lazy, finite, wide
from hocket.directions import Directions
from hocket.methods.base import PLAIN, Client, Local, Method, State, Update, method
from hocket.tree import Tree, generator, key, nbytes

SEED, SUMS, CHANCES = "kseed.seed", "kseed.sums", "kseed.chances"
"""In the state: what directions derive from, A, and how likely each k is (FedKSeed-Pro)."""
OWN = (SEED, SUMS, CHANCES)
STEPS, SCALARS = "kseed.k", "kseed.g"
"""An upload: k of each step, and at the end the bits of eta in fp32, an integer because codecs leave integers alone;
and the steps' g."""


class Walked(Lazy):
    """An upload, as the difference that it stands for: -sum eta g z_k, tensor by tensor.

    Attributes:
        k, g: of its steps.
        moves: eta g.
    """

    def __init__(self, params: Mapping[str, Tensor], payload: Mapping[str, Tensor]) -> None:
        self.k, eta, self.g = _read(payload)
        self.moves = eta * self.g.double()
        like = {name: (x.shape, wide(x).dtype, x.device) for name, x in _theta(params).items()}  # keep no values
        z = Directions(int(params[SEED]))

        def make(name: str) -> Tensor:
            shape, dtype, device = like[name]
            out = torch.zeros(shape, dtype=dtype, device=device)
            z.add({name: out}, _terms(self.k, -self.moves))
            return out

        super().__init__(like, make)


@method("fedkseed")
@dataclass(frozen=True, config=PLAIN)
class FedKSeed(Method):
    """Full-parameter tuning without gradients, in kilobytes."""

    directions: int = Field(default=4096, ge=1, le=1 << 31, description="K, the vectors all steps are along")
    eps: float = Field(default=5e-4, gt=0, description="how far along a vector the two losses are taken")
    clip: Annotated[float | None, Field(gt=0, description="steps of larger |g| are dropped; none: no step")] = None
    keep: Literal["none", "largest", "model"] = Field(
        default="largest",
        description="z that clients keep within a step: of none, as much as the largest tensor takes, all (fp32)",
    )
    batched: bool = Field(
        default=False, description="both losses in one call, for a second and a third copy of the weights"
    )

    increments: ClassVar[bool] = False  # every job walks along directions of its own

    @model_validator(mode="after")
    def _in_the_span(self) -> FedKSeed:
        if self.mu:
            raise ValueError(f"mu: a proximal term moves weights along other vectors than the {self.directions}; use 0")
        return self

    def unfit(self, training: Any) -> str | None:
        if training.optimizer != "sgd":
            return f"optimizer: '{self.name}' has no gradients for '{training.optimizer}' to keep moments of; use 'sgd'"
        if training.momentum:
            return f"momentum: '{self.name}' sends steps as scalars of single directions, without memory; use 0"
        if training.weight_decay:
            return f"weight_decay: decay moves weights along themselves, which '{self.name}' cannot send; use 0"
        if training.schedule != "constant":
            return f"schedule: '{self.name}' sums scalars of all turns at one rate; use 'constant'"
        return None

    def init(self, params: Tree, seed: int) -> State:
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in params.values()) else torch.float32
        own = {SEED: torch.tensor(key(seed, "fedkseed")), SUMS: torch.zeros(self.directions, dtype=dtype)}
        return super().init(params | own, seed) | {"version": 0, "dense": 0}

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        rest = super().ship(state, client, version, since, changed)
        # `dense`: the last version that no sums lead to
        return rest if since < state["dense"] or since < 0 else {k: v for k, v in rest.items() if k in OWN}

    def load(self, held: Tree, payload: Mapping[str, Tensor]) -> Tree:
        out = held | {k: payload[k] for k in payload}
        if SUMS not in payload or SUMS not in held or any(k not in OWN for k in payload):
            return out
        moves = payload[SUMS].double() - held[SUMS].double()
        return out | self._moved(held, torch.arange(len(moves)), -moves)

    def train(self, local: Local, start: Tree) -> Tree:
        theta, sums = _theta(start), start[SUMS]
        room = self._room(theta)
        z = Directions(int(start[SEED]), room)
        draw = generator(local.seed, "fedkseed", local.client, local.visit)
        eta, walked = 0.0, list[tuple[int, float]]()
        behind: list[tuple[int, float]] = []  # what is left to do of the step before: its way back, and its move
        held = 4 * room + (2 * nbytes(theta) if self.batched else 0)
        for at in local.walk(theta, beside=held):
            k, eta = self._pick(start, draw), float(torch.tensor(at.rate, dtype=torch.float32))
            if self.batched:
                z.add(at.live, behind)
                both = {name: torch.stack([x, x]) for name, x in at.live.items()}
                for side, eps in enumerate((self.eps, -self.eps)):
                    z.add({name: x[side] for name, x in both.items()}, [(k, eps)])
                up, down = at.losses(both)
            else:
                z.add(at.live, [*behind, (k, self.eps)])
                up = at.loss()
                z.add(at.live, [(k, -2 * self.eps)])
                down = at.loss()
            g = float(torch.tensor((up - down) / (2 * self.eps), dtype=sums.dtype))
            at.used = math.isfinite(g) and abs(g) <= (self.clip or math.inf)
            behind = [(k, (0.0 if self.batched else self.eps) - (eta * g if at.used else 0.0))]
            if at.used:
                walked.append((k, g))
        ints = torch.int16 if self.directions <= 1 << 15 else torch.int32
        steps = torch.tensor([k for k, _ in walked], dtype=ints)
        return {
            STEPS: torch.cat([steps, torch.tensor([eta], dtype=torch.float32).view(ints)]),
            SCALARS: torch.tensor([g for _, g in walked], dtype=sums.dtype),
        }

    def own(self, world: Tree, sent: Mapping[str, Tensor]) -> Tree:
        k, eta, g = _read(sent)
        return world | self._moved(world, k, g.double() * (-self.server_lr * eta))

    def check(self, state: State, update: Update) -> str | None:
        sent = update.payload
        for name in sent:
            if name not in (STEPS, SCALARS):
                return f"unknown tensor '{name}'"
        if len(sent) < 2:
            return f"it needs tensors '{STEPS}' and '{SCALARS}'"
        steps, g, want = sent[STEPS], sent[SCALARS], state["params"][SUMS].dtype
        ints = torch.int16 if self.directions <= 1 << 15 else torch.int32
        if steps.dtype != ints or steps.ndim != 1:
            return f"tensor '{STEPS}' is no vector of {ints}"
        if g.dtype != want or g.ndim != 1 or len(g) + _tail(steps) != len(steps):
            return f"tensor '{SCALARS}' has shape {tuple(g.shape)} and {g.dtype} for {len(steps) - _tail(steps)} steps"
        if not finite(g):
            return f"tensor '{SCALARS}' holds values that are not finite"
        k, eta, _ = _read(sent)
        if not 0 <= eta < math.inf:
            return f"tensor '{STEPS}' holds the rate {eta}"
        if len(g) and not math.isfinite(float(g.abs().max().float() * eta * len(g))):
            return f"tensor '{SCALARS}' holds steps of no finite length at the rate {eta}"
        if self.clip is not None and len(g) and float(g.abs().max()) > 1.01 * self.clip:  # codecs may round up
            return f"tensor '{SCALARS}' holds a step that clip = {self.clip:g} should have dropped"
        if len(k) and not 0 <= int(k.min()) <= int(k.max()) < self.directions:
            return f"tensor '{STEPS}' holds an index that is not below {self.directions}"
        return None

    def accept(self, then: Tree, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Walked(then, payload)

    def model(self, params: Tree) -> Mapping[str, Tensor]:
        return _theta(params)

    def step(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], shares: Sequence[float] | None = None
    ) -> State:
        params, version = state["params"], state["version"] + 1
        updates = [replace(u, payload=self._as_walked(params, u.payload)) for u in updates]
        walks = [u.payload for u in updates if isinstance(u.payload, Walked)]
        if self.server_optimizer != "sgd" or len(walks) < len(updates):
            return super().step(state, updates, weights, shares) | {"version": version, "dense": version}
        total = sum(weights if shares is None else shares)
        if not total > 0:
            raise ValueError(f"weights of the updates sum to {total}")
        sums = params[SUMS].to(torch.float64, copy=True)
        for walk, w in zip(walks, weights, strict=True):
            sums.index_add_(0, walk.k, walk.moves, alpha=self.server_lr * w / total)
        return state | {"params": self.load(params, {SUMS: sums.to(params[SUMS].dtype)}), "version": version}

    def export(self, state: State) -> Tree:
        return _theta(state["params"])

    def _as_walked(self, params: Tree, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Walked(params, payload) if STEPS in payload else payload

    def _pick(self, view: Tree, draw: torch.Generator) -> int:
        return int(torch.randint(self.directions, (1,), generator=draw))

    def _room(self, theta: Tree) -> int:
        sizes = [x.numel() for x in theta.values()]
        return {"none": 0, "largest": max(sizes, default=0), "model": sum(sizes)}[self.keep]

    def _moved(self, params: Tree, k: Tensor, moves: Tensor) -> Tree:
        """theta + sum of moves z_k, summed before it is added; theta itself where nothing moves."""
        theta, terms = _theta(params), _terms(k, moves)
        if any(x.is_meta for x in theta.values()):
            return {name: torch.empty_like(x) for name, x in theta.items()}
        if not terms:
            return {}
        new = {name: torch.zeros_like(wide(x)) for name, x in theta.items()}
        Directions(int(params[SEED])).add(new, terms)
        return {name: new[name].add_(x).to(x.dtype) for name, x in theta.items()}


def _theta(params: Mapping[str, Tensor]) -> Tree:
    """The model's tensors."""
    return {k: params[k] for k in params if k not in OWN}


def _terms(k: Tensor, moves: Tensor) -> list[tuple[int, float]]:
    """What each direction moves by, ascending; none twice and none for nothing."""
    each, at = k.unique(return_inverse=True)
    sums = torch.zeros(len(each), dtype=torch.float64).index_add_(0, at, moves)
    return [(int(i), float(c)) for i, c in zip(each.tolist(), sums.tolist(), strict=True) if c]


def _tail(steps: Tensor) -> int:
    """Integers that hold eta."""
    return 4 // steps.element_size()


def _read(payload: Mapping[str, Tensor]) -> tuple[Tensor, float, Tensor]:
    """k (int64), eta and g of an upload."""
    steps = payload[STEPS]
    cut = len(steps) - _tail(steps)
    return steps[:cut].long(), float(steps[cut:].clone().view(torch.float32)), payload[SCALARS]
