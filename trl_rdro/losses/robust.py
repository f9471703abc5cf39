"""Distributionally robust objectives over any pairwise loss: KLDPO and WDPO.

Both bound the loss under a shift of whose preferences count (https://huggingface.co/papers/2502.01930): KLDPO over a
Kullback-Leibler ball around the data, WDPO over a Wasserstein ball, through a penalty on the input gradient.
"""

import torch

from .precision import as_float


def kldpo_log_weights(losses: torch.Tensor, tau: float, step_losses: torch.Tensor | None = None) -> torch.Tensor:
    """Log-density of KLDPO's worst-case distribution relative to the uniform one: log(N w_i), w = softmax(l / tau).

    Args:
        losses (`torch.Tensor` of shape `(n,)`): pair losses to weigh.
        tau (`float`): temperature, > 0. Large: every pair counts the same (DPO). Small: only the worst does.
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
    worst = step_losses.max()  # subtracted before the division: losses in the thousands over a small tau keep digits
    # log mean exp, kept exact where tau is large and the mean close to 1: its error is multiplied by tau again
    log_mean = torch.log1p(torch.expm1((step_losses - worst) / tau).mean())
    return (losses - worst) / tau - log_mean


def kldpo_loss(losses: torch.Tensor, tau: float, log_weights: torch.Tensor | None = None) -> torch.Tensor:
    """KLDPO (https://huggingface.co/papers/2502.01930, Algorithm 2, normalised): tau log mean exp(l / tau).

    The returned values have that objective as their mean, and the mean of their gradients is sum_i w_i grad l_i with w
    the softmax of l / tau, constant. They are the terms of its dual form, mean_i [ N w_i (l_i - tau log(N w_i)) ],
    which, unlike the logarithm of a mean, is a plain sum: micro-batches and ranks can be added up, if `log_weights`
    are those of the whole optimiser step.

    Args:
        losses (`torch.Tensor` of shape `(n,)`): pair losses of this (micro-)batch, with their graph.
        tau (`float`): temperature, > 0.
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
