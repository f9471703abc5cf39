"""Ada-DPO: the inner minimum against a grid of temperatures, its regimes, and the limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_rdro.losses import adadpo_loss, sigmoid_loss


LOG2 = math.log(2)
Z = 20 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_worked_example():
    # The label's entropy at sigma = 3/4 is H = log 4 - 3/4 log 3. With rho0 = log 2 - H the minimum has
    # u / tau = log 3 for every pair within the bounds: the loss is tau log(4/3) - H tau, the slope in u -1/4.
    entropy = math.log(4) - 0.75 * math.log(3)
    u = torch.tensor([2 * math.log(3), -2 * math.log(3)], dtype=torch.float64, requires_grad=True)
    values = adadpo_loss(u, torch.zeros_like(u), beta=1.0, rho0=LOG2 - entropy)
    (slope,) = torch.autograd.grad(values.sum(), u)
    assert values.tolist() == pytest.approx([2 * (math.log(4 / 3) - entropy), 2 * (math.log(4) - entropy)])
    assert slope.tolist() == pytest.approx([-1 / 4, -3 / 4])


@pytest.mark.parametrize("rho0", [1e-4, 0.01, 0.1, 0.5, 0.69, 0.7, 2.0])
def test_no_temperature_of_a_grid_is_better(rho0):
    u = Z[0] - Z[1]
    grid = torch.logspace(math.log10(0.1), math.log10(5), 4001, dtype=torch.float64).unsqueeze(1)
    objective = -grid * F.logsigmoid(u / grid) + (rho0 - LOG2) * grid
    best = objective.amin(dim=0)
    values = adadpo_loss(*Z, beta=1.0, rho0=rho0)
    assert (values <= best + 1e-13).all()
    torch.testing.assert_close(values, best, rtol=1e-5, atol=1e-6)


def test_one_temperature_is_dpo_at_beta_over_tau():
    for tau in (0.5, 1.0, 4.0):
        values = adadpo_loss(*Z, beta=0.1, rho0=0.1, tau_min=tau, tau_max=tau)
        expected = tau * sigmoid_loss(*Z, beta=0.1 / tau) + (0.1 - LOG2) * tau
        torch.testing.assert_close(values, expected, rtol=1e-13, atol=1e-14)


def test_ambiguous_pairs_get_the_smallest_temperature():
    # so that they are pulled as by DPO at beta / tau_min
    z = torch.tensor([1e-3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(adadpo_loss(z, torch.zeros(1), beta=0.1).sum(), z)
    assert slope.item() == pytest.approx(-0.1 * torch.sigmoid(torch.tensor(-1e-3)).item(), rel=1e-6)


def test_the_gradient_is_that_of_the_minimum_not_of_one_temperature():
    # By the envelope theorem the moving temperature adds nothing: gradcheck moves it
    u = torch.linspace(-4, 4, 17, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: adadpo_loss(u, torch.zeros_like(u), beta=1.0, tau_min=1e-3), u)
