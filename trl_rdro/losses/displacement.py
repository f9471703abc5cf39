"""Pair losses against displacement, the fall of the chosen completion's likelihood together with the rejected one's:
chi-PO, DPO-Positive and Minor DPO.

DPO sees a pair only through z_chosen - z_rejected, so both may fall as long as the rejected one falls faster. These
look at the two log-ratios themselves.
"""

import torch
import torch.nn.functional as F

from .precision import as_float


LARGEST_EXPONENT = 88.0  # e^88 is the last power that float32 can hold


def chipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1, clip: float = 1.0) -> torch.Tensor:
    """chi-PO (https://huggingface.co/papers/2407.13399): -log sigma( clip( beta (phi(z_chosen) - phi(z_rejected)) ) )
    with phi(z) = e^z + z, which ties the policy to the reference by a chi-squared divergence beside the KL divergence.

    Args:
        chosen (`torch.Tensor` of shape `(n,)`): log-ratios of the chosen completions, in nats.
        rejected (`torch.Tensor` of shape `(n,)`): log-ratios of the rejected completions, in nats.
        beta (`float`): strength of the tie to the reference model.
        clip (`float`): R, the largest reward, > 0: the scaled difference is clipped to [-2 R, 2 R], beyond which a
            pair has no gradient.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where policy = reference.
    """

    def phi(z: torch.Tensor) -> torch.Tensor:
        z = as_float(z)
        return z.clamp(max=LARGEST_EXPONENT).exp() + z

    return -F.logsigmoid((beta * (phi(chosen) - phi(rejected))).clamp(-2 * clip, 2 * clip))


def dpop_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1, penalty: float = 50.0) -> torch.Tensor:
    """DPO-Positive (https://huggingface.co/papers/2402.13228): -log sigma( beta (h - lambda max(0, -z_chosen)) )
    with h = z_chosen - z_rejected: each nat that the chosen completion falls below the reference costs lambda of h.

    Args:
        chosen, rejected, beta: as for `chipo_loss`.
        penalty (`float`): lambda, >= 0. 0 is DPO.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where policy = reference.
    """
    chosen, rejected = as_float(chosen), as_float(rejected)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


def minor_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Minor DPO (https://huggingface.co/papers/2408.09834): -log sigma( beta (z_chosen - max(0, z_rejected)) ). A
    rejected completion is pushed down to its likelihood under the reference and no further.

    Args:
        chosen, rejected, beta: as for `chipo_loss`.

    Returns:
        `torch.Tensor` of shape `(n,)`: log 2 where policy = reference. Where z_rejected > 0 this is DPO.
    """
    return -F.logsigmoid(beta * (as_float(chosen) - torch.relu(as_float(rejected))))
