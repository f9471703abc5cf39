"""Group-robust DPO: pairs weighed by the group they come from, groups by how badly they fare."""

import torch


def group_means(
    values: torch.Tensor, groups: torch.Tensor, number: int, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the values of each group.

    Args:
        values (`torch.Tensor` of shape `(n,)`).
        groups (`torch.Tensor` of shape `(n,)`, int): the group of each value, in 0..number-1.
        number (`int`): of groups.
        weights (`torch.Tensor` of shape `(n,)`, *optional*): of the values, >= 0.

    Returns:
        Two `torch.Tensor` of shape `(number,)`: the means, 0 for a group without values (or without weight), and
        whether the group has any.
    """
    values = values.detach()
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    totals = values.new_zeros(number).index_add_(0, groups, weights)
    sums = values.new_zeros(number).index_add_(0, groups, weights * values)
    present = totals > 0
    return torch.where(present, sums / totals, 0.0), present


def grdpo_weights(group_weights: torch.Tensor, group_sizes: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Weights under which the mean over pairs is sum_g a_g mean_{i in g} l_i, GRPO's objective for fixed a
    (https://huggingface.co/papers/2405.20304): a_g N / N_g for a pair of group g.

    With N_g counted on the whole training set they are constants during a step, so that the estimate is unbiased for
    every composition of a batch.

    Args:
        group_weights (`torch.Tensor` of shape `(k,)`): a, positive, with sum 1; 0 of a group of size 0.
        group_sizes (`torch.Tensor` of shape `(k,)`): N_g, pairs of each group in the training set (or the sum of their
            weights, if they have any).
        groups (`torch.Tensor` of shape `(n,)`, int): the group of each pair, in 0..k-1.

    Returns:
        `torch.Tensor` of shape `(n,)`: 1 for equal weights and groups of one size, 0 for a group of size 0.
    """
    factors = group_weights * group_sizes.sum() / group_sizes
    return torch.where(group_sizes > 0, factors, 0.0)[groups]


def grdpo_update(
    group_weights: torch.Tensor,
    losses: torch.Tensor,
    groups: torch.Tensor,
    eta: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """GRPO's step towards the worst group after an optimiser step: a_g times exp(eta mean_g l), normalised.

    Groups without a pair in the step keep their weight, and the others share theirs: otherwise rare groups, which
    this is to protect, would lose weight whenever they are not drawn.

    Args:
        group_weights (`torch.Tensor` of shape `(k,)`): a, positive, with sum 1.
        losses (`torch.Tensor` of shape `(N,)`): unweighted losses of all pairs of the step.
        groups (`torch.Tensor` of shape `(N,)`, int): the group of each pair, in 0..k-1.
        eta (`float`): >= 0. 0 leaves the weights as they are.
        weights (`torch.Tensor` of shape `(N,)`, *optional*): of the pairs in their group's mean.

    Returns:
        `torch.Tensor` of shape `(k,)`.
    """
    means, present = group_means(losses.to(group_weights.dtype), groups, len(group_weights), weights)
    logits = (group_weights.log() + eta * means).masked_fill(~present, -torch.inf)
    shared = (group_weights * present).sum()
    return torch.where(present, shared * logits.softmax(dim=0), group_weights)
