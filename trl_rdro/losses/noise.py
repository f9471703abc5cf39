"""Pair losses for labels that may be flipped: cDPO, Hölder-DPO, ROPO and RE-PO.

cDPO is told how often. The other three let go of pairs that the policy contradicts strongly: there their slope
falls with the margin ("redescending"), where DPO's is at its largest.

Everywhere u = beta (z_chosen - z_rejected) and s = sigma(u), the policy's belief in the label.
"""

import torch
import torch.nn.functional as F

from .groups import group_means
from .pairwise import sigmoid_loss
from .precision import margins


def cdpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1, label_smoothing: float = 0.1
) -> torch.Tensor:
    """Conservative DPO (a note of the DPO authors, https://huggingface.co/papers/2305.18290): the loss expected when a
    share eps of the labels is flipped, -(1 - eps) log sigma(u) - eps log sigma(-u).

    Args:
        chosen (`torch.Tensor` of shape `(n,)`): log-ratios of the chosen completions, in nats.
        rejected (`torch.Tensor` of shape `(n,)`): log-ratios of the rejected completions, in nats.
        beta (`float`): strength of the tie to the reference model.
        label_smoothing (`float`): eps, in [0, 0.5). 0 is DPO.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where policy = reference.
    """
    return sigmoid_loss(chosen, rejected, beta, label_smoothing)


def holder_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1, gamma: float = 2.0) -> torch.Tensor:
    """Hölder-DPO (https://huggingface.co/papers/2505.17859): gamma s^(1 + gamma) - (1 + gamma) s^gamma.

    Its slope in u, -gamma (1 + gamma) s^gamma (1 - s)^2, vanishes on both sides. Values lie in (-1, 0).

    Args:
        chosen, rejected, beta: as for `cdpo_loss`.
        gamma (`float`): > 0. Larger: sooner lets go of contradicted pairs.

    Returns:
        `torch.Tensor` of shape `(n,)`: gamma / 2^(1 + gamma) - (1 + gamma) / 2^gamma where policy = reference.
    """
    u = beta * margins(chosen, rejected)
    return -(gamma * F.logsigmoid(u)).exp() * (1 + gamma * torch.sigmoid(-u))


def ropo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1, alpha: float = 14.0) -> torch.Tensor:
    """The loss of ROPO (https://huggingface.co/papers/2404.04102): 4 a / (1 + a)^2 [ a sigma(-u) - log sigma(u) ].

    Its slope in u, -4 a / (1 + a)^2 (1 - s) (1 + a s), is steepest, -1, at s = (a - 1) / (2 a) for a >= 1. As u
    falls it goes to -4 a / (1 + a)^2, which is small for a large a. The paper's filtering of pairs is not part of it.

    Args:
        chosen, rejected, beta: as for `cdpo_loss`.
        alpha (`float`): a, > 0. Small: proportional to DPO.

    Returns:
        `torch.Tensor` of shape `(n,)`: 4 a / (1 + a)^2 (log 2 + a / 2) where policy = reference.
    """
    u = beta * margins(chosen, rejected)
    return 4 * alpha / (1 + alpha) ** 2 * (alpha * torch.sigmoid(-u) - F.logsigmoid(u))


def repo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, eta: float | torch.Tensor = 0.9, beta: float = 0.1
) -> torch.Tensor:
    """RE-PO (https://huggingface.co/papers/2509.24159): -log( eta s + (1 - eta) (1 - s) ), the likelihood of a label
    that is right with probability eta.

    Its slope in u is s - w with w = `repo_posterior`, as in the M-step of the paper's EM; eta is estimated beside the
    policy by `repo_update`.

    Args:
        chosen, rejected, beta: as for `cdpo_loss`.
        eta (`float` or `torch.Tensor` of shape `(n,)`): reliability of the pairs' labels, in (0, 1]. 1 is DPO.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where policy = reference, for any eta.
    """
    return -torch.logaddexp(*_right_and_wrong(chosen, rejected, eta, beta))


def repo_posterior(
    chosen: torch.Tensor, rejected: torch.Tensor, eta: float | torch.Tensor = 0.9, beta: float = 0.1
) -> torch.Tensor:
    """RE-PO's E-step: w = eta s / (eta s + (1 - eta) (1 - s)), the probability that each label is right.

    Args:
        chosen, rejected, eta, beta: as for `repo_loss`.

    Returns:
        `torch.Tensor` of shape `(n,)`: detached.
    """
    right, wrong = _right_and_wrong(chosen.detach(), rejected.detach(), eta, beta)
    return torch.sigmoid(right - wrong)


def repo_update(
    eta: torch.Tensor,
    posteriors: torch.Tensor,
    annotators: torch.Tensor,
    rate: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """RE-PO's estimate of the labels' reliability after an optimiser step: eta + rate (mean posterior - eta).

    Args:
        eta (`torch.Tensor` of shape `(k,)`): reliability of each annotator so far.
        posteriors (`torch.Tensor` of shape `(N,)`): `repo_posterior` of all pairs of the step.
        annotators (`torch.Tensor` of shape `(N,)`, int): the annotator of each pair, in 0..k-1.
        rate (`float`): in [0, 1].
        weights (`torch.Tensor` of shape `(N,)`, *optional*): of the pairs in the mean.

    Returns:
        `torch.Tensor` of shape `(k,)`. Annotators without a pair in the step keep their eta.
    """
    means, present = group_means(posteriors.to(eta.dtype), annotators, len(eta), weights)
    return torch.where(present, eta + rate * (means - eta), eta)


def _right_and_wrong(
    chosen: torch.Tensor, rejected: torch.Tensor, eta: float | torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log( eta s ) and log( (1 - eta) (1 - s) ), `(n,)` each."""
    u = beta * margins(chosen, rejected)
    eta = torch.as_tensor(eta, dtype=u.dtype, device=u.device)
    return eta.log() + F.logsigmoid(u), torch.log1p(-eta) + F.logsigmoid(-u)
