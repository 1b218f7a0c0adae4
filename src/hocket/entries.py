"""What one job trains: whole tensors, or chosen entries of some while their others stay as they are, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hocket.methods.base import Masks
from hocket.models.views import View
from hocket.tree import Tree


class Entries:
    """Chosen entries of one weight, as a vector that an optimizer can move.

    What reads the vector (gradient clipping, decay, moments) sees these entries alone. A dense gradient of the weight
    exists only between autograd's making it and this taking what it needs of it.

    Args:
        weight: the model's parameter, in memory of its own.
        turned: from the model's layout to that of `positions` (see `View.turned`).
        positions: which entries, row-major.

    Attributes:
        values: the vector; `scatter` puts it into the weight.
    """

    def __init__(self, weight: nn.Parameter, turned: Callable[[Tensor], Tensor], positions: Tensor) -> None:
        self.weight, self.turned = weight, turned
        self.positions = positions.to(weight.device)
        self.values = nn.Parameter(self.of(turned(weight.data)))
        self._hook = weight.register_post_accumulate_grad_hook(self._gather)

    def of(self, dense: Tensor) -> Tensor:
        """These entries of another weight of that shape."""
        return torch.take(dense, self.positions.to(dense.device))

    def scatter(self) -> None:
        """Put the values where they belong."""
        self.turned(self.weight.data).put_(self.positions, self.values.data)

    def close(self) -> None:
        """Leave the weight's gradients alone again."""
        self._hook.remove()

    def _gather(self, weight: Tensor) -> None:
        assert weight.grad is not None  # the hook is called once it is there
        found = self.of(self.turned(weight.grad))
        self.values.grad = found if self.values.grad is None else self.values.grad.add_(found)
        weight.grad = None


class Trained:
    """The tensors of one job while it trains them.

    Args:
        weights: by name, the model's parameters, in memory of their own.
        start: the values they have.
        masks: entries that move, where not all do.

    Attributes:
        live: what an optimizer moves, by name: the parameter, or the vector of its entries.
        before: what `live` starts from, as it is seen outside.
        dims: dimensions of each tensor.
    """

    def __init__(self, view: View, weights: Mapping[str, nn.Parameter], start: Tree, masks: Masks | None) -> None:
        self.view, self.weights, self.start = view, weights, start
        chosen = {k: x for k, x in (masks or {}).items() if k in weights}
        self.entries = {k: Entries(weights[k], partial(view.turned, k), x) for k, x in chosen.items()}
        self.live = {k: self.entries[k].values if k in chosen else p for k, p in weights.items()}
        self.before = {k: self.entries[k].of(start[k]) if k in chosen else start[k] for k in weights}
        self.dims = {k: start[k].ndim for k in weights}

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of what the optimizer moves."""
        return [p.grad for p in self.live.values()]

    @property
    def held(self) -> list[Tensor]:
        """What stays in memory beside the model: values at the start, and entries with their positions."""
        chosen = (x for k, e in self.entries.items() for x in (self.start[k], e.values.data, e.positions))
        return [*self.before.values(), *chosen]

    def anchors(self) -> list[Tensor]:
        """`before`, laid out as `live`."""
        here = {k: v.to(self.view.device) for k, v in self.before.items()}
        return [v if k in self.entries else self.view.turned(k, v) for k, v in here.items()]

    def logical(self) -> dict[str, Tensor]:
        """The whole tensors as they are seen outside; gradients flow through."""
        return {k: self.view.logical(k) for k in self.weights}

    def moved(self) -> None:
        """The optimizer has made a step."""
        for e in self.entries.values():
            e.scatter()

    def deltas(self) -> Tree:
        """What moved, as differences; nothing can be trained after that."""
        after = {k: p.data if k in self.entries else self.view.logical(k).detach() for k, p in self.live.items()}
        # the trained memory becomes the difference: no further copy
        return {k: v.sub_(self.before[k].to(v.device)).cpu() for k, v in after.items()}

    def close(self) -> None:
        """Let go of the parameters."""
        for e in self.entries.values():
            e.close()
        for p in self.weights.values():
            p.requires_grad_(False)
            p.grad = None
