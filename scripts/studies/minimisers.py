"""
The exact minimiser of a loss over all policies of a language: where training would end if it were perfect.

With it the noise of the data is seen without that of an optimiser, and for a million completions as easily as for
three hundred.
"""

from collections.abc import Callable
from typing import Any

import torch


# Of log-ratios and of whether each completion is preferred: one loss per completion
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
EXACTLY = {"max_iter": 1000, "history_size": 50, "tolerance_grad": 1e-11, "tolerance_change": 1e-16}


def minimiser(loss: Loss, plus: torch.Tensor, minus: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log-policy, `(draws, outcomes)`, that minimises sum( plus loss(z, preferred) + minus loss(z, not preferred) ).

    Args:
        loss: a loss of single log-ratios, for instance `trl_rdro.losses.rdro_loss` at some alpha.
        plus, minus: what each preferred and each non-preferred outcome counts, `(draws, outcomes)`.
        reference: the reference's probabilities, `(draws, outcomes)` or `(outcomes,)`.
    """
    log_reference = reference.log()
    preferred = torch.ones_like(plus, dtype=torch.bool)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        z = log_policy(logits, log_reference) - log_reference
        return (plus * loss(z, preferred) + minus * loss(z, ~preferred)).sum()

    return log_policy(minimise(objective, torch.zeros_like(plus), **EXACTLY), log_reference)


def margin_minimiser(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], wins: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    """log-policy, `(outcomes,)`, that minimises sum_ij wins_ij loss(z_i, z_j): a loss of pairs at any number of them.

    Args:
        loss: of chosen and rejected log-ratios, for instance `trl_rdro.losses.sigmoid_loss` at some beta.
        wins: how much each (chosen, rejected) counts, `(outcomes, outcomes)`.
        reference: the reference's probabilities, `(outcomes,)`.
    """
    log_reference = reference.log()
    start = torch.zeros_like(reference)
    logits = minimise(lambda z: (wins * loss(z.unsqueeze(1), z)).sum(), start, **EXACTLY)
    return log_policy(logits, log_reference)


def log_policy(logits: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    return (logits + log_reference).log_softmax(dim=-1)


def divergence(target: torch.Tensor, log_policy: torch.Tensor) -> torch.Tensor:
    """KL(target || policy), in nats."""
    return (target * (target.log() - log_policy)).sum(dim=-1)


def minimise(objective: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Where LBFGS, with these settings of PyTorch's, ends from `start`."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], line_search_fn="strong_wolfe", **settings)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = objective(point)
        value.backward()
        return value

    optimizer.step(closure)
    return point.detach()
