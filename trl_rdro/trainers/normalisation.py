"""The metric `reference/log_normalisation`: whether the reference is the mixture that ddro and rdro assume."""

import math
from collections import deque

import numpy as np
import torch

from ..losses.normalisation import NO_SUMS, log_normalisation


NAME = "reference/log_normalisation"
RECENT, ERROR = f"{NAME}_recent", f"{NAME}_error"  # over the last completions, and its standard error
COMPLETIONS = 500  # or more, over which the recent one is taken
STEPS = 2000  # at most: with very unequal weights few completions count

Sums = tuple[float, ...]  # of `normalisation_sums`, over all ranks


class Normalisation:
    """Puts N together: a micro-batch at a time for an optimiser step, for the last steps, and for an evaluation."""

    def __init__(self):
        self._step, self._parts, self._of_step = -1, 0, NO_SUMS
        self._steps: deque[Sums] = deque(maxlen=STEPS)
        self._of_evaluation = NO_SUMS

    def of_step(self, step: int, sums: Sums, micro_batches: int) -> dict[str, float]:
        """Take in one of the micro-batches of optimiser step `step`; the metrics after the last one, none before."""
        if step != self._step:
            self._step, self._parts, self._of_step = step, 0, NO_SUMS
        self._parts, self._of_step = self._parts + 1, _together(self._of_step, sums)
        if self._parts < micro_batches:
            return {}
        self._steps.append(self._of_step)
        while completions(_together(*list(self._steps)[1:])) >= COMPLETIONS:
            self._steps.popleft()
        recent, error = log_normalisation(self.recent)
        return _finite({NAME: log_normalisation(self._of_step)[0], RECENT: recent, ERROR: error})

    @property
    def recent(self) -> Sums:
        return _together(*self._steps)

    def begin_evaluation(self) -> None:
        self._of_evaluation = NO_SUMS

    def of_evaluation(self, sums: Sums) -> None:
        """Take in a batch of the evaluation."""
        self._of_evaluation = _together(self._of_evaluation, sums)

    def evaluated(self) -> tuple[dict[str, float], Sums]:
        """The metrics of the evaluation since it began, none without a density-ratio loss; and its sums."""
        value, error = log_normalisation(self._of_evaluation)
        return _finite({NAME: value, ERROR: error}), self._of_evaluation


def completions(sums: Sums) -> float:
    """The number of completions behind some sums: the effective one, where their weights differ."""
    return 0.0 if sums[0] == -math.inf else math.exp(2 * sums[0] - sums[2])


def over_ranks(of_ranks: torch.Tensor) -> Sums:
    """`(ranks, 5)` sums as those of all ranks."""
    return _together(*map(tuple, of_ranks.tolist()))


def _together(*sums: Sums) -> Sums:
    return tuple(np.logaddexp.reduce(np.array([NO_SUMS, *sums]), axis=0).tolist())


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
