"""Density-ratio losses: DDRO and RDRO.

Both fit the ratio of the policy to the reference, r = exp(z), so that the policy itself converges to the distribution
of preferred completions, whatever the structure of the preferences. Both are sums of two expectations, one over
preferred and one over non-preferred completions, so they need labels but not pairs: a pair is simply two samples.

z is the log-ratio log pi_theta(y|x) - log pi_ref(y|x), summed over the tokens of the completion. There is no beta.
"""

import math

import torch
import torch.nn.functional as F

from .precision import as_float


Share = float | torch.Tensor


def rdro_loss(logratios: torch.Tensor, preferred: torch.Tensor, alpha: Share = 0.5) -> torch.Tensor:
    """Relative density ratio optimisation (https://huggingface.co/papers/2604.04410), one loss per completion.

        preferred       (1 + alpha) softplus(z) - z
        non-preferred   (1 - alpha) softplus(z)

    Convex in z with |gradient| <= 1. At z = 0 the two are (1 + alpha) log 2 and (1 - alpha) log 2. Implemented
    from the paper's mathematics alone.

    Args:
        logratios (`torch.Tensor` of shape `(n,)`): z, in nats, summed over the completion's tokens.
        preferred (`torch.Tensor` of shape `(n,)`, bool): whether each completion is a preferred one.
        alpha (`float` or `torch.Tensor` of shape `(n,)`): preferred share of the reference, pi_ref = alpha p+ +
            (1 - alpha) p-, in (0, 1); of all prompts, or of each completion's.

    Returns:
        `torch.Tensor` of shape `(n,)`: float32 (float64 for float64 input). To estimate the objective, average with
        `class_weights` (unpaired data) or sum the two terms of each pair and average over pairs.
    """
    z = as_float(logratios)
    # (1 + alpha) sp(z) - z = sp(-z) + alpha sp(z): no cancellation at large z
    return torch.where(preferred, -F.logsigmoid(z) - alpha * F.logsigmoid(-z), -(1 - alpha) * F.logsigmoid(-z))


def ddro_loss(logratios: torch.Tensor, preferred: torch.Tensor, t: Share = 0.5, cap: float = 0.99) -> torch.Tensor:
    """Direct density ratio optimisation (https://huggingface.co/papers/2505.07558), one loss per completion.

        preferred       log( (1/r + 1 - 2t) / (1 - t) )          (t = 1/2: log 2 - z)
        non-preferred   log( (1 + (1 - 2t) r) / (1 - t r) )      (t = 1/2: log 2 - log(2 - r), up to its pole at r = 2)

    valid for r < 1/t. Above r = cap/t terms with a singularity go on as their tangents, linearly in z: the loss stays
    continuous and monotone, finite for every finite z, its gradient bounded. Both terms are log 2 at z = 0, for any t.

    For t > 1/2 the preferred term has a singularity of its own, at 1/(2t - 1) > 1/t. It is continued from cap/t all
    the same: between the two points it would fall ever faster while the tangent of the non-preferred term rises at its
    fixed slope, and their sum would sink below a minimum that lies before the cap.

    Args:
        logratios (`torch.Tensor` of shape `(n,)`): z, in nats, summed over the completion's tokens.
        preferred (`torch.Tensor` of shape `(n,)`, bool): whether each completion is a preferred one.
        t (`float` or `torch.Tensor` of shape `(n,)`): share of preferred completions in the reference, pi_ref = t p+ +
            (1 - t) p-; in (0, 1). Of all prompts, or of each completion's.
        cap (`float`): fraction of the pole 1/t up to which the exact loss is used; in (0, 1). The minimiser is p+ as
            long as t max p+/pi_ref < cap; below that the cap buys stability with bias.

    Returns:
        `torch.Tensor` of shape `(n,)`: float32 (float64 for float64 input). Averaged as for `rdro_loss`.
    """
    z = as_float(logratios)
    z_cap = _log(cap / t)
    below = z.clamp(max=z_cap)
    beyond = z - below
    c = 1 - 2 * t
    at_cap = 1 + c * cap / t  # 1 + (1 - 2t) r at the cap
    slope = cap * (1 - t) / (t * at_cap * (1 - cap))
    r = below.exp()
    one_minus_tr = (1 - cap) - cap * torch.expm1(below - z_cap)  # >= 1 - cap also when 1 - t r would round to less
    nonpreferred = torch.log1p(c * r) - one_minus_tr.log() + slope * beyond
    # For t < 1/2 there is no singularity: log(1/r + 1 - 2t) exactly, in a form that cannot overflow
    if isinstance(t, torch.Tensor):
        smooth = torch.logaddexp(-z, (1 - 2 * t).clamp(min=1e-30).log())
        preferred_term = torch.where(t < 0.5, smooth, -below + torch.log1p(c * r) - beyond / at_cap)
    elif t < 0.5:
        preferred_term = torch.logaddexp(-z, torch.full_like(z, math.log(c)))
    else:
        preferred_term = -below + torch.log1p(c * r) - beyond / at_cap
    log_rest = torch.log1p(-t) if isinstance(t, torch.Tensor) else math.log1p(-t)
    return torch.where(preferred, preferred_term - log_rest, nonpreferred)


def _log(share: Share) -> Share:
    return share.log() if isinstance(share, torch.Tensor) else math.log(share)


def ddro_beyond_cap(logratios: torch.Tensor, t: Share = 0.5, cap: float = 0.99) -> torch.Tensor:
    """Which completions lie beyond the cap of `ddro_loss`: r > cap/t. Bool tensor of the shape of `logratios`.

    Non-preferred ones there show the instability that the cap contains; preferred ones, that the reference is not the
    mixture t p+ + (1 - t) p-, under which r < 1/t.
    """
    return as_float(logratios) > _log(cap / t)


def class_weights(preferred: torch.Tensor, preferred_fraction: Share) -> torch.Tensor:
    """Weights under which the mean over labelled samples estimates E_{p+}[loss] + E_{p-}[loss].

    1/pi for preferred and 1/(1 - pi) for non-preferred samples, where pi is the preferred fraction of the whole
    TRAINING SET. As constants they keep every batch composition unbiased, a batch without one of the classes included,
    and the same under gradient accumulation and data parallelism; the class means of a batch would be neither. A plain
    mean over the batch estimates pi E_{p+} + (1 - pi) E_{p-}, whose minimiser is p+ only at pi = 1/2.

    Args:
        preferred (`torch.Tensor` of shape `(n,)`, bool): whether each completion is a preferred one.
        preferred_fraction (`float` or `torch.Tensor` of shape `(n,)`): pi, in (0, 1); of all prompts, or of each
            completion's.

    Returns:
        `torch.Tensor` of shape `(n,)`, float32.
    """
    if isinstance(preferred_fraction, torch.Tensor):
        return torch.where(preferred, 1 / preferred_fraction, 1 / (1 - preferred_fraction))
    weights = torch.full(preferred.shape, 1 / (1 - preferred_fraction), device=preferred.device)
    return weights.masked_fill(preferred, 1 / preferred_fraction)
