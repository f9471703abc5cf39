"""KLDPO against its formula: tau log mean exp(l / tau), whose gradient weighs the pairs by w = softmax(l / tau).

A sum over micro-batches has to give the logarithm of a mean over the whole optimiser step. It does through the dual
form: with the weights of the WHOLE step of N pairs,

    N w_i (l_i - tau log(N w_i)) = N w_i (l_i - l_i + tau log mean exp(l / tau)) = N w_i * objective ,

so that the mean over all pairs is the objective, sum_i w_i being 1, and a micro-batch of n pairs contributes n/N of
its own mean. With w constant the gradient of that mean is sum_i w_i grad l_i.
"""

import math

import pytest
import torch

from trl_rdro.losses import kldpo_log_weights, kldpo_loss, kldpo_tau


TAUS = [0.005, 0.05, 0.5, 1.0, 5.0, 100.0]


def naive_weights(losses: list[float], tau: float) -> list[float]:
    worst = max(losses)
    terms = [math.exp((loss - worst) / tau) for loss in losses]
    return [term / sum(terms) for term in terms]


def naive_objective(losses: list[float], tau: float) -> float:
    worst = max(losses)
    return worst + tau * math.log(sum(math.exp((loss - worst) / tau) for loss in losses) / len(losses))


def random_losses(n: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def effective_share(log_weights: torch.Tensor) -> float:
    """1 / sum(w^2) relative to the batch, with w_i = exp(log_weights_i) / N."""
    return 1 / log_weights.exp().square().mean().item()


def test_worked_example():
    # Two pairs with losses 0 and tau log 3: exp(l / tau) is 1 and 3, so w = (1/4, 3/4) and the objective is
    # tau log((1 + 3) / 2) = tau log 2. Relative to the uniform 1/2 the weights are (1/2, 3/2), and the effective
    # sample size is 1 / (1/16 + 9/16) = 1.6 of 2.
    tau = 0.5
    losses = torch.tensor([0.0, tau * math.log(3)], dtype=torch.float64, requires_grad=True)
    log_weights = kldpo_log_weights(losses, tau)
    assert not log_weights.requires_grad
    assert log_weights.exp().tolist() == pytest.approx([0.5, 1.5])
    assert effective_share(log_weights) == pytest.approx(0.8)
    objective = kldpo_loss(losses, tau).mean()
    objective.backward()
    assert objective.item() == pytest.approx(tau * math.log(2))
    assert losses.grad.tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("tau", TAUS)
def test_value_and_gradient_equal_a_naive_loop(tau):
    # The losses are functions of parameters here: grad = sum_i w_i grad l_i, with l_i = (x_i . theta)^2.
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64, requires_grad=True)
    losses = (x @ theta) ** 2
    objective = kldpo_loss(losses, tau).mean()
    objective.backward()
    weights = naive_weights(losses.tolist(), tau)
    dots = (x @ theta).tolist()
    rows = x.tolist()
    gradient = [sum(w * 2 * d * row[k] for w, d, row in zip(weights, dots, rows, strict=True)) for k in range(3)]
    assert objective.item() == pytest.approx(naive_objective(losses.tolist(), tau), rel=1e-11)
    assert theta.grad.tolist() == pytest.approx(gradient, rel=1e-11)
    assert (kldpo_log_weights(losses, tau).exp() / 8).tolist() == pytest.approx(weights, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("tau", [0.05, 0.5, 5.0])
def test_gradcheck(tau):
    # Numerically the weights move too: the mean has the gradient of the objective although its weights are constants.
    assert torch.autograd.gradcheck(lambda x: kldpo_loss(x, tau).mean(), random_losses().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e2, 1e4, 1e6])
def test_large_tau_is_the_mean_loss(dtype, tau):
    # tau log mean exp(l / tau) = mean l + var l / (2 tau) + ..., and every weight is 1 up to (max - min) / tau.
    losses = random_losses().to(dtype).requires_grad_()
    objective = kldpo_loss(losses, tau).mean()
    objective.backward()
    assert objective.item() == pytest.approx(losses.mean().item(), abs=2 / tau + 2e-6)
    assert losses.grad.tolist() == pytest.approx([1 / 8] * 8, rel=2 / tau + 1e-6)
    assert effective_share(kldpo_log_weights(losses, tau)) == pytest.approx(1, abs=2 / tau + 1e-6)


@pytest.mark.parametrize("tau", [0.005, 1.0, 1e6])
def test_equal_losses_are_the_plain_loss(tau):
    # policy = reference: every pair has log 2, whatever tau
    losses = torch.full((7,), math.log(2), requires_grad=True)
    values = kldpo_loss(losses, tau)
    values.mean().backward()
    assert values.tolist() == pytest.approx([math.log(2)] * 7, rel=1e-6)
    assert losses.grad.tolist() == pytest.approx([1 / 7] * 7, rel=1e-6)


def test_small_tau_is_the_worst_pair():
    losses = torch.tensor([0.3, 0.9, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    tau = 1e-3
    objective = kldpo_loss(losses, tau).mean()
    objective.backward()
    assert objective.item() == pytest.approx(0.9 - tau * math.log(4), abs=1e-12)
    assert losses.grad.tolist() == pytest.approx([0, 1, 0, 0], abs=1e-12)
    assert effective_share(kldpo_log_weights(losses, tau)) == pytest.approx(1 / 4)


@pytest.mark.parametrize("tau", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [4, 4], [3, 5], [1, 6, 1]], ids=str)
def test_micro_batches_add_up_to_the_step(sizes, tau):
    theta = random_losses().requires_grad_()
    step_losses = theta.square().detach()  # what a gradient-free pass over the whole step supplies
    whole = kldpo_loss(theta.square(), tau).mean()
    expected = torch.autograd.grad(whole, theta)[0]

    value, gradient, own_weights_gradient = 0.0, torch.zeros_like(theta), torch.zeros_like(theta)
    for part in torch.arange(8).split(sizes):
        losses = theta[part].square()
        log_weights = kldpo_log_weights(losses, tau, step_losses)
        contribution = kldpo_loss(losses, tau, log_weights).mean() * len(part) / 8
        value += contribution.item()
        gradient += torch.autograd.grad(contribution, theta)[0]
        own = kldpo_loss(theta[part].square(), tau).mean() * len(part) / 8
        own_weights_gradient += torch.autograd.grad(own, theta)[0]
    assert value == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=0)
    # and the weights of each micro-batch alone would have given something else: at micro-batch 1, plain DPO
    assert not torch.allclose(own_weights_gradient, expected, rtol=1e-2)
    if sizes == [1] * 8:
        assert torch.allclose(own_weights_gradient, theta.detach() * 2 / 8)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_weights_average_to_one_and_the_effective_share_lies_in_0_1(n, tau):
    log_weights = kldpo_log_weights(random_losses(n, seed=n), tau)
    assert log_weights.exp().mean().item() == pytest.approx(1, rel=1e-12)
    assert 1 / n - 1e-12 <= effective_share(log_weights) <= 1 + 1e-12
    assert log_weights.max().item() <= math.log(n) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.005, 1.0, 1e6])
def test_huge_losses_are_finite_with_gradients_of_a_softmax(dtype, tau):
    losses = torch.tensor([1e4, 0.0, 5e3, 1e4, 1e-3], dtype=dtype, requires_grad=True)
    values = kldpo_loss(losses, tau)
    values.mean().backward()
    assert values.dtype == torch.float32 and values.isfinite().all()
    assert values.mean().item() == pytest.approx(naive_objective(losses.tolist(), tau), rel=1e-5)
    weights = naive_weights(losses.tolist(), tau)  # in [0, 1]: no pair pulls harder than in a batch of its own
    assert losses.grad.tolist() == pytest.approx(weights, rel=2 * torch.finfo(dtype).eps + 1e-6, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    losses = random_losses().to(dtype)
    assert torch.equal(kldpo_loss(losses, 0.5), kldpo_loss(losses.float(), 0.5))
    assert torch.equal(kldpo_log_weights(losses[:3], 0.5, losses), kldpo_log_weights(losses.float(), 0.5)[:3])


def test_empty_input_keeps_the_graph():
    losses = torch.zeros(0, requires_grad=True)
    assert kldpo_log_weights(losses, 0.5).shape == (0,)
    assert kldpo_log_weights(losses, 0.5, torch.ones(3)).shape == (0,)
    kldpo_loss(losses, 0.5).sum().backward()
    assert losses.grad.shape == (0,)


# The temperature for an effective sample size


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_solved_temperature_gives_the_effective_sample_size(share, scale):
    losses = scale * random_losses(16)
    tau = kldpo_tau(losses, share)
    assert effective_share(kldpo_log_weights(losses, tau)) == pytest.approx(share, rel=1e-6)
    assert kldpo_tau(losses.flip(0).float(), share) == pytest.approx(tau, rel=1e-4)


def test_the_effective_sample_size_of_normal_losses_is_what_the_log_says():
    """exp(-s^2 / tau^2), with finitely many losses as long as tau is not far below s."""
    losses = 0.3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.99, 0.8, 0.5):
        tau = 0.3 / math.sqrt(-math.log(share))
        assert effective_share(kldpo_log_weights(losses, tau)) == pytest.approx(share, rel=0.02)
        assert kldpo_tau(losses, share) == pytest.approx(tau, rel=0.02)


def test_shares_that_cannot_be_had_take_the_nearest_temperature():
    equal = torch.full((8,), math.log(2))
    assert effective_share(kldpo_log_weights(equal, kldpo_tau(equal, 0.5))) == 1
    # Rounding of equal losses is not weighed
    noise = equal + 1e-6 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert effective_share(kldpo_log_weights(noise, kldpo_tau(noise, 0.5))) > 0.999
    two_worst = torch.tensor([0.0] * 6 + [1.0] * 2)
    assert effective_share(kldpo_log_weights(two_worst, kldpo_tau(two_worst, 0.1))) == pytest.approx(0.25)
