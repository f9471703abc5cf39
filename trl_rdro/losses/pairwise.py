"""Pairwise losses of the DPO family: the inner losses of the distributionally robust objectives.

All are functions of the margin h, the log-ratio of the chosen minus that of the rejected completion, as TRL has them.
"""

import torch
import torch.nn.functional as F

from .density_ratio import as_float


def sigmoid_loss(margins: torch.Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO (https://huggingface.co/papers/2305.18290, eq. 7), with the label smoothing of conservative DPO.

        -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)  =  -log sigma(beta h) + eps beta h

    Args:
        margins (`torch.Tensor` of shape `(n,)`): h, in nats.
        beta (`float`): strength of the tie to the reference model.
        label_smoothing (`float`): eps, the assumed probability that a label is flipped, in [0, 0.5).

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 at h = 0.
    """
    logits = beta * as_float(margins)
    return -F.logsigmoid(logits) + label_smoothing * logits


def ipo_loss(margins: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """IPO (https://huggingface.co/papers/2310.12036, eq. 17): (h - 1/(2 beta))^2.

    Args:
        margins (`torch.Tensor` of shape `(n,)`): h from log-ratios that are AVERAGED over each completion's tokens, as
            the IPO authors do and TRL does.
        beta (`float`): the paper's tau.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    return (as_float(margins) - 1 / (2 * beta)) ** 2


def hinge_loss(margins: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Hinge loss of SLiC (https://huggingface.co/papers/2305.10425): max(0, 1 - beta h).

    Args:
        margins (`torch.Tensor` of shape `(n,)`): h, in nats.
        beta (`float`): the inverse of the margin.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    return torch.relu(1 - beta * as_float(margins))
