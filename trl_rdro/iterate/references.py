"""
Reference log-probabilities of a round: functions of those of pi_t and pi_0, so that no third model is needed.

A pairwise loss sees its reference only through the difference of two completions of one prompt, in which the constant
of the geometric mixture pi_t^a pi_0^(1-a) cancels. Losses of single log-ratios need a distribution that sums to one,
and mean the one that the data came from: the mixture mu_t that the completions were drawn from.
"""

import math
from typing import Any

import numpy as np

from ..losses.types import LOSS_TYPES, sees_differences_only


# ipo and sigmoid_norm divide by the lengths, so that the constant cancels exactly between equal lengths only
TRL_LOSSES_OF_DIFFERENCES = {
    *("sigmoid", "hinge", "ipo", "exo_pair", "robust", "aot", "discopop", "sft", "sigmoid_norm"),
}


def needs_distribution(args: Any) -> bool:
    """Whether the loss in `args` uses single log-ratios."""
    losses = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    is_nonlinear = getattr(args, "f_divergence_type", "reverse_kl") != "reverse_kl"
    inner = getattr(args, "inner_loss_type", None)
    return is_nonlinear or not all(
        sees_differences_only(loss, inner) if loss in LOSS_TYPES else loss in TRL_LOSSES_OF_DIFFERENCES
        for loss in losses
    )


def geometric(policy: float, base: float, a: float) -> float:
    """log(pi_t^a pi_0^(1-a)), not normalised."""
    return a * policy + (1 - a) * base


def linear(policy: float, base: float, lam: float) -> float:
    """log(lam pi_t + (1 - lam) pi_0)."""
    terms = [logp + math.log(share) for logp, share in ((policy, lam), (base, 1 - lam)) if share > 0]
    return float(np.logaddexp.reduce(terms))
