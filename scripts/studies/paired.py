"""Paired differences of the same seeds: Student's t, and Holm's correction for looking at many."""

import math
import statistics
from collections.abc import Sequence

import numpy as np


def t_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of a mean of 0. 1 where all are 0, 0 where all are the same other number."""
    n = len(differences)
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return float(mean == 0)
    return 2 * _tail(abs(mean) / deviation * math.sqrt(n), n - 1)


def _tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution, t >= 0. With T = sqrt(freedom) tan(angle) it is the integral of cos to the
    power freedom - 1, which ends."""
    angles = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20_001)
    density = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(math.pi)
    values = np.cos(angles) ** (freedom - 1)
    return density * float(((values[1:] + values[:-1]) / 2 * np.diff(angles)).sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected so that the chance of any false discovery among all of them is bounded by the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
