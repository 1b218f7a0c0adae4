"""Held-out loss and perplexity, accuracy and F1, each with its n and a 95 % interval.

Interval of the mean loss: with row i having loss sum x_i over m_i label tokens, the ratio R = sum x / sum m has
variance n / (n - 1) sum (x_i - R m_i)^2 / (sum m)^2 (ratio estimator, rows as clusters). Shares: Wilson, "Probable
inference, the law of succession, and statistical inference", JASA 22, 1927. F1 = 2 TP / (2 TP + FP + FN) of one class
is 2 J / (1 + J) with J = TP / (TP + FP + FN), a share of the rows that are of the class or are called so: Wilson's
interval of J, mapped ("Wilson indirect", Lam et al., https://arxiv.org/abs/2309.14621). Macro F1, a mean of ratios over
the same rows: the delta method, which is the ratio estimator's formula with the classes' terms summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from hocket.errors import Interrupted
from hocket.models.forward import IGNORE, predictions

Z = 1.959963984540054  # 97.5 % of the normal distribution


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, `hits` of `n`."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def heldout(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Loss of the model on rows nobody trained on; the result does not depend on batch size up to rounding.

    Returns:
        `loss` (nats a label token, or a row), `loss_low`, `loss_high`, `perplexity` (causal), `n` rows, `tokens`; for
        classification `accuracy` and `f1` (of class 1, or macro beyond two classes), each with `_low` and `_high`;
        `groups`, the loss of each group, where rows have one.

    Raises:
        Interrupted: `interrupted`, asked before every batch, said yes.
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i]["input_ids"]), i))  # little padding
    sums = torch.zeros(len(examples), dtype=torch.float64)
    counts = torch.zeros(len(examples), dtype=torch.float64)
    guesses: dict[int, tuple[int, int]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for at in range(0, len(order), batch_size):
                if interrupted():
                    raise Interrupted
                chosen = order[at : at + batch_size]
                batch = {k: v.to(device) for k, v in collate([examples[i] for i in chosen]).items()}
                found, number, best = _rows(model, batch)
                sums[chosen], counts[chosen] = found.double().cpu(), number.double().cpu()
                if best is not None:
                    pairs = zip(batch["labels"].tolist(), best.tolist(), strict=True)
                    guesses |= dict(zip(chosen, pairs, strict=True))
    finally:
        model.train(was_training)
    low, mean, high = _ratio(sums, counts)
    out: dict[str, Any] = {"loss": mean, "loss_low": low, "loss_high": high, "n": len(examples)}
    if guesses:
        out |= _shares([guesses[i] for i in range(len(examples))])
    else:
        out |= {"perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": int(counts.sum())}
    groups = [e.get("group") for e in examples]
    if any(groups):
        at_group = {g: [i for i, x in enumerate(groups) if x == g] for g in sorted({str(g) for g in groups if g})}
        out["groups"] = {g: float(sums[i].sum() / counts[i].sum()) for g, i in at_group.items() if i}
    return out


def pooled(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`loss` (`perplexity`, or `accuracy` with its interval), `n` and `tokens` of several results of `heldout` as if
    their rows were one set, though each may be of a model of its own."""
    n = sum(f["n"] for f in found)
    units = [f.get("tokens", f["n"]) for f in found]
    mean = sum(f["loss"] * u for f, u in zip(found, units, strict=True)) / max(sum(units), 1)
    out: dict[str, Any] = {"loss": mean, "n": n}
    if "accuracy" not in found[0]:
        return out | {"perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": sum(units)}
    hits = round(sum(f["accuracy"] * f["n"] for f in found))
    low, high = wilson(hits, n)
    return out | {"accuracy": hits / n, "accuracy_low": low, "accuracy_high": high}


def _rows(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(summed loss, label count, best class) of each row."""
    logits, target = predictions(model, batch)
    logits = logits.float()
    if target.ndim == 1:
        return functional.cross_entropy(logits, target, reduction="none"), torch.ones(len(target)), logits.argmax(-1)
    each = functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=IGNORE, reduction="none")
    return each.sum(1), (target != IGNORE).sum(1), None


def _ratio(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float, float]:
    """Lower end, estimate and upper end of sum(sums) / sum(counts)."""
    n, total = len(sums), float(counts.sum())
    mean = float(sums.sum()) / total if total else math.nan
    if n < 2:
        return math.nan, mean, math.nan
    spread = math.sqrt(n / (n - 1) * float(((sums - mean * counts) ** 2).sum())) / total
    return mean - Z * spread, mean, mean + Z * spread


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower end, mean and upper end (95 %, normal) of values that are one a row."""
    return _ratio(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.float64))


def _shares(pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Accuracy and F1 with their intervals, from (label, guess) pairs."""
    hits = sum(a == b for a, b in pairs)
    low, high = wilson(hits, len(pairs))
    out = {"accuracy": hits / len(pairs), "accuracy_low": low, "accuracy_high": high}
    classes = sorted({x for p in pairs for x in p})
    one = set(classes) <= {0, 1}
    f_low, f, f_high = _f1(pairs) if one else _macro(pairs, classes)
    return out | {"f1": f, "f1_low": f_low, "f1_high": f_high}


def _f1(pairs: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Lower end, estimate and upper end of the F1 of class 1."""
    both, either = sum(a == 1 == b for a, b in pairs), sum(1 in p for p in pairs)
    low, high = wilson(both, either)
    return 2 * low / (1 + low), 2 * both / (either + both) if either else 0.0, 2 * high / (1 + high)


def _macro(pairs: Sequence[tuple[int, int]], classes: Sequence[int]) -> tuple[float, float, float]:
    """The same of the mean F1 over classes."""
    label, guess = torch.tensor(pairs).T
    mean, terms = 0.0, torch.zeros(len(pairs), dtype=torch.float64)
    for c in classes:
        x, m = 2.0 * ((label == c) & (guess == c)).double(), (label == c).double() + (guess == c).double()
        f = float(x.sum() / m.sum())
        mean, terms = mean + f / len(classes), terms + (x - f * m) / m.sum() / len(classes)
    spread = math.sqrt(len(pairs) / (len(pairs) - 1) * float((terms**2).sum())) if len(pairs) > 1 else math.nan
    return max(0.0, mean - Z * spread), mean, min(1.0, mean + Z * spread)
