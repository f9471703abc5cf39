"""Distributionally robust objectives over any pairwise loss: KLDPO, Dr. DPO and WDPO.

KLDPO and WDPO bound the loss under a shift of whose preferences count (https://huggingface.co/papers/2502.01930): over
a Kullback-Leibler ball around the data, and over a Wasserstein ball, through a penalty on the input gradient. Dr. DPO
is KLDPO at a negative temperature: it follows the pairs that go best, a remedy for wrong labels.
"""

import math

import torch

from .precision import as_float


def kldpo_log_weights(losses: torch.Tensor, tau: float, step_losses: torch.Tensor | None = None) -> torch.Tensor:
    """Log-weights of a step's pairs relative to uniform ones: log(N w_i), w = softmax(l / tau).

    Args:
        losses (`torch.Tensor` of shape `(n,)`): pair losses to weigh.
        tau (`float`): temperature, not 0. Positive (KLDPO): pairs of high loss count more; negative (Dr. DPO): those
            of low loss. Large in size: every pair counts the same (DPO). Small: only the worst, or the best, does.
        step_losses (`torch.Tensor` of shape `(N,)`, *optional*): all pair losses of the optimiser step that `losses`
            are part of, over every rank and accumulated micro-batch. Defaults to `losses`.

    Returns:
        `torch.Tensor` of shape `(n,)`: detached. Over a whole step the mean of its exponential is 1. One over the mean
        of the squared exponential is the effective sample size as a fraction of the step.
    """
    losses = as_float(losses.detach())
    if losses.numel() == 0:
        return losses
    step_losses = losses if step_losses is None else as_float(step_losses.detach())
    # The largest weight's, subtracted before the division: losses in the thousands over a small tau keep digits
    top = step_losses.max() if tau > 0 else step_losses.min()
    exponents = (step_losses - top) / tau
    # log mean exp, kept exact where tau is large and the mean close to 1: its error is multiplied by tau again
    mean, mean_less_1 = exponents.exp().mean(), torch.expm1(exponents).mean()
    log_mean = torch.where(mean > 0.5, torch.log1p(mean_less_1), mean.log())
    return (losses - top) / tau - log_mean


def kldpo_tau(step_losses: torch.Tensor, effective_sample_size: float) -> float:
    """The temperature at which KLDPO's weights of an optimiser step have a wanted effective sample size.

    The share 1 / mean (N w_i)^2 rises with tau, from that of the worst pairs to 1, since the logarithm of the moment
    generating function is convex: it is found by bisection. Of normal losses with standard deviation s it is
    exp(-s^2 / tau^2).

    Args:
        step_losses (`torch.Tensor` of shape `(N,)`): all pair losses of the optimiser step.
        effective_sample_size (`float`): as a share of the step, in (0, 1).

    Returns:
        `float`: between 1e-3, below which differences between losses are their rounding (all are equal where policy =
        reference), and 1e9. The nearest of these where the share is not to be had.
    """
    values = as_float(step_losses.detach()).cpu().double()
    low, high = math.log(1e-3), math.log(1e9)
    for _ in range(45):
        middle = (low + high) / 2
        share = 1 / kldpo_log_weights(values, math.exp(middle)).exp().square().mean()
        low, high = (middle, high) if share < effective_sample_size else (low, middle)
    return math.exp(high)


def kldpo_loss(losses: torch.Tensor, tau: float, log_weights: torch.Tensor | None = None) -> torch.Tensor:
    """KLDPO (https://huggingface.co/papers/2502.01930, Algorithm 2, normalised): tau log mean exp(l / tau). At
    tau = -b it is Dr. DPO (https://huggingface.co/papers/2407.07880), -b log mean exp(-l / b).

    The returned values have that objective as their mean, and the mean of their gradients is sum_i w_i grad l_i with w
    the softmax of l / tau, constant. They are the terms of its dual form, mean_i [ N w_i (l_i - tau log(N w_i)) ],
    which, unlike the logarithm of a mean, is a plain sum: micro-batches and ranks can be added up, if `log_weights`
    are those of the whole optimiser step.

    Args:
        losses (`torch.Tensor` of shape `(n,)`): pair losses of this (micro-)batch, with their graph.
        tau (`float`): temperature, not 0.
        log_weights (`torch.Tensor` of shape `(n,)`, *optional*): `kldpo_log_weights` of these pairs in their step.
            Defaults to the step being just `losses`.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    losses = as_float(losses)
    if log_weights is None:
        log_weights = kldpo_log_weights(losses, tau)
    return log_weights.exp() * (losses - tau * log_weights)


def wdpo_penalty(
    grad_norms: torch.Tensor, rho: float, penalty: str = "squared", mean_square: torch.Tensor | None = None
) -> torch.Tensor:
    """WDPO's penalty on the input gradient (https://huggingface.co/papers/2502.01930), to be added to the pair losses.

        squared (what the authors ran)   rho ||g_i||^2
        rms     (their Algorithm 1)      rho sqrt( mean_i ||g_i||^2 )

    where g_i is the gradient of pair i's loss with respect to the embeddings of its two sequences.

    Args:
        grad_norms (`torch.Tensor` of shape `(n,)`): ||g_i||, with their graph when the penalty is to be trained.
        rho (`float`): radius of the ball, >= 0; it has a meaning only together with the loss's beta.
        penalty (`str`): `"squared"` or `"rms"`.
        mean_square (`torch.Tensor`, *optional*): for `"rms"`, the mean of ||g||^2 over all ranks' pairs. Defaults to
            the mean over `grad_norms`.

    Returns:
        `torch.Tensor` of shape `(n,)`: its mean and the mean of its gradients are those of the penalty.

    Raises:
        `ValueError`: for another `penalty`.
    """
    norms = as_float(grad_norms)
    if penalty == "squared":
        return rho * norms**2
    if penalty == "rms":
        if mean_square is None:
            mean_square = norms.detach().square().mean()
        # The tangent of the square root at the current mean: a sum over pairs, with the same value and gradient
        smallest = torch.finfo(norms.dtype).tiny ** 0.5  # below it squares vanish
        return rho * (norms**2 + mean_square) / (2 * mean_square.sqrt().clamp(min=smallest))
    raise ValueError(f"`penalty` must be 'squared' or 'rms', got {penalty!r}.")
