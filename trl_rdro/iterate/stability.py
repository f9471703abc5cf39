"""
The quantities that say whether iterated preference training settles (https://huggingface.co/papers/2602.12180).

With P_ij the probability that response i beats j, the population dynamics are

    pi_{t+1} = softmax(a log pi_t + (1 - a) log pi_0 + b P mu_t),    mu_t = lam pi_t + (1 - lam) pi_0

and a + (b lam / 2) ||P - 1/2||_2 < 1 makes them settle from anywhere.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..losses.types import of_family


NEAR = 0.5  # a return is near when it is back by less than this share of the way out
VISIBLE = 0.25  # nats: excursions below it are taken for noise


def loss_strength(args: Any, tokens: float) -> float | None:
    """b of the loss in `args`, or None where it has no such constant.

    For TRL's ipo, whose pairs cost (h - 1/(2 beta))^2, the minimum over pairs from mu is at z_i = (P mu)_i / beta. The
    logistic losses have beta h = logit of the probability that i beats j, which near 1/2 is 4 (P_ij - 1/2). Losses
    that take the mean over a completion's tokens move the whole completion `tokens` times as far.
    """
    losses = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    if len(losses) != 1:
        return None
    loss = losses[0]
    if loss in of_family("robust"):
        loss = args.inner_loss_type
    smoothing = 1 - 2 * getattr(args, "label_smoothing", 0.0)
    strength = {
        "sigmoid": 4 * smoothing / args.beta,
        "robust": 4 / smoothing / args.beta,
        "sigmoid_norm": 4 * tokens / args.beta,
        "ipo": tokens / args.beta,
    }
    return strength.get(loss)


def preference_norm(preferences: Any) -> Any:
    """||P - 1/2||_2 of the responses at hand, `(..., K, K)` to `(...)`: of all possible ones it can only be larger."""
    return np.linalg.norm(np.asarray(preferences, dtype=float) - 0.5, ord=2, axis=(-2, -1))


def largest_norm(responses: int) -> float:
    """The largest ||P - 1/2||_2 that any judge can have on so many responses: that of a strict order."""
    return 0.5 / math.tan(math.pi / (2 * responses))


def stability_margin(a: Any, b: Any, lam: Any, norm: Any) -> Any:
    """1 - (a + (b lam / 2) ||P - 1/2||_2), of numbers or arrays. Positive is enough for stability; negative proves
    nothing by itself."""
    return 1 - (a + np.asarray(b) * lam / 2 * norm)


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
