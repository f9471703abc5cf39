"""Paired differences of the same seeds: Student's t, Holm's correction for looking at many, and the bootstrap over
seeds and test pairs at once."""

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


def _quantile(tail: float, freedom: int) -> float:
    """The t that Student's distribution exceeds with probability `tail`, by bisection."""
    low, high = 0.0, 1.0
    while _tail(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(middle, freedom) > tail else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected so that the chance of any false discovery among all of them is bounded by the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def two_way_interval(differences: np.ndarray, comparisons: int = 1, replicates: int = 10_000) -> tuple[float, float]:
    """
    A 95 % interval for the mean of `differences`, `(draws, test pairs)`, in which both vary.

    Draws and test pairs are drawn anew, each with replacement and independently of one another, and percentiles of the
    mean are taken: Owen's pigeonhole bootstrap (2007). A bootstrap over n draws is too narrow by sqrt((n - 1) / n) and
    takes the spread between them for known. So it is stretched by both, the latter as Student's t is to the normal, n
    being the smaller side. It errs on the side of width. With several `comparisons` each interval is so wide
    (Bonferroni) that all of them hold with 95 %.
    """
    rng = np.random.default_rng(0)
    weights = [rng.multinomial(n, [1 / n] * n, size=replicates) / n for n in differences.shape]
    means = ((weights[0] @ differences) * weights[1]).sum(axis=1)
    tail = 0.025 / comparisons
    n = min(side for side in differences.shape if side > 1)
    stretch = math.sqrt(n / (n - 1)) * _quantile(tail, n - 1) / statistics.NormalDist().inv_cdf(1 - tail)
    mean = differences.mean()
    low, high = mean + stretch * (np.quantile(means, [tail, 1 - tail]) - mean)
    return float(low), float(high)
