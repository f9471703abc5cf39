"""
Which labels of a preference file are wrong, as a trained model sees it.

Each label is taken to be right with probability eta, and the model to know how likely the chosen completion is to be
the better one: s = sigma(beta h), with h the difference of the pair's log-ratios. Then a label is right with
probability

    w = eta s / (eta s + (1 - eta) (1 - s)) ,

RE-PO's posterior (https://huggingface.co/papers/2509.24159), and eta is what makes the labels likeliest.
"""

import math
from collections import Counter
from typing import Any

import torch
from datasets import Dataset

from ..losses import repo_posterior
from .score_figures import mean_and_error


GAMMA = 2.0  # of Hölder-DPO's weights, its published value
FEWEST = 20  # pairs from which an annotator has an eta alone; those with fewer share one
OTHERS = "(others)"

Figure = dict[str, float | None]


def reliability(u: torch.Tensor) -> tuple[float, float | None]:
    """eta, the share of right labels, by maximum likelihood.

    Args:
        u: `(n,)` beta h of each pair, float64.

    Returns:
        eta, and its standard error from the observed information, None where the pairs say nothing.
    """
    s = torch.sigmoid(u)

    def slope(eta: float) -> torch.Tensor:  # of each pair's log-likelihood, (n,); falls with eta
        return (2 * s - 1) / (eta * s + (1 - eta) * torch.sigmoid(-u))

    low, high = 1e-9, 1 - 1e-9
    for _ in range(60):
        eta = (low + high) / 2
        low, high = (eta, high) if slope(eta).sum() > 0 else (low, eta)
    information = slope(eta).square().sum().item()
    return eta, 1 / math.sqrt(information) if information > 0 else None


def flipped_by_moments(u: torch.Tensor, gamma: float = GAMMA) -> Figure:
    """The share of flipped labels by the weights s^gamma of Hölder-DPO (https://huggingface.co/papers/2505.17859).

    Under the model the mean of s^gamma over right labels is that of s s^gamma + (1 - s) (1 - s)^gamma, over flipped
    ones that of s (1 - s)^gamma + (1 - s) s^gamma. The share is how far the observed mean lies from the first towards
    the second. (Derived here. It needs no likelihood, and errs more.)

    Args:
        u: `(n,)` beta h of each pair, float64.
    """
    s, wrong = torch.sigmoid(u), torch.sigmoid(-u)
    right_mean = s ** (1 + gamma) + wrong ** (1 + gamma)
    flipped_mean = s * wrong**gamma + wrong * s**gamma
    way = (right_mean - flipped_mean).mean().item()
    if way == 0:
        return {"mean": None, "standard_error": None}
    share = (right_mean - s**gamma).mean().item() / way
    errors = mean_and_error(right_mean - s**gamma - share * (right_mean - flipped_mean))
    return {
        "mean": share,
        "standard_error": None if errors["standard_error"] is None else errors["standard_error"] / way,
    }


def judge_labels(dataset: Dataset, scores: list[dict[str, Any]], beta: float) -> dict[str, Any]:
    """
    What the scores of pairs say about their labels.

    Args:
        dataset: the scored data set. With a column `annotator` each annotator of `FEWEST` pairs has an eta of its own.
        scores: of `tools.scoring.score`: row, chosen, rejected.
        beta: of the training.

    Returns:
        "flipped" and "flipped_by_moments", shares of all labels with their standard errors; "annotators", the share of
        each; and "posteriors" and "weights", of each pair that its label is right.
    """
    chosen, rejected = torch.tensor([[row["chosen"], row["rejected"]] for row in scores], dtype=torch.float64).T
    u = beta * (chosen - rejected)
    names = _annotators(dataset, scores)
    posteriors, annotators = torch.empty_like(u), {}
    for name in dict.fromkeys(names):
        members = torch.tensor([other == name for other in names])
        eta, error = reliability(u[members])
        posteriors[members] = repo_posterior(chosen[members], rejected[members], eta, beta)
        annotators[name] = {"n": int(members.sum()), "mean": 1 - eta, "standard_error": error}
    return {
        "beta": beta,
        "flipped": _pooled(list(annotators.values())),
        "flipped_by_moments": flipped_by_moments(u),
        "annotators": annotators if "annotator" in dataset.column_names else {},
        "posteriors": posteriors.tolist(),
        "weights": (torch.sigmoid(u) ** GAMMA).tolist(),
    }


def most_suspect(
    dataset: Dataset, scores: list[dict[str, Any]], labels: dict[str, Any], number: int
) -> list[dict[str, Any]]:
    """The pairs whose labels are the least likely to be right, the worst first: the row's number in the data set, the
    posterior, Hölder-DPO's weight, the margin in nats, and all that the row holds."""
    order = sorted(range(len(scores)), key=labels["posteriors"].__getitem__)[:number]
    return [
        {
            "row": scores[i]["row"],
            "label_right": labels["posteriors"][i],
            "holder_weight": labels["weights"][i],
            "margin": scores[i]["chosen"] - scores[i]["rejected"],
            **dataset[scores[i]["row"]],
        }
        for i in order
    ]


def _annotators(dataset: Dataset, scores: list[dict[str, Any]]) -> list[str]:
    """Whose label each pair's is."""
    if "annotator" not in dataset.column_names:
        return [OTHERS] * len(scores)
    column = dataset["annotator"][:]
    names = [str(column[row["row"]]) for row in scores]
    counts = Counter(names)
    return [name if counts[name] >= FEWEST else OTHERS for name in names]


def _pooled(figures: list[dict[str, Any]]) -> Figure:
    """The mean over all pairs of independent groups' means."""
    total = sum(figure["n"] for figure in figures)
    errors = [figure["standard_error"] for figure in figures]
    return {
        "mean": sum(figure["n"] * figure["mean"] for figure in figures) / total,
        "standard_error": None
        if None in errors
        else math.sqrt(sum((f["n"] * f["standard_error"]) ** 2 for f in figures)) / total,
    }
