"""GDPO and DPO-PRO: worked examples, limits, and DPO-PRO's worst label against a grid."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_rdro.losses import dpopro_loss, gdpo_loss, sigmoid_loss


LOG3 = math.log(3)
Z = 4 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def probabilities(value: float) -> torch.Tensor:
    return torch.full((64,), value, dtype=torch.float64)


def test_worked_examples():
    # u = 2 log 3: at p = 3/4 gdpo sees half of it
    z, zero = torch.tensor([2 * LOG3], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert gdpo_loss(z, zero, torch.tensor([0.75]), beta=1.0).item() == pytest.approx(math.log(4 / 3))
    # u = log 3, q = 0.8, rho = 1/4: the worst p is 0.8 - sqrt(0.04) = 0.6, so the loss is log(4/3) + 0.4 log 3
    q = torch.tensor([0.8], dtype=torch.float64)
    assert dpopro_loss(z / 2, zero, q, beta=1.0, rho=0.25).item() == pytest.approx(math.log(4 / 3) + 0.4 * LOG3)
    # u = -log 3: the worst p is 1, as 0.8 + 0.2 allows
    assert dpopro_loss(zero, z / 2, q, beta=1.0, rho=0.25).item() == pytest.approx(math.log(4))


def test_certain_labels_are_dpo():
    torch.testing.assert_close(gdpo_loss(*Z, probabilities(1.0)), sigmoid_loss(*Z), rtol=1e-15, atol=0)
    torch.testing.assert_close(dpopro_loss(*Z, probabilities(1.0)), sigmoid_loss(*Z), rtol=1e-15, atol=0)


def test_a_tie_teaches_gdpo_nothing():
    z = Z.clone().requires_grad_()
    gdpo_loss(z[0], z[1], probabilities(0.5)).sum().backward()
    assert (z.grad == 0).all()


@pytest.mark.parametrize("q", [0.5, 0.7, 0.95])
def test_dpopro_without_a_ball_is_soft_label_dpo(q):
    u = 0.1 * (Z[0] - Z[1])
    expected = -q * F.logsigmoid(u) - (1 - q) * F.logsigmoid(-u)
    torch.testing.assert_close(dpopro_loss(*Z, probabilities(q), rho=0.0), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rho", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("q", [0.5, 0.6, 0.75, 0.9, 0.99])
def test_dpopros_label_is_the_worst_in_the_ball(q, rho):
    u = Z[0] - Z[1]
    radius = math.sqrt(rho * q * (1 - q))
    grid = torch.linspace(max(q - radius, 0), min(q + radius, 1), 2001, dtype=torch.float64).unsqueeze(1)
    worst = (-grid * F.logsigmoid(u) - (1 - grid) * F.logsigmoid(-u)).amax(dim=0)
    torch.testing.assert_close(dpopro_loss(*Z, probabilities(q), beta=1.0, rho=rho), worst, rtol=1e-12, atol=1e-14)
