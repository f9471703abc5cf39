"""Pair losses for soft labels: GDPO and DPO-PRO. A soft label is the probability that the chosen completion is the
better one, for example the share of raters who say so.

Everywhere u = beta (z_chosen - z_rejected).
"""

import torch
import torch.nn.functional as F

from .precision import margins


def gdpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, probability: torch.Tensor, beta: float = 0.1
) -> torch.Tensor:
    """Geometric DPO (https://huggingface.co/papers/2409.06691): -log sigma( (2 p - 1) u ). The closer its label to a
    tie, the less a pair counts; it is not pulled to a margin of its own, as by cross-entropy with soft labels.

    Args:
        chosen (`torch.Tensor` of shape `(n,)`): log-ratios of the chosen completions, in nats.
        rejected (`torch.Tensor` of shape `(n,)`): log-ratios of the rejected completions, in nats.
        probability (`torch.Tensor` of shape `(n,)`): p, that the chosen completion is the better one, in [1/2, 1].
            1 is DPO.
        beta (`float`): strength of the tie to the reference model.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where policy = reference.
    """
    u = beta * margins(chosen, rejected)
    return -F.logsigmoid((2 * probability.to(u.dtype) - 1) * u)


def dpopro_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, probability: torch.Tensor, beta: float = 0.1, rho: float = 0.1
) -> torch.Tensor:
    """DPO-PRO (https://huggingface.co/papers/2509.02709): soft-label DPO under the worst label near the given one,

        max over p in [0, 1] with (p - q)^2 <= rho q (1 - q)   of   -p log sigma(u) - (1 - p) log sigma(-u) ,

    a chi-squared ball around q. The worst p is q - sqrt(rho q (1 - q)) where u > 0, and q + sqrt(rho q (1 - q)) where
    u < 0, kept within [0, 1].

    Args:
        chosen, rejected, beta: as for `gdpo_loss`.
        probability (`torch.Tensor` of shape `(n,)`): q, that the chosen completion is the better one, in [1/2, 1].
            1 is DPO.
        rho (`float`): radius of the ball, >= 0. 0 is soft-label DPO.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where policy = reference.
    """
    u = beta * margins(chosen, rejected)
    q = probability.to(u.dtype)
    worst = (q - u.detach().sign() * (rho * q * (1 - q)).sqrt()).clamp(0, 1)
    return (1 - worst) * u - F.logsigmoid(u)
