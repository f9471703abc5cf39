"""What scores of completions come to: accuracy and margin of pairs, class means and AUC of labelled completions."""

import math
from typing import Any

import torch


def mean_and_error(values: torch.Tensor) -> dict[str, float | None]:
    """The mean of one value per row, and its standard error (None for fewer than two)."""
    n = len(values)
    if n == 0:
        return {"mean": None, "standard_error": None}
    return {
        "mean": values.mean().item(),
        "standard_error": (values.std() / math.sqrt(n)).item() if n > 1 else None,
    }


def pair_figures(scores: torch.Tensor) -> dict[str, Any]:
    """Of `(n, 2)` scores: accuracy (a tie counts one half), margin, and the mean score of each side."""
    chosen, rejected = scores.unbind(dim=1)
    correct = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return {
        "n": len(scores),
        "accuracy": mean_and_error(correct),
        "margin": mean_and_error(chosen - rejected),
        "chosen": mean_and_error(chosen),
        "rejected": mean_and_error(rejected),
    }


def unpaired_figures(scores: torch.Tensor, preferred: torch.Tensor) -> dict[str, Any]:
    """Of `(n,)` scores and labels: the mean score of each class, and the AUC, the chance that a preferred completion
    scores above a non-preferred one (ties count one half), with DeLong's standard error."""
    above, below = scores[preferred], scores[~preferred]
    return {
        "n": len(scores),
        "auc": area_under_curve(above, below),
        "preferred": {"n": len(above), **mean_and_error(above)},
        "non_preferred": {"n": len(below), **mean_and_error(below)},
    }


def area_under_curve(above: torch.Tensor, below: torch.Tensor) -> dict[str, float | None]:
    if not len(above) or not len(below):
        return {"mean": None, "standard_error": None}

    def share_below(values, others):  # (n,), each value's share of the others below it
        others = others.sort().values
        left, right = torch.searchsorted(others, values), torch.searchsorted(others, values, right=True)
        return (left + right).double() / (2 * len(others))

    placements = share_below(above, below), 1 - share_below(below, above)
    error = None
    if min(len(above), len(below)) > 1:
        error = math.sqrt(sum((values.var() / len(values)).item() for values in placements))
    return {"mean": placements[0].mean().item(), "standard_error": error}
