"""
The stability margin of https://huggingface.co/papers/2602.12180: the population dynamics

    pi_{t+1} = softmax(a log pi_t + (1 - a) log pi_0 + b P mu_t),    mu_t = lam pi_t + (1 - lam) pi_0

with P_ij the probability that response i beats j settle from anywhere if a + (b lam / 2) ||P - 1/2||_2 < 1.
"""

import math
from typing import Any

import numpy as np


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
