"""What holds for every loss of a pair: its formula in a naive loop, its gradient, finite values, and the start at 0.

What is particular to one of them is in the file of its kind (test_noise.py, test_displacement.py, ...).
"""

import math
from collections.abc import Callable

import pytest
import torch

from trl_rdro import losses


N = 64
LOG2 = math.log(2)
PROBABILITIES = torch.linspace(0.5, 1.0, N, dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(0)
CHOSEN, REJECTED = 5 * torch.randn(2, N, generator=GENERATOR, dtype=torch.float64)
OWN, OTHER = -50 + 10 * torch.randn(2, 2, N, generator=GENERATOR, dtype=torch.float64)


def nll(u: float) -> float:
    """-log sigma(u)"""
    return max(-u, 0.0) + math.log1p(math.exp(-abs(u)))


def sigma(u: float) -> float:
    return math.exp(-nll(u))


def naive_holder(zw, zl, i, beta=0.1, gamma=2.0):
    s = sigma(beta * (zw - zl))
    return gamma * s ** (1 + gamma) - (1 + gamma) * s**gamma


def naive_ropo(zw, zl, i, beta=0.1, a=14.0):
    u = beta * (zw - zl)
    return 4 * a / (1 + a) ** 2 * nll(u) + 4 * a**2 / (1 + a) ** 2 * sigma(-u)


def naive_repo(zw, zl, i, beta=0.1, eta=0.9):
    s = sigma(beta * (zw - zl))
    return -math.log(eta * s + (1 - eta) * (1 - s))


def naive_chipo(zw, zl, i, beta=0.1, clip=1.0):
    difference = beta * ((math.exp(min(zw, 88)) + zw) - (math.exp(min(zl, 88)) + zl))
    return nll(min(max(difference, -2 * clip), 2 * clip))


def naive_dpopro(zw, zl, i, beta=0.1, rho=0.1):
    """The worst p in [0, 1] with (p - q)^2 <= rho q (1 - q): a linear function of p, so at an end of that interval."""
    u, q = beta * (zw - zl), PROBABILITIES[i].item()
    radius = math.sqrt(rho * q * (1 - q))
    ends = (max(q - radius, 0.0), min(q + radius, 1.0))
    return max(p * nll(u) + (1 - p) * nll(-u) for p in ends)


def naive_adadpo(zw, zl, i, beta=0.1, rho0=0.1, low=0.1, high=5.0):
    """A ternary search: the objective is convex in tau."""
    u = beta * (zw - zl)

    def objective(tau):
        return tau * nll(u / tau) + (rho0 - LOG2) * tau

    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if objective(a) < objective(b) else (a, high)
    return objective((low + high) / 2)


def naive_mrpo(zw, zl, i, beta=0.1):
    (own_w, own_l), (other_w, other_l) = OWN[:, i].tolist(), OTHER[:, i].tolist()
    a = abs(other_w - other_l) / (abs(other_w - other_l) + abs(own_w - own_l))

    def log_reference(own, other):  # log p1 + log p2 - log( a p2 + (1 - a) p1 ), a weighs 1 / p1
        p1, p2 = math.exp(other), math.exp(own)
        return other + own - math.log(a * p2 + (1 - a) * p1)

    z = [z + own - log_reference(own, other) for z, own, other in ((zw, own_w, other_w), (zl, own_l, other_l))]
    return nll(beta * (z[0] - z[1]))


# Each with a naive loop over pairs (z_chosen, z_rejected, index), its value where policy = reference, and the largest
# slope in either log-ratio
PAIR_LOSSES: dict[str, tuple[Callable, Callable, float, float]] = {
    "cdpo": (losses.cdpo_loss, lambda w, r, i: 0.9 * nll(0.1 * (w - r)) + 0.1 * nll(0.1 * (r - w)), LOG2, 0.1),
    "holder": (losses.holder_loss, naive_holder, 2 / 2**3 - 3 / 2**2, 0.1 * 6 / 16),
    "ropo": (losses.ropo_loss, naive_ropo, 56 / 225 * (LOG2 + 7), 0.1),
    "repo": (losses.repo_loss, naive_repo, LOG2, 0.1),
    "chipo": (losses.chipo_loss, naive_chipo, LOG2, math.inf),
    "dpop": (losses.dpop_loss, lambda w, r, i: nll(0.1 * (w - r - 50 * max(0.0, -w))), LOG2, 5.1),
    "minor": (losses.minor_loss, lambda w, r, i: nll(0.1 * (w - max(0.0, r))), LOG2, 0.1),
    "adadpo": (losses.adadpo_loss, naive_adadpo, 0.1 * 0.1, 0.1),
    "gdpo": (
        lambda w, r: losses.gdpo_loss(w, r, PROBABILITIES[: len(w)]),
        lambda w, r, i: nll(0.1 * (2 * PROBABILITIES[i].item() - 1) * (w - r)),
        LOG2,
        0.1,
    ),
    "dpopro": (
        lambda w, r: losses.dpopro_loss(w, r, PROBABILITIES[: len(w)]),
        naive_dpopro,
        LOG2,
        0.1,
    ),
    "mrpo": (
        lambda w, r: losses.mrpo_loss(w, r, OWN[:, : len(w)], OTHER[:, : len(w)], clip=None),
        naive_mrpo,
        None,
        0.1,
    ),
}
ALL = pytest.mark.parametrize("name", PAIR_LOSSES)


@ALL
def test_equals_a_naive_loop(name):
    function, naive, _, _ = PAIR_LOSSES[name]
    pairs = zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)
    expected = [naive(chosen, rejected, i) for i, (chosen, rejected) in enumerate(pairs)]
    assert function(CHOSEN, REJECTED).tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13)


@ALL
def test_gradcheck(name):
    # At the edges of chipo's clip and adadpo's range of temperatures, and at 0, there are kinks; none of these is near
    function = PAIR_LOSSES[name][0]
    z = torch.stack([CHOSEN, REJECTED])[:, :24].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function(z[0], z[1]), z)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "mrpo"])  # whose references differ here
def test_value_where_policy_equals_reference(name):
    function, _, constant, _ = PAIR_LOSSES[name]
    zeros = torch.zeros(8, dtype=torch.float64)
    assert function(zeros, zeros).tolist() == pytest.approx([constant] * 8, abs=1e-15)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite_with_bounded_gradient(name, dtype):
    function, _, _, bound = PAIR_LOSSES[name]
    values = torch.tensor([-1e4, -300.0, -8.0, 0.0, 8.0, 300.0, 1e4], dtype=dtype)
    chosen, rejected = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    result = function(chosen, rejected)
    result.sum().backward()
    assert result.dtype == (torch.float64 if name == "mrpo" else torch.float32) and result.isfinite().all()
    for x in (chosen, rejected):
        assert x.grad.isfinite().all()
        assert x.grad.float().abs().max() <= bound * (1 + torch.finfo(dtype).eps) ** 2
    assert chosen.grad.abs().max() > 0


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    function = PAIR_LOSSES[name][0]
    chosen, rejected = CHOSEN.to(dtype), REJECTED.to(dtype)
    assert torch.equal(function(chosen, rejected), function(chosen.float(), rejected.float()))


@ALL
def test_empty_input_keeps_the_graph(name):
    chosen, rejected = torch.zeros(2, 0, requires_grad=True)
    result = PAIR_LOSSES[name][0](chosen, rejected)
    assert result.shape == (0,)
    grad = torch.autograd.grad(result.sum(), (chosen, rejected))
    assert all(g.shape == (0,) for g in grad)


@ALL
def test_a_better_chosen_completion_never_costs_more(name):
    function = PAIR_LOSSES[name][0]
    chosen = CHOSEN.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(chosen, REJECTED).sum(), chosen)
    if name in ("cdpo", "dpopro", "repo"):  # these are content with the margin that an uncertain label deserves
        gradient = gradient[(CHOSEN - REJECTED) < 0]
    assert (gradient <= 0).all() and (gradient < 0).any()
