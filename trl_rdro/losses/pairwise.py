"""TRL's pairwise losses that can stand inside a robust objective.

All take the log-ratios of the chosen and of the rejected completion; these three see only their difference h.
"""

import torch
import torch.nn.functional as F

from .precision import margins


def sigmoid_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """DPO (https://huggingface.co/papers/2305.18290, eq. 7), with the label smoothing of conservative DPO.

        -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)  =  -log sigma(beta h) + eps beta h

    Args:
        chosen, rejected (`torch.Tensor` of shape `(n,)`): log-ratios, in nats.
        beta (`float`): strength of the tie to the reference model.
        label_smoothing (`float`): eps, the assumed probability that a label is flipped, in [0, 0.5).

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 at h = 0.
    """
    logits = beta * margins(chosen, rejected)
    return -F.logsigmoid(logits) + label_smoothing * logits


def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """IPO (https://huggingface.co/papers/2310.12036, eq. 17): (h - 1/(2 beta))^2.

    Args:
        chosen, rejected (`torch.Tensor` of shape `(n,)`): log-ratios, AVERAGED over each completion's tokens, as the
            IPO authors do and TRL does.
        beta (`float`): the paper's tau.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    return (margins(chosen, rejected) - 1 / (2 * beta)) ** 2


def hinge_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Hinge loss of SLiC (https://huggingface.co/papers/2305.10425): max(0, 1 - beta h).

    Args:
        chosen, rejected (`torch.Tensor` of shape `(n,)`): log-ratios, in nats.
        beta (`float`): the inverse of the margin.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    return torch.relu(1 - beta * margins(chosen, rejected))
