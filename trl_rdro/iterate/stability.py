"""What a round says about stability: the constant b of its loss, and whether its policy comes back."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..losses.types import of_family


NEAR = 0.5  # a return is near when it is back by less than this share of the way out
VISIBLE = 0.25  # nats: excursions below it are taken for noise


def loss_strength(args: Any, tokens: float, judge_bound: float | None = None) -> float | None:
    """b of the loss in `args`, or None where it has no such constant.

    For TRL's ipo, whose pairs cost (h - 1/(2 beta))^2, the minimum over pairs from mu is at z_i = (P mu)_i / beta. The
    logistic losses have beta h = logit of the probability that i beats j. With a judge that can be certain that has no
    bound, and neither has b; within [1 - p, p] it is Lipschitz with logit(p) / (p - 1/2), the b under which the margin
    holds. Losses that take the mean over a completion's tokens move the whole completion `tokens` times as far.

    Args:
        tokens: mean length of a completion.
        judge_bound: p, where the judge's probabilities are known to lie within [1 - p, p].
    """
    losses = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    if len(losses) != 1:
        return None
    is_robust = losses[0] in of_family("robust")
    loss = args.inner_loss_type if is_robust else losses[0]
    certain = 1.0 if judge_bound is None else judge_bound
    smoothing = getattr(args, "label_smoothing", 0.0)
    # The probability whose logit the loss aims at, when the judge's is `certain`
    smoothed = certain - smoothing * (2 * certain - 1)
    # TRL's own `sigmoid` has no smoothing
    aims = {"sigmoid_norm": certain, "sigmoid": smoothed if is_robust else certain, "cdpo": smoothed}
    aims["robust"] = (certain - smoothing) / (1 - 2 * smoothing) if smoothing < 0.5 else math.inf
    lengths = tokens if loss in ("ipo", "sigmoid_norm") else 1
    if loss == "ipo":
        return lengths / args.beta
    aim = aims.get(loss, math.inf)
    if not aim < 1:
        return None
    return lengths * math.log(aim / (1 - aim)) / (certain - 0.5) / args.beta


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square difference of log-probabilities `(prompts, completions)`, each prompt's mean taken off."""
    difference = first - second
    return float(np.sqrt(np.mean((difference - difference.mean(axis=1, keepdims=True)) ** 2)))


def near_return(history: Sequence[np.ndarray]) -> dict[str, float] | None:
    """Whether the last of these policies has come back near an earlier one after having been away from it.

    A turn of the policy can take any number of rounds, so that all earlier policies are looked at.

    Returns:
        The index of the earlier policy, how far away the policies between were (`out`), and how far the last one is
        (`back`); None if there is no near return.
    """
    last, nearest = len(history) - 1, None
    for index in range(last - 1):
        out = max(distance(history[index], between) for between in history[index + 1 : last])
        back = distance(history[index], history[last])
        is_nearer = nearest is None or back / out < nearest["back"] / nearest["out"]
        if out > VISIBLE and back < NEAR * out and is_nearer:
            nearest = {"index": index, "out": out, "back": back}
    return nearest


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Mean of `(prompts, draws)`, and its standard error over the draws, the prompts being fixed."""
    prompts, draws = values.shape
    error = math.sqrt((values.var(axis=1, ddof=1) / draws).sum()) / prompts
    return {"mean": float(values.mean()), "standard_error": error}
