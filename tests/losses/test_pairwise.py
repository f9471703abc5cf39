"""The pairwise losses against their formulas, and against what TRL's names promise."""

import math

import pytest
import torch

from trl_rdro import losses


def of_margins(function):
    """The loss as a function of the margin h, which is all that these three see."""
    return lambda h, *args, **kwargs: function(h, torch.zeros_like(h), *args, **kwargs)


hinge_loss, ipo_loss, sigmoid_loss = map(of_margins, (losses.hinge_loss, losses.ipo_loss, losses.sigmoid_loss))


def naive_sigmoid(h: float, beta: float, label_smoothing: float = 0.0) -> float:
    def nll(u: float) -> float:  # -log sigma(u)
        return max(-u, 0.0) + math.log1p(math.exp(-abs(u)))

    return (1 - label_smoothing) * nll(beta * h) + label_smoothing * nll(-beta * h)


def naive_ipo(h: float, beta: float) -> float:
    return (h - 1 / (2 * beta)) ** 2


def naive_hinge(h: float, beta: float) -> float:
    return max(0.0, 1 - beta * h)


PAIRS = [(sigmoid_loss, naive_sigmoid), (ipo_loss, naive_ipo), (hinge_loss, naive_hinge)]
FUNCTIONS = [function for function, _ in PAIRS]


def random_margins(n: int = 64) -> torch.Tensor:
    return 10 * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("function", [losses.hinge_loss, losses.ipo_loss, losses.sigmoid_loss])
def test_only_the_difference_counts(function):
    chosen, rejected = random_margins().chunk(2)
    torch.testing.assert_close(function(chosen + 3, rejected + 3), function(chosen, rejected))
    torch.testing.assert_close(function(chosen, rejected), of_margins(function)(chosen - rejected))


def test_worked_examples():
    # h = 10 log 3 at beta 0.1: beta h = log 3, sigma = 3/4, so the loss is log(4/3). A share of 1/4 flipped labels
    # adds a quarter of beta h.
    h = torch.tensor([10 * math.log(3)], dtype=torch.float64)
    assert sigmoid_loss(h, 0.1).item() == pytest.approx(math.log(4 / 3))
    assert sigmoid_loss(h, 0.1, label_smoothing=0.25).item() == pytest.approx(math.log(4 / 3) + math.log(3) / 4)
    # IPO at beta 0.1 wants a margin of 1/(2 * 0.1) = 5: (8 - 5)^2 = 9, slope 2 (8 - 5) = 6.
    h = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
    loss = ipo_loss(h, 0.1)
    loss.backward()
    assert (loss.item(), h.grad.item()) == pytest.approx((9, 6))
    # Hinge at beta 0.1 wants a margin of 10: 1 - 0.4 = 0.6 with slope -0.1 below it, 0 with slope 0 above.
    h = torch.tensor([4.0, 12.0], dtype=torch.float64, requires_grad=True)
    values = hinge_loss(h, 0.1)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0.6, 0]) and h.grad.tolist() == pytest.approx([-0.1, 0])


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("function", "naive"), PAIRS)
def test_equals_a_naive_loop(function, naive, beta):
    h = random_margins()
    assert function(h, beta).tolist() == pytest.approx([naive(x, beta) for x in h.tolist()], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.49])
def test_label_smoothing_equals_a_naive_loop(label_smoothing):
    h = random_margins()
    expected = [naive_sigmoid(x, 0.5, label_smoothing) for x in h.tolist()]
    assert sigmoid_loss(h, 0.5, label_smoothing).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function):
    h = random_margins(12)
    assert (1 - 0.1 * h).abs().min() > 0.01  # away from the kink of the hinge
    assert torch.autograd.gradcheck(lambda h: function(h, 0.1), h.requires_grad_())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_constant_where_policy_equals_reference(label_smoothing):
    loss = sigmoid_loss(torch.zeros(1, dtype=torch.float64), 0.1, label_smoothing)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("function", "bound"),
    [
        (lambda h: sigmoid_loss(h, 0.1), 0.1),  # beta sigma(-beta h) <= beta
        (lambda h: sigmoid_loss(h, 0.1, 0.2), 0.1),  # between -(1 - eps) beta and eps beta
        (lambda h: ipo_loss(h, 0.1), 2 * (1e4 + 5)),  # 2 |h - 1/(2 beta)|
        (lambda h: hinge_loss(h, 0.1), 0.1),  # beta
    ],
    ids=["sigmoid", "smoothed", "ipo", "hinge"],
)
def test_extremes_are_finite_with_bounded_gradient(function, bound, dtype):
    h = torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4], dtype=dtype, requires_grad=True)
    values = function(h)
    values.sum().backward()
    assert values.dtype == torch.float32 and values.isfinite().all()
    rounding = 1 + torch.finfo(dtype).eps
    assert 0 < h.grad.float().abs().max() <= bound * rounding**2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_inputs_are_computed_in_float32(function, dtype):
    h = random_margins().to(dtype)
    assert torch.equal(function(h, 0.1), function(h.float(), 0.1))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_input_keeps_the_graph(function):
    h = torch.zeros(0, requires_grad=True)
    function(h, 0.1).sum().backward()
    assert h.grad.shape == (0,)
