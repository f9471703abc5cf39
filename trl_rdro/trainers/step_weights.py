"""The weights of an optimiser step's pairs in one pass over its micro-batches.

    grad [ tau log mean_i e^(l_i / tau) ]  =  sum_i e^((l_i - m) / tau) grad l_i  /  sum_i e^((l_i - m) / tau)

for any constant m. So each micro-batch adds its part of the numerator to the gradients, and at the step's end they are
divided by the denominator, for which the losses of all pairs are enough. Nothing has to be known before the step: m is
the loss that weighs most in its first micro-batch. Where a later one weighs so much more that e^(...) would overflow,
m moves there, and what was accumulated is multiplied by what that changes.
"""

import math

import torch

from .. import losses


LARGEST_EXPONENT = 60.0  # e^60 is 1e26, in which gradients are far from float32's and bfloat16's largest


class StepWeights:
    """What the micro-batches of one optimiser step share. The same on every rank.

    Args:
        tau: temperature, not 0; negative: pairs of low loss weigh most.
    """

    def __init__(self, tau: float):
        self.tau = tau
        self.largest = torch.tensor(0.0)  # m, once a micro-batch was taken in
        self.seen: list[torch.Tensor] = []

    def take(self, pair_losses: torch.Tensor) -> float:
        """Take in the `(n,)` losses of a micro-batch's pairs, of all ranks.

        Returns:
            By what the gradients of earlier micro-batches are to be multiplied, 1 but for an overflow.
        """
        self.seen.append(pair_losses.float())
        largest = self.seen[-1].max() if self.tau > 0 else self.seen[-1].min()
        if len(self.seen) == 1:
            self.largest = largest
        exponent = ((largest - self.largest) / self.tau).item()
        if exponent <= LARGEST_EXPONENT:
            return 1.0
        self.largest = largest
        return math.exp(-exponent)

    def of(self, pair_losses: torch.Tensor) -> torch.Tensor:
        """e^((l - m) / tau), detached, `(n,)`."""
        return ((pair_losses.detach().float() - self.largest) / self.tau).exp()

    @property
    def all_pair_losses(self) -> torch.Tensor:
        """Those taken in so far, `(N,)`."""
        return torch.cat(self.seen)

    @property
    def mean(self) -> float:
        """What the gradients are to be divided by, once all micro-batches have been taken in."""
        return self.of(self.all_pair_losses).mean().item()

    @property
    def objective(self) -> torch.Tensor:
        """tau log mean e^(l / tau) of all pairs taken in, a scalar."""
        return losses.kldpo_loss(self.all_pair_losses, self.tau).mean()
