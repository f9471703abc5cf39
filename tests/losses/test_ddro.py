"""DDRO against its mathematics: worked examples, naive loops, the linear continuation beyond the cap, extremes.

With pi_ref = t p+ + (1-t) p- the policy stands for g = p-/p+ through g = (1/r - t)/(1 - t), and the logistic losses
log(1 + g) and log(1 + 1/g) are, in r = exp(z),

    preferred      A(z) = log( (1/r + 1 - 2t) / (1 - t) ),         A' = -1 / (1 + (1-2t) r)
    non-preferred  B(z) = log( (1 + (1-2t) r) / (1 - t r) ),       B' = (1-2t) r / (1 + (1-2t) r) + t r / (1 - t r)

with a pole of B at r = 1/t and, for t > 1/2 only, one of A at r = 1/(2t-1). Beyond r = cap/t they go on as tangents.
"""

import math

import pytest
import torch

from trl_rdro.losses import ddro_beyond_cap, ddro_loss


TS = [0.2, 0.39, 0.5, 0.8]
CAPS = [0.5, 0.9, 0.99, 0.999]


def exact(z: float, preferred: bool, t: float) -> tuple[float, float]:
    """Value and slope of the terms as they are without a cap."""
    r, c = math.exp(z), 1 - 2 * t
    if preferred:
        return math.log((1 / r + c) / (1 - t)), -1 / (1 + c * r)
    return math.log((1 + c * r) / (1 - t * r)), c * r / (1 + c * r) + t * r / (1 - t * r)


def naive_ddro(z: float, preferred: bool, t: float, cap: float) -> tuple[float, float]:
    """Value and slope, with tangents beyond the cap for what has a pole."""
    z_cap = math.log(cap / t)
    if z <= z_cap or (preferred and t <= 0.5):
        return exact(z, preferred, t)
    value, slope = exact(z_cap, preferred, t)
    return value + slope * (z - z_cap), slope


def steepest(preferred: bool, t: float, cap: float) -> float:
    """The bound on |slope|: that at the cap, and 1 for the preferred term where it has no pole."""
    return 1.0 if preferred and t <= 0.5 else abs(exact(math.log(cap / t), preferred, t)[1])


def random_samples(n: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return z, torch.rand(n, generator=generator) < 0.4


def values_and_slopes(z: list[float], labels: list[bool], t: float, cap: float) -> tuple[list[float], list[float]]:
    z = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    losses = ddro_loss(z, torch.tensor(labels), t, cap)
    losses.sum().backward()
    return losses.tolist(), z.grad.tolist()


def test_worked_example_at_one_half():
    # r = 3/2. Preferred: log 2 - log 3/2 = log(4/3), slope -1. Non-preferred: log 2 - log(2 - 3/2) = log 4, slope
    # r / (2 - r) = 3.
    losses, slopes = values_and_slopes([math.log(1.5)] * 2, [True, False], 0.5, 0.99)
    assert losses == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-14)
    assert slopes == pytest.approx([-1, 3], rel=1e-13)


def test_worked_example_at_one_fifth():
    # r = 5/2, 1 - 2t = 3/5. Preferred: log((2/5 + 3/5) / (4/5)) = log(5/4), slope -1/(1 + 3/2) = -2/5. Non-preferred:
    # log((1 + 3/2) / (1 - 1/2)) = log 5, slope (3/2)/(5/2) + (1/2)/(1/2) = 8/5.
    losses, slopes = values_and_slopes([math.log(2.5)] * 2, [True, False], 0.2, 0.99)
    assert losses == pytest.approx([math.log(5 / 4), math.log(5)], abs=1e-14)
    assert slopes == pytest.approx([-2 / 5, 8 / 5], rel=1e-13)


def test_worked_example_beyond_the_cap():
    # t = 1/2, cap 0.9: linear from r = 1.8 on, where the non-preferred term is log 2 - log 0.2 = log 10 and its slope
    # 0.9 / 0.1 = 9. At twice that r, beyond the pole at 2: log 10 + 9 log 2. The preferred term has no pole and is
    # log 2 - log 3.6 = -log 1.8.
    losses, slopes = values_and_slopes([math.log(3.6)] * 2, [True, False], 0.5, 0.9)
    assert losses == pytest.approx([-math.log(1.8), math.log(10) + 9 * math.log(2)], abs=1e-13)
    assert slopes == pytest.approx([-1, 9], rel=1e-13)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("t", TS)
def test_equals_a_naive_loop(t, cap):
    z, preferred = random_samples()
    beyond = [value > math.log(cap / t) for value in z.tolist()]
    for label in (True, False):  # both sides of the cap are there, for both classes
        assert {b for b, p in zip(beyond, preferred.tolist(), strict=True) if p == label} == {True, False}
    rows = list(zip(z.tolist(), preferred.tolist(), strict=True))
    losses, slopes = values_and_slopes(z.tolist(), preferred.tolist(), t, cap)
    assert losses == pytest.approx([naive_ddro(*row, t, cap)[0] for row in rows], rel=1e-10, abs=1e-12)
    assert slopes == pytest.approx([naive_ddro(*row, t, cap)[1] for row in rows], rel=1e-10, abs=1e-12)
    assert ddro_beyond_cap(z, t, cap).tolist() == beyond


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("t", TS)
def test_gradcheck_on_both_sides_of_the_cap(t, label):
    z_cap = math.log(0.9 / t)
    z = torch.tensor([z_cap + d for d in (-5, -1, -0.1, -0.01, 0.01, 0.1, 1, 5)], dtype=torch.float64)
    preferred = torch.full(z.shape, label)
    assert torch.autograd.gradcheck(lambda z: ddro_loss(z, preferred, t, 0.9), z.requires_grad_())


@pytest.mark.parametrize("t", TS)
def test_constants_where_policy_equals_reference(t):
    # log((2 - 2t) / (1 - t)) = log 2 for each term and any t, 2 log 2 in all; the slopes are -1/(2 - 2t) and its
    # opposite.
    losses, slopes = values_and_slopes([0.0, 0.0], [True, False], t, 0.99)
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert slopes == pytest.approx([-1 / (2 - 2 * t), 1 / (2 - 2 * t)], rel=1e-14)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("t", TS)
def test_value_and_slope_are_continuous_at_the_cap(t, label, cap):
    z_cap, d = math.log(cap / t), 1e-9
    losses, slopes = values_and_slopes([z_cap - d, z_cap + d], [label] * 2, t, cap)
    value, slope = exact(z_cap, label, t)
    assert losses == pytest.approx([value] * 2, abs=4 * d * abs(slope) + 1e-12)
    assert slopes == pytest.approx([slope] * 2, rel=1e-4)  # the curvature at cap 0.999 is 1e3 times the slope
    if t == 0.5 and not label:
        assert slopes[1] == pytest.approx(cap / (1 - cap), rel=1e-12)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("t", TS)
def test_monotone_and_the_non_preferred_term_convex_or_linear(t, cap):
    z_cap = math.log(cap / t)
    z = torch.linspace(z_cap - 8, z_cap + 8, 4001, dtype=torch.float64)
    preferred = torch.ones(z.shape, dtype=torch.bool)
    assert ddro_loss(z, preferred, t, cap).diff().max() < (1e-12 if t < 0.5 else 0)  # t < 1/2: flat towards log(1-2t)
    steps = ddro_loss(z, ~preferred, t, cap).diff()
    assert steps.min() > 0
    bends = steps.diff()
    assert bends.min() > -1e-10
    assert bends[:1500].min() > 1e-10 and bends[2001:].abs().max() < 1e-10 * max(1, steps.max().item())


def test_preferred_term_is_continued_from_the_same_cap_as_the_other():
    # t = 0.8, cap 0.99, an outcome with p+ = 1 and p- = 0.05 (up to a common factor). The ratio to find is
    # r* = p+ / (t p+ + (1-t) p-) = 1/0.81 = 1.2346, with t r* = 0.9877 just below the cap: within the promise.
    t, cap, p_minus = 0.8, 0.99, 0.05
    z_star, z_cap = -math.log(t + (1 - t) * p_minus), math.log(cap / t)
    assert 0.98 < t * math.exp(z_star) < cap

    def objective(z: torch.Tensor) -> torch.Tensor:
        preferred = torch.ones(z.shape, dtype=torch.bool)
        return ddro_loss(z, preferred, t, cap) + p_minus * ddro_loss(z, ~preferred, t, cap)

    z = torch.linspace(z_star - 10, z_star + 10, 20001, dtype=torch.float64)  # z[10000] is z*
    outcome = objective(z)
    assert outcome.argmin().item() == 10000
    assert outcome[z > z_cap].diff().min() > 0 and outcome[: 10000 + 1].diff().max() < 0

    # The preferred term's own singularity is at 1/(2t-1) = 1.67. Had it been continued from cap/(2t-1) = 1.65 only, it
    # would fall by 3.5 on the way there, while the non-preferred term rises along its tangent by 0.05 * 28 = 1.4.
    z_own_cap = math.log(cap / (2 * t - 1))
    value_own, slope_own = exact(z_own_cap, True, t)
    slope_nonpreferred = exact(z_cap, False, t)[1]

    def late_objective(z: float) -> float:
        pref = exact(z, True, t)[0] if z <= z_own_cap else value_own + slope_own * (z - z_own_cap)
        return pref + p_minus * naive_ddro(z, False, t, cap)[0]

    minimum = objective(torch.tensor([z_star], dtype=torch.float64)).item()
    assert late_objective(z_star) == pytest.approx(minimum, rel=1e-12)
    assert late_objective(z_own_cap) < minimum - 2
    # and from there on without end: the sum of the slopes is negative
    assert slope_own + p_minus * slope_nonpreferred < -90
    assert late_objective(z_own_cap + 10) < minimum - 900


@pytest.mark.parametrize("ratio", [0.005, 0.05, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("t", TS)
def test_each_outcome_is_minimal_at_its_ratio_if_that_is_below_the_cap(t, ratio):
    # p+ A + p- B, with p-/p+ = ratio, has its only stationary point at r* = p+ / (t p+ + (1-t) p-). When t r* lies
    # above the cap, the tangent of B is too flat to stop there, and the sum still falls at r*: the bias of a low cap.
    cap, tr_star = 0.95, t / (t + (1 - t) * ratio)
    z_star, z_cap = math.log(tr_star / t), math.log(cap / t)
    z = [z_star, z_star - 0.1, z_star + 0.1, z_cap + 0.1, z_cap + 5]
    slopes = values_and_slopes(z * 2, [True] * 5 + [False] * 5, t, cap)[1]
    here, below, above, beyond, far = (slopes[i] + ratio * slopes[i + 5] for i in range(5))
    if tr_star < cap:
        assert below < 0 < min(above, beyond, far) and here == pytest.approx(0, abs=1e-12)
    else:
        assert max(below, here) < 0
        assert t < 0.5 or max(beyond, far) < 0  # A has no pole and flattens for t < 1/2: it stops somewhere further


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("t", TS)
def test_extremes_are_finite_with_the_slope_at_the_cap_as_bound(t, cap, dtype):
    values = [-1e4, -300.0, -20.0, -1.0, 0.0, math.log(1 / t), 1.0, 20.0, 300.0, 1e4]
    z = torch.tensor(values * 2, dtype=dtype, requires_grad=True)
    preferred = torch.arange(len(z)) < len(values)
    losses = ddro_loss(z, preferred, t, cap)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    slopes = z.grad.float()
    slack = 1 + 2 * torch.finfo(dtype).eps + 4e-7 / (1 - cap)  # 1 - t r at the cap loses digits in float32
    assert -steepest(True, t, cap) * slack <= slopes[preferred].min() and slopes[preferred].max() <= 0
    assert 0 <= slopes[~preferred].min() and slopes[~preferred].max() <= steepest(False, t, cap) * slack
    # far out to the right the bound is attained (the preferred term for t < 1/2 flattens instead)
    assert slopes[-1].item() == pytest.approx(steepest(False, t, cap), rel=slack - 1)
    assert -slopes[len(values) - 1].item() == pytest.approx(0 if t < 0.5 else steepest(True, t, cap), rel=slack - 1)
    # far out to the left the preferred term is -z + const
    assert losses[0].item() == pytest.approx(-z[0].item() - math.log(1 - t), rel=1e-6)


@pytest.mark.parametrize("cap", [1e-6, 0.99999, 0.999999, 1 - 1e-7, 1 - 1e-9])
@pytest.mark.parametrize("t", [1e-3, 0.2, 0.5, 0.8, 0.999])
def test_any_cap_and_t_in_their_ranges_are_finite_in_float32(t, cap):
    z = torch.tensor([-1e4, 0.0, math.log(cap / t), math.log(1 / t), 10.0, 1e4] * 2, requires_grad=True)
    losses = ddro_loss(z, torch.arange(len(z)) < 6, t, cap)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    z, preferred = random_samples()
    z = z.to(dtype)
    assert torch.equal(ddro_loss(z, preferred, 0.39), ddro_loss(z.float(), preferred, 0.39))
    assert torch.equal(ddro_beyond_cap(z, 0.39), ddro_beyond_cap(z.float(), 0.39))


@pytest.mark.parametrize("t", TS)
@pytest.mark.parametrize("labels", [[], [True, True], [False, False]], ids=["empty", "no rejected", "no chosen"])
def test_missing_samples_keep_the_graph(labels, t):
    preferred = torch.tensor(labels, dtype=torch.bool)
    z = torch.zeros(len(labels), requires_grad=True)
    losses = ddro_loss(z, preferred, t)
    assert losses.shape == z.shape and ddro_beyond_cap(z, t).shape == z.shape
    for absent in (True, False):  # the part of a class that is not there contributes zeros, neither None nor NaN
        if absent not in labels:
            (gradient,) = torch.autograd.grad(losses[preferred == absent].sum(), z, retain_graph=True)
            assert torch.equal(gradient, torch.zeros_like(z))
    losses.sum().backward()
    assert z.grad.tolist() == pytest.approx([exact(0.0, label, t)[1] for label in labels], rel=1e-6)
