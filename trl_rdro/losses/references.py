"""A pair loss with two reference models: MRPO."""

import torch

from .pairwise import sigmoid_loss
from .precision import as_float


def mrpo_reference(
    own: torch.Tensor, other: torch.Tensor, alpha: float | None = None, clip: float | None = 0.1
) -> torch.Tensor:
    """The reference that MRPO (https://huggingface.co/papers/2405.16388) makes of two: their weighted harmonic mean,

        1 / pi  =  alpha / pi_other + (1 - alpha) / pi_own .

    Args:
        own (`torch.Tensor` of shape `(2, n)`): log-probabilities under the reference the policy started from, of the
            chosen and of the rejected completions.
        other (`torch.Tensor` of shape `(2, n)`): the same under the second reference.
        alpha (`float`, *optional*): weight of the second reference, in [0, 1]. If `None`, |D_other| / (|D_other| +
            |D_own|) for each pair, where D is the reference's own margin between chosen and rejected (1/2 where both
            are 0).
        clip (`float`, *optional*): eps > 0: the second reference's log-probabilities are kept within (1 +- eps) times
            those of the first. Released runs: 0.1, shared out between chosen and rejected. If `None`, they are free.

    Returns:
        `torch.Tensor` of shape `(2, n)`: log pi.
    """
    own, other = as_float(own), as_float(other)
    if clip is not None:
        bounds = torch.stack([(1 - clip) * own, (1 + clip) * own])
        other = other.clamp(bounds.amin(dim=0), bounds.amax(dim=0))
    if alpha is None:
        margin, total = (other[0] - other[1]).abs(), (other[0] - other[1]).abs() + (own[0] - own[1]).abs()
        weight = torch.where(total > 0, margin / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    else:
        weight = torch.full_like(own[0], alpha)
    return -torch.logaddexp(weight.log() - other, torch.log1p(-weight) - own)


def mrpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    own: torch.Tensor,
    other: torch.Tensor,
    beta: float = 0.1,
    alpha: float | None = None,
    clip: float | None = 0.1,
) -> torch.Tensor:
    """MRPO: DPO with the reference `mrpo_reference`.

    Args:
        chosen (`torch.Tensor` of shape `(n,)`): log-ratios of the chosen completions to the first reference, in nats.
        rejected (`torch.Tensor` of shape `(n,)`): log-ratios of the rejected completions to it, in nats.
        own, other, alpha, clip: as for `mrpo_reference`.
        beta (`float`): strength of the tie to the reference.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where the policy equals both references.
    """
    shift = as_float(own) - mrpo_reference(own, other, alpha, clip)
    return sigmoid_loss(as_float(chosen) + shift[0], as_float(rejected) + shift[1], beta)
