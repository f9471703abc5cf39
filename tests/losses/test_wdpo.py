"""WDPO's penalty on the input-gradient norms: rho mean ||g||^2 (squared) or rho sqrt(mean ||g||^2) (rms)."""

import math

import pytest
import torch

from trl_rdro.losses import wdpo_penalty


PENALTIES = ["squared", "rms"]


def naive_value(norms: list[float], rho: float, penalty: str) -> float:
    mean_square = sum(norm**2 for norm in norms) / len(norms)
    return rho * (mean_square if penalty == "squared" else math.sqrt(mean_square))


def naive_gradient(norms: list[float], rho: float, penalty: str) -> list[float]:
    """2 rho ||g_i|| / n, or rho ||g_i|| / (n rms)."""
    rms = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
    return [rho * norm * (2 if penalty == "squared" else 1 / rms) / len(norms) for norm in norms]


def random_norms(n: int = 8) -> torch.Tensor:
    return 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_worked_example():
    # Norms 1 and 7 at rho 0.1. Squared: 0.1 and 4.9, mean 2.5, slopes 2 * 0.1 * 1 / 2 = 0.1 and 0.7.
    # rms: sqrt((1 + 49) / 2) = 5, so 0.5, slopes 0.1 * 1 / (2 * 5) = 0.01 and 0.07.
    for penalty, mean, slopes in (("squared", 2.5, [0.1, 0.7]), ("rms", 0.5, [0.01, 0.07])):
        norms = torch.tensor([1.0, 7.0], dtype=torch.float64, requires_grad=True)
        value = wdpo_penalty(norms, 0.1, penalty).mean()
        value.backward()
        assert value.item() == pytest.approx(mean) and norms.grad.tolist() == pytest.approx(slopes)
    assert wdpo_penalty(torch.tensor([1.0, 7.0]), 0.1).tolist() == pytest.approx([0.1, 4.9])  # squared is the default


@pytest.mark.parametrize("rho", [0.005, 1.0, 30.0])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_value_and_gradient_equal_a_naive_loop(penalty, rho):
    norms = random_norms().requires_grad_()
    value = wdpo_penalty(norms, rho, penalty).mean()
    value.backward()
    assert value.item() == pytest.approx(naive_value(norms.tolist(), rho, penalty), rel=1e-12)
    assert norms.grad.tolist() == pytest.approx(naive_gradient(norms.tolist(), rho, penalty), rel=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradcheck(penalty):
    # Numerically the mean square moves too: the mean has the gradient of the root although it is a constant inside.
    assert torch.autograd.gradcheck(lambda g: wdpo_penalty(g, 0.3, penalty).mean(), random_norms().requires_grad_())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_rho_zero_adds_nothing(penalty):
    norms = random_norms().requires_grad_()
    added = wdpo_penalty(norms, 0.0, penalty)
    added.sum().backward()
    assert torch.equal(added, torch.zeros_like(norms)) and torch.equal(norms.grad, torch.zeros_like(norms))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_two_ranks_add_up_to_one(penalty):
    # Data-parallel training averages the ranks' gradients. The squared penalty is a mean as it stands; the root needs
    # the mean square of both ranks, and would otherwise weigh each by its own.
    norms = random_norms()
    mean_square = norms.square().mean()

    def averaged(**kwargs) -> tuple[float, torch.Tensor]:
        leaf = norms.clone().requires_grad_()
        value = sum(wdpo_penalty(rank, 0.3, penalty, **kwargs).mean() for rank in leaf.chunk(2)) / 2
        value.backward()
        return value.item(), leaf.grad

    value, gradient = averaged(mean_square=mean_square)
    assert value == pytest.approx(naive_value(norms.tolist(), 0.3, penalty), rel=1e-12)
    assert gradient.tolist() == pytest.approx(naive_gradient(norms.tolist(), 0.3, penalty), rel=1e-12)
    assert torch.allclose(averaged()[1], gradient, rtol=1e-3) == (penalty == "squared")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("norms", [[0.0] * 4, [0.0, 1.0, 0.0, 2.0], [1e4, 0.0, 1e-3, 300.0]], ids=str)
def test_zero_and_huge_norms_are_finite_with_bounded_gradient(norms, penalty, dtype):
    # |slope| of the mean: 2 rho ||g_i|| / n for the square; rho ||g_i|| / (n rms) <= rho / sqrt(n) for the root, since
    # the rms of n numbers is at least 1/sqrt(n) of the largest.
    norms = torch.tensor(norms, dtype=dtype, requires_grad=True)
    values = wdpo_penalty(norms, 0.5, penalty)
    values.mean().backward()
    assert values.dtype == torch.float32 and values.isfinite().all()
    assert values.mean().item() == pytest.approx(naive_value(norms.tolist(), 0.5, penalty), rel=1e-5)
    bound = 2 * 0.5 * norms.max().item() / 4 if penalty == "squared" else 0.5 / math.sqrt(4)
    assert 0 <= norms.grad.min() and norms.grad.max() <= bound * (1 + torch.finfo(dtype).eps)
    assert norms.grad[norms == 0].abs().sum() == 0


@pytest.mark.parametrize("size", [1e-10, 1e-18, 1e-21, 1e-25, 1e-30])
def test_rms_gradient_stays_bounded_for_vanishing_norms(size):
    # rho ||g_i|| / (n rms) does not depend on the scale of the norms, down to those whose square underflows (saturated
    # pairs: beta sigma(-beta h) is 1e-26 at beta h = 60). Losing the penalty there is fine, an explosion is not.
    norms = torch.tensor([size, 3 * size], requires_grad=True)
    wdpo_penalty(norms, 0.5, "rms").mean().backward()
    assert norms.grad.isfinite().all() and norms.grad.abs().max() <= 0.5 / math.sqrt(2) * 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_half_precision_inputs_are_computed_in_float32(penalty, dtype):
    norms = random_norms().to(dtype)
    assert torch.equal(wdpo_penalty(norms, 0.3, penalty), wdpo_penalty(norms.float(), 0.3, penalty))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_empty_input_keeps_the_graph(penalty):
    norms = torch.zeros(0, requires_grad=True)
    wdpo_penalty(norms, 0.3, penalty).sum().backward()
    assert norms.grad.shape == (0,)


@pytest.mark.parametrize("penalty", ["mean", "Squared", "", None])
def test_unknown_penalty_is_refused(penalty):
    with pytest.raises(ValueError, match=r"'squared' or 'rms'.*" + repr(penalty)):
        wdpo_penalty(torch.ones(2), 0.1, penalty)
