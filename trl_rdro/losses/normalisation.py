"""A test of what the density-ratio losses assume of the reference model, from the log-ratios that they need anyway.

For every policy E_{pi_ref}[pi_theta / pi_ref] = 1. Where the reference is the mixture alpha p+ + (1 - alpha) p- of the
data's two classes, that is

    N = alpha E_{p+}[e^z] + (1 - alpha) E_{p-}[e^z] = 1

whatever the policy has learnt. Where it is not, N leaves 1 as soon as the policy moves.
"""

import math

import torch

from .density_ratio import Share
from .precision import as_float


NO_SUMS: tuple[float, ...] = (-math.inf,) * 5


def mixture_weights(preferred: torch.Tensor, mixture: Share, fraction: Share) -> torch.Tensor:
    """What a completion counts in N: alpha / pi if it is preferred, (1 - alpha) / (1 - pi) if not, `(n,)`.

    Args:
        preferred: `(n,)`, bool.
        mixture: alpha (or t), the share of p+ in the reference; a number, or `(n,)` for the completions' prompts.
        fraction: pi, the share of preferred completions in the data; likewise.
    """
    ones = torch.ones(preferred.shape, device=preferred.device)
    return torch.where(preferred, ones * (mixture / fraction), ones * ((1 - mixture) / (1 - fraction)))


def normalisation_sums(logratios: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What `log_normalisation` needs of `(n,)` completions, `(5,)`: the logarithms of the sums of c, c r, c^2, c^2 r
    and c^2 r^2, with c the `(n,)` weights (at least 0) and r = e^z. Those of several batches add up by logaddexp."""
    z, c = as_float(logratios), as_float(weights).log()
    return torch.logsumexp(torch.stack([c, c + z, 2 * c, 2 * c + z, 2 * (c + z)]), dim=1)


def log_normalisation(sums: tuple[float, ...]) -> tuple[float, float]:
    """log N and its standard error, from the five of `normalisation_sums`.

    N is the ratio of two sums, so that it is 1 to the last digit where policy = reference, whatever the classes of a
    batch. The error is that of such a ratio, sqrt(sum c^2 (r/N - 1)^2) / sum c; nan where no completion counts.
    """
    c, cr, c2, c2r, c2r2 = sums
    if c == -math.inf:
        return math.nan, math.nan
    log_n = cr - c
    if log_n == -math.inf:  # every completion has lost all its mass
        return log_n, math.nan
    variance = math.exp(c2r2 - 2 * cr) - 2 * math.exp(c2r - cr - c) + math.exp(c2 - 2 * c)
    return log_n, math.sqrt(max(0.0, variance))
