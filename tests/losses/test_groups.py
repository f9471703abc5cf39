"""Group-robust DPO: the weights of pairs, and the step of the groups' weights."""

import math

import pytest
import torch

from trl_rdro.losses import grdpo_update, grdpo_weights
from trl_rdro.losses.groups import group_means


GROUPS = torch.tensor([0, 0, 1, 2, 2, 2])
LOSSES = torch.tensor([0.2, 0.4, 1.0, 0.5, 0.7, 0.9], dtype=torch.float64)


def naive_update(weights, losses, groups, eta):
    new = []
    for g, weight in enumerate(weights):
        own = [loss for loss, group in zip(losses, groups, strict=True) if group == g]
        new.append(weight * math.exp(eta * sum(own) / len(own)))
    return [weight / sum(new) for weight in new]


def test_worked_example():
    # Group means 0.3, 1.0, 0.7 and eta = log 2 / 0.1: factors 2^3, 2^10, 2^7
    update = grdpo_update(torch.full((3,), 1 / 3, dtype=torch.float64), LOSSES, GROUPS, math.log(2) / 0.1)
    assert update.tolist() == pytest.approx([8 / 1160, 1024 / 1160, 128 / 1160])


@pytest.mark.parametrize("eta", [0.01, 1.0, 20.0])
def test_update_equals_a_naive_loop(eta):
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = naive_update(weights.tolist(), LOSSES.tolist(), GROUPS.tolist(), eta)
    assert grdpo_update(weights, LOSSES, GROUPS, eta).tolist() == pytest.approx(expected, rel=1e-12)


def test_no_step_leaves_the_weights():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    torch.testing.assert_close(grdpo_update(weights, LOSSES, GROUPS, 0.0), weights)
    empty = grdpo_update(weights, torch.zeros(0), torch.zeros(0, dtype=torch.long), 1.0)
    torch.testing.assert_close(empty, weights)


def test_a_group_that_was_not_drawn_keeps_its_weight():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    update = grdpo_update(weights, LOSSES[:3], GROUPS[:3], 1.0)
    assert update[2] == 0.3 and update.sum().item() == pytest.approx(1)
    assert (update[1] / update[0]).item() == pytest.approx(2.5 * math.exp(1.0 - 0.3))


def test_huge_losses_stay_finite():
    update = grdpo_update(torch.full((3,), 1 / 3), 1e4 * LOSSES.float(), GROUPS, 10.0)
    assert update.tolist() == pytest.approx([0, 1, 0])


def test_the_mean_over_the_training_set_is_the_weighted_mean_of_the_groups():
    weights, sizes = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([2, 1, 3])
    objective = (grdpo_weights(weights, sizes, GROUPS) * LOSSES).mean().item()
    assert objective == pytest.approx(0.2 * 0.3 + 0.5 * 1.0 + 0.3 * 0.7)


def test_one_group_and_equal_groups_are_dpo():
    ones = torch.ones(4, dtype=torch.float64)
    assert torch.equal(grdpo_weights(torch.ones(1).double(), torch.tensor([9]), torch.zeros(4).long()), ones)
    quarter = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.equal(grdpo_weights(quarter, torch.full((4,), 7), torch.arange(4)), ones)


def test_weights_follow_the_worst_group():
    """Against a fixed set of losses the weights go to the group whose loss is largest."""
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    for _ in range(200):
        weights = grdpo_update(weights, LOSSES, GROUPS, 0.2)
    assert weights[1] > 0.99


def test_a_weight_of_two_is_the_pair_twice():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    pair_weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    rows = torch.tensor([0, 1, 1, 2, 3, 5])
    expected = grdpo_update(weights, LOSSES[rows], GROUPS[rows], 1.0)
    torch.testing.assert_close(grdpo_update(weights, LOSSES, GROUPS, 1.0, pair_weights), expected)
    sizes = group_means(LOSSES, GROUPS, 3, pair_weights)[0]
    torch.testing.assert_close(sizes, group_means(LOSSES[rows], GROUPS[rows], 3)[0])


def test_a_group_of_size_0_has_no_part():
    sizes = torch.tensor([2.0, 0.0, 3.0])
    weights = grdpo_weights(torch.tensor([0.4, 0.0, 0.6]), sizes, torch.tensor([0, 1, 2]))
    assert weights.tolist() == pytest.approx([0.4 * 5 / 2, 0, 0.6 * 5 / 3])
