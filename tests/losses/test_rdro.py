"""RDRO against its mathematics: worked examples, naive loops, derivatives, limits and extremes."""

import math

import pytest
import torch

from trl_rdro.losses import rdro_loss


ALPHAS = [0.2, 0.39, 0.5, 0.8]


def naive_softplus(u: float) -> float:
    return max(u, 0.0) + math.log1p(math.exp(-abs(u)))


def naive_rdro(z: float, preferred: bool, alpha: float) -> float:
    return (1 + alpha) * naive_softplus(z) - z if preferred else (1 - alpha) * naive_softplus(z)


def naive_slope(z: float, preferred: bool, alpha: float) -> float:
    sigma = 1 / (1 + math.exp(-z))
    return (1 + alpha) * sigma - 1 if preferred else (1 - alpha) * sigma


def random_samples(n: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(n, generator=generator, dtype=torch.float64)
    return z, torch.rand(n, generator=generator) < 0.4


def test_worked_example():
    # The policy makes both completions three times as likely as the reference does: z = log 3, so sigma(z) = 3/4 and
    # softplus(z) = log(1 + 3) = 2 log 2. With alpha = 1/2:
    #   preferred      3/2 * 2 log 2 - log 3 = 3 log 2 - log 3 = log(8/3),   slope 3/2 * 3/4 - 1 = 1/8
    #   non-preferred  1/2 * 2 log 2 = log 2,                                slope 1/2 * 3/4     = 3/8
    z = torch.full((2,), math.log(3), dtype=torch.float64, requires_grad=True)
    losses = rdro_loss(z, torch.tensor([True, False]), alpha=0.5)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log(8 / 3), math.log(2)], abs=1e-14)
    assert z.grad.tolist() == pytest.approx([1 / 8, 3 / 8], abs=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_a_naive_loop(alpha):
    z, preferred = random_samples()
    z.requires_grad_()
    losses = rdro_loss(z, preferred, alpha)
    losses.sum().backward()
    rows = list(zip(z.tolist(), preferred.tolist(), strict=True))
    assert losses.tolist() == pytest.approx([naive_rdro(*row, alpha) for row in rows], rel=1e-12, abs=1e-14)
    assert z.grad.tolist() == pytest.approx([naive_slope(*row, alpha) for row in rows], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck(alpha):
    z, preferred = random_samples(12)
    assert torch.autograd.gradcheck(lambda z: rdro_loss(z, preferred, alpha), z.requires_grad_())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_constants_where_policy_equals_reference(alpha):
    # (1 + alpha) log 2 and (1 - alpha) log 2, together 2 log 2; the slopes (1 + alpha)/2 - 1 and (1 - alpha)/2 are
    # equal and opposite.
    z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = rdro_loss(z, torch.tensor([True, False]), alpha)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([(1 + alpha) * math.log(2), (1 - alpha) * math.log(2)], abs=1e-15)
    assert losses.sum().item() == pytest.approx(2 * math.log(2), abs=1e-15)
    assert z.grad.tolist() == pytest.approx([-(1 - alpha) / 2, (1 - alpha) / 2], abs=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_preferred_term_is_minimal_at_log_one_over_alpha(alpha):
    # r_alpha = p+/pi_ref cannot exceed 1/alpha, and there the preferred term is flat.
    z = torch.tensor([math.log(1 / alpha) + d for d in (-0.01, 0.0, 0.01)], dtype=torch.float64, requires_grad=True)
    losses = rdro_loss(z, torch.ones(3, dtype=torch.bool), alpha)
    losses.sum().backward()
    assert losses[1] < losses[0] and losses[1] < losses[2]
    assert z.grad[1].item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("label", [True, False])
def test_convex(alpha, label):
    z = torch.linspace(-20, 20, 2001, dtype=torch.float64)
    losses = rdro_loss(z, torch.full(z.shape, label), alpha)
    assert (losses[2:] - 2 * losses[1:-1] + losses[:-2]).min() > -1e-13


def test_alpha_to_zero_is_bco_pair_with_beta_one():
    # TRL's bco_pair at beta 1: -log sigma(z+) - log sigma(-z-), the sum over a pair.
    chosen, rejected = (random_samples(32, seed)[0] for seed in (1, 2))
    ones = torch.ones(32, dtype=torch.bool)
    pairs = rdro_loss(chosen, ones, 1e-14) + rdro_loss(rejected, ~ones, 1e-14)
    expected = [
        math.log1p(math.exp(-z_plus)) + math.log1p(math.exp(z_minus))
        for z_plus, z_minus in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert pairs.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_extremes_are_finite_with_gradients_of_at_most_one(dtype, alpha):
    # Preferred slopes lie in [-1, alpha], non-preferred ones in [0, 1 - alpha], and both ends are reached.
    values = [-1e4, -300.0, -20.0, -1.0, 0.0, 1.0, 20.0, 300.0, 1e4]
    z = torch.tensor(values * 2, dtype=dtype, requires_grad=True)
    preferred = torch.arange(len(z)) < len(values)
    losses = rdro_loss(z, preferred, alpha)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    rows = zip(z.tolist(), preferred.tolist(), strict=True)
    assert losses.tolist() == pytest.approx([naive_rdro(*row, alpha) for row in rows], rel=1e-5, abs=1e-5)
    rounding = torch.finfo(dtype).eps
    slopes = z.grad.float()
    assert -1 <= slopes[preferred].min() and slopes[preferred].max() <= alpha + rounding
    assert 0 <= slopes[~preferred].min() and slopes[~preferred].max() <= 1 - alpha + rounding
    ends = [slopes[0].item(), slopes[len(values) - 1].item(), slopes[len(values)].item(), slopes[-1].item()]
    assert ends == pytest.approx([-1, alpha, 0, 1 - alpha], abs=rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    z, preferred = random_samples()
    z = z.to(dtype)
    assert torch.equal(rdro_loss(z, preferred, 0.39), rdro_loss(z.float(), preferred, 0.39))


@pytest.mark.parametrize("labels", [[], [True, True], [False, False]], ids=["empty", "no rejected", "no chosen"])
def test_missing_samples_keep_the_graph(labels):
    preferred = torch.tensor(labels, dtype=torch.bool)
    z = torch.zeros(len(labels), requires_grad=True)
    losses = rdro_loss(z, preferred, 0.39)
    assert losses.shape == z.shape
    for absent in (True, False):  # the part of a class that is not there contributes zeros, neither None nor NaN
        if absent not in labels:
            (gradient,) = torch.autograd.grad(losses[preferred == absent].sum(), z, retain_graph=True)
            assert torch.equal(gradient, torch.zeros_like(z))
    losses.sum().backward()
    assert z.grad.tolist() == pytest.approx([naive_slope(0.0, label, 0.39) for label in labels], rel=1e-6)
