"""How much of a gradient G lies along few directions: random ones, a bias's, and those that coordinates point out.

A subspace of inputs with orthonormal rows V holds |G V^T|^2 / |G|^2 of it: r/n on average for r random rows of n. Along
the unit mean input u it is |G u|^2 / |G|^2, and G u is what training the bias moves where inputs are near their mean.
Coordinates B = G' P^T of other rows' gradient G' in a random subspace say something, too: which outputs move, a
subspace Q = orth(B) of them, that holds |Q^T G|^2 / |G|^2. From the start model and rows of SST-2's training part; no
training.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from common import save

from hocket import models
from hocket.data import collate, encode, load

ROOT = Path(__file__).resolve().parents[1]


MODULES = ("query", "key", "value", "dense")
ROWS, LENGTH, RANK, BATCH = 256, 32, 4, 32


def held(g: torch.Tensor, v: torch.Tensor) -> float:
    """Share of |G|^2 in the row space of V."""
    basis = torch.linalg.svd(v.double(), full_matrices=False)[2]
    return float((g.double() @ basis.T).square().sum() / g.double().square().sum())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loaded = models.load("minilm-l6-v2", task="classification", num_labels=2, seed=0)
    model: Any = loaded.model.eval()
    table = load(ROOT / "data/glue_sst2/train.jsonl.gz", limit=2 * ROWS)
    rows, _, _ = encode(table, loaded.tokenizer, task="classification", max_length=LENGTH)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(MODULES)}
    sums = {n: torch.zeros(m.in_features, dtype=torch.float64) for n, m in layers.items()}

    def noting(name: str):
        def hook(module: Any, inputs: Any, output: Any) -> None:
            sums[name] += inputs[0].detach().double().reshape(-1, inputs[0].shape[-1]).sum(0)

        return hook

    def gradients(first: int) -> dict[str, torch.Tensor]:
        """Of ROWS rows from `first` on, summed."""
        model.zero_grad()
        for i in range(first, first + ROWS, BATCH):
            batch = collate([rows[j] for j in range(i, i + BATCH)], loaded.tokenizer.pad_token_id)
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
        return {n: m.weight.grad.double() for n, m in layers.items()}

    hooks = [m.register_forward_hook(noting(n)) for n, m in layers.items()]
    others = {n: g.clone() for n, g in gradients(ROWS).items()}  # what is known is of other rows than what is held
    for hook in hooks:
        hook.remove()
    out: dict[str, list[float]] = {}
    for n, g in gradients(0).items():
        shares = {
            "mean input": held(g, sums[n][None]),
            "one random row": held(g, torch.randn(1, g.shape[1])),
            f"{RANK} random rows": held(g, torch.randn(RANK, g.shape[1])),
            f"{RANK} outputs from {RANK} random rows' coordinates": held(
                g.T, (others[n] @ torch.randn(RANK, g.shape[1], dtype=torch.float64).T).T
            ),
            "best row": float(torch.linalg.svdvals(g)[0] ** 2 / g.square().sum()),
        }
        for k, v in shares.items():
            out.setdefault(k, []).append(v)
    shares = {k: statistics.fmean(v) for k, v in out.items()}
    save("gradient_energy", {"modules": len(layers), "rows": ROWS, "share": shares})


if __name__ == "__main__":
    main()
