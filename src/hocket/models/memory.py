"""What a client's machine must hold, from shapes alone.

Exact for weights, gradients and optimizer state; an estimate for activations, which depend on kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes a client needs while it trains.

    Attributes:
        weights: the whole model at its training precision.
        trained: the moving copy of what trains (the start values stay for the difference).
        gradients, optimizer: of what trains.
        in_flight: own updates the client remembers under overlap, and error feedback.
        activations: estimate, for one forward and backward pass.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    in_flight: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())


def estimate(
    total: int, trained: Mapping[str, int], slots: int, config: Any, tokens: int, ahead: int, feedback: bool,
    lowest: float = 0.0,
) -> Memory:  # fmt: skip
    """Memory of a client that trains the tensors of `trained` (name to elements) at once.

    Args:
        total: elements of the model.
        slots: numbers the optimizer keeps for each that trains (AdamW 2, momentum 1, plain SGD 0).
        config: the model's configuration; hidden_size, num_hidden_layers and vocab_size are used where present.
        tokens: tokens in one forward pass (rows x length).
        ahead: turns a client may be ahead.
        feedback: whether the uplink codec keeps an error.
        lowest: lowest trained layer as a share of all layers; below it nothing is kept for the backward pass.
    """
    n = sum(trained.values())
    hidden, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    vocab, inner = getattr(config, "vocab_size", 0), getattr(config, "intermediate_size", None) or 4 * hidden
    # kept for the backward pass per token and layer: about 8 hidden vectors and 3 of the MLP's inner width;
    # at the end the logits, their softmax and their gradient, in fp32
    kept = tokens * round(layers * (1 - lowest)) * (8 * hidden + 3 * inner) * 4
    return Memory(4 * total, 4 * n, 4 * n, 4 * n * slots, 4 * n * (ahead + feedback), kept + 3 * tokens * vocab * 4)
