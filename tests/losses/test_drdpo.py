"""Dr. DPO, -b log mean exp(-l / b): the same weights over a step as KLDPO's, at a negative temperature."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from trl_rdro.losses import kldpo_log_weights, kldpo_loss


SIZES = [0.005, 0.05, 0.5, 1.0, 5.0, 100.0]


def random_losses(n: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def test_worked_example():
    # Losses 0 and b log 3: exp(-l / b) is 1 and 1/3, so w = (3/4, 1/4) and the objective is -b log(2/3)
    b = 0.5
    losses = torch.tensor([0.0, b * math.log(3)], dtype=torch.float64, requires_grad=True)
    objective = kldpo_loss(losses, -b).mean()
    objective.backward()
    assert objective.item() == pytest.approx(b * math.log(1.5))
    assert losses.grad.tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("sign", [1, -1], ids=["kldpo", "drdpo"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [1, 8, 64])
def test_value_and_gradient_agree_with_the_plain_formula_to_fifteen_digits(n, size, sign):
    getcontext().prec = 60
    losses, tau = random_losses(n, seed=n).requires_grad_(), sign * size
    objective = kldpo_loss(losses, tau).mean()
    (gradient,) = torch.autograd.grad(objective, losses)
    terms = [(Decimal(loss) / Decimal(tau)).exp() for loss in losses.tolist()]
    expected = Decimal(tau) * (sum(terms) / n).ln()
    assert abs(Decimal(objective.item()) / expected - 1) < Decimal("3e-15")
    for slope, term in zip(gradient.tolist(), terms, strict=True):
        assert abs(Decimal(slope) - term / sum(terms)) < Decimal("3e-15")


@pytest.mark.parametrize("b", [0.05, 0.5, 5.0])
def test_gradcheck(b):
    assert torch.autograd.gradcheck(lambda x: kldpo_loss(x, -b).mean(), random_losses().requires_grad_())


def test_small_b_is_the_best_pair_and_large_b_the_mean():
    losses = torch.tensor([0.3, 0.9, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(kldpo_loss(losses, -1e-3).mean(), losses)
    assert gradient.tolist() == pytest.approx([0, 0, 1, 0], abs=1e-12)
    objective = kldpo_loss(losses, -1e6).mean()
    (gradient,) = torch.autograd.grad(objective, losses)
    assert objective.item() == pytest.approx(0.5, abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.25] * 4, rel=1e-6)


def test_it_lies_below_the_mean_as_kldpo_lies_above():
    losses = random_losses()
    assert kldpo_loss(losses, -0.5).mean() < losses.mean() < kldpo_loss(losses, 0.5).mean()


def test_one_pair_is_dpo():
    losses = random_losses(1).requires_grad_()
    objective = kldpo_loss(losses, -0.1).mean()
    assert objective.item() == pytest.approx(losses.item())
    assert torch.autograd.grad(objective, losses)[0].item() == 1


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5]], ids=str)
def test_micro_batches_add_up_to_the_step(sizes):
    theta = random_losses().requires_grad_()
    whole = kldpo_loss(theta.square(), -0.5).mean()
    expected = torch.autograd.grad(whole, theta)[0]
    value, gradient = 0.0, torch.zeros_like(theta)
    for part in torch.arange(8).split(sizes):
        losses = theta[part].square()
        log_weights = kldpo_log_weights(losses, -0.5, theta.detach().square())
        contribution = kldpo_loss(losses, -0.5, log_weights).mean() * len(part) / 8
        value += contribution.item()
        gradient += torch.autograd.grad(contribution, theta)[0]
    assert value == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b", [0.005, 1.0, 1e6])
def test_huge_losses_are_finite_with_gradients_of_a_softmax(dtype, b):
    losses = torch.tensor([1e4, 0.0, 5e3, 1e4, 1e-3], dtype=dtype, requires_grad=True)
    values = kldpo_loss(losses, -b)
    values.mean().backward()
    assert values.dtype == torch.float32 and values.isfinite().all()
    weights = torch.softmax(-losses.detach().double() / b, dim=0).tolist()
    assert losses.grad.tolist() == pytest.approx(weights, rel=2 * torch.finfo(dtype).eps + 1e-6, abs=1e-7)
