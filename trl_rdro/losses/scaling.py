"""A pair loss with a temperature for each pair: Ada-DPO."""

import math

import torch
import torch.nn.functional as F

from .precision import margins


def adadpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    beta: float = 0.1,
    rho0: float = 0.1,
    tau_min: float = 0.1,
    tau_max: float = 5.0,
) -> torch.Tensor:
    """Ada-DPO (https://huggingface.co/papers/2406.02764): min over tau in [tau_min, tau_max] of

        -tau log sigma(u / tau) + (rho0 - log 2) tau ,        u = beta (z_chosen - z_rejected)

    Ambiguous pairs get a small tau, clear ones a large one. At the minimum the gradient is that at a constant tau.

    Args:
        chosen (`torch.Tensor` of shape `(n,)`): log-ratios of the chosen completions, in nats.
        rejected (`torch.Tensor` of shape `(n,)`): log-ratios of the rejected completions, in nats.
        beta (`float`): strength of the tie to the reference model. With tau_min = tau_max = tau this is tau times DPO
            at beta / tau, up to a constant.
        rho0 (`float`): > 0. Larger: smaller temperatures; from log 2 on all are tau_min.
        tau_min, tau_max (`float`): 0 < tau_min <= tau_max.

    Returns:
        `torch.Tensor` of shape `(n,)`: rho0 tau_min where policy = reference.
    """
    u = beta * margins(chosen, rejected)
    tau = (u.detach().abs() / _scaled_margin_at_the_minimum(rho0)).clamp(tau_min, tau_max)
    return (rho0 - math.log(2)) * tau - tau * F.logsigmoid(u / tau)


def _scaled_margin_at_the_minimum(rho0: float) -> float:
    """The v = |u| / tau at which the objective of `adadpo_loss` is flat in tau, the same for all pairs.

    Its derivative in tau is H(sigma(u / tau)) - (log 2 - rho0), where H(sigma(v)) = log(1 + e^-v) + v / (1 + e^v) is
    the entropy of a label that is right with probability sigma(v). It falls from log 2 at v = 0 to 0; found by
    bisection. Infinite where rho0 >= log 2: the objective rises with tau everywhere.
    """
    target = math.log(2) - rho0
    if target <= 0:
        return math.inf
    low, high = 0.0, 700.0
    for _ in range(100):
        v = (low + high) / 2
        low, high = (v, high) if math.log1p(math.exp(-v)) + v / (1 + math.exp(v)) > target else (low, v)
    return high
