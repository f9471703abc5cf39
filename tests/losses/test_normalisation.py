"""The mean of policy over reference: 1 exactly where the reference is the mixture of the data."""

import math

import pytest
import torch

from trl_rdro.losses import log_normalisation, mixture_weights, normalisation_sums


def figures(z, weights):
    return log_normalisation(tuple(normalisation_sums(z, weights).tolist()))


def test_against_a_naive_loop():
    g = torch.Generator().manual_seed(0)
    z, preferred = torch.randn(40, generator=g), torch.rand(40, generator=g) < 0.3
    rows, alpha, pi = torch.rand(40, generator=g) + 0.1, 0.4, 0.3
    value, error = figures(z, rows * mixture_weights(preferred, alpha, pi))
    c = [w * (alpha / pi if p else (1 - alpha) / (1 - pi)) for w, p in zip(rows.tolist(), preferred, strict=True)]
    r = [math.exp(x) for x in z.tolist()]
    n = sum(a * b for a, b in zip(c, r, strict=True)) / sum(c)
    variance = sum((a * (b / n - 1)) ** 2 for a, b in zip(c, r, strict=True)) / sum(c) ** 2
    assert value == pytest.approx(math.log(n), abs=1e-6)
    assert error == pytest.approx(math.sqrt(variance), rel=1e-4)


def test_at_the_reference_it_is_zero_whatever_the_classes_of_a_batch():
    for preferred in ([True, True], [False, True, False], [False]):
        value, error = figures(torch.zeros(len(preferred)), mixture_weights(torch.tensor(preferred), 0.7, 0.2))
        assert value == pytest.approx(0, abs=1e-6) and error < 1e-3


def test_parts_add_up_and_nothing_overflows():
    z, weights = torch.tensor([300.0, -400.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0, 1.0])
    whole = normalisation_sums(z, weights)
    parts = torch.logaddexp(normalisation_sums(z[:1], weights[:1]), normalisation_sums(z[1:], weights[1:]))
    torch.testing.assert_close(whole, parts)
    value, error = figures(z, weights)
    assert value == pytest.approx(300 - math.log(4)) and 0 < error < 1
    assert all(math.isnan(x) for x in figures(z, torch.zeros(4)))


@pytest.mark.parametrize("is_mixture", [True, False])
def test_exact_toy(is_mixture):
    """Of samples from p+ and p-, under any policy: within its error of 0 for the mixture, and off for another
    reference."""
    g = torch.Generator().manual_seed(1)
    plus, minus, other, policy = torch.randn(4, 12, generator=g).softmax(dim=1)
    alpha, n = 0.35, 4000
    reference = alpha * plus + (1 - alpha) * minus if is_mixture else other
    preferred = torch.rand(n, generator=g) < alpha
    y = torch.where(
        preferred, torch.multinomial(plus, n, True, generator=g), torch.multinomial(minus, n, True, generator=g)
    )
    value, error = figures((policy / reference).log()[y], mixture_weights(preferred, alpha, preferred.float().mean()))
    assert error < 0.1
    assert (abs(value) < 3 * error) == is_mixture
