"""chi-PO, DPO-Positive and Minor DPO: worked examples and limits."""

import math

import pytest
import torch

from trl_rdro.losses import chipo_loss, dpop_loss, minor_loss, sigmoid_loss


LOG3 = math.log(3)


def value_and_slopes(function, chosen: float, rejected: float, **options):
    z = torch.tensor([[chosen], [rejected]], dtype=torch.float64, requires_grad=True)
    value = function(z[0], z[1], **options)
    return value.item(), *torch.autograd.grad(value.sum(), z)[0].flatten().tolist()


def test_chipo_worked_example():
    # phi(log 2) = 2 + log 2, phi(0) = 1: at beta = log 3 / (1 + log 2) the scaled difference is log 3, sigma 3/4.
    # Slopes: -(1 - 3/4) beta phi', and phi'(z) = e^z + 1.
    beta = LOG3 / (1 + math.log(2))
    value, chosen, rejected = value_and_slopes(chipo_loss, math.log(2), 0.0, beta=beta)
    assert value == pytest.approx(math.log(4 / 3))
    assert (chosen, rejected) == pytest.approx((-beta / 4 * 3, beta / 4 * 2))


@pytest.mark.parametrize("clip", [0.5, 1.0, 2.0])
def test_chipo_has_no_gradient_beyond_its_clip(clip):
    for sign in (1, -1):
        beta = (2 * clip - 0.01) / (math.e + 1 + 20)  # phi(1) = e + 1, and phi(-20) = -20 but for 2e-9
        value, chosen, rejected = value_and_slopes(chipo_loss, *(1.0, -20.0)[::sign], beta=beta, clip=clip)
        assert chosen < 0 < rejected
        value, *slopes = value_and_slopes(chipo_loss, *(1.0, -500.0)[::sign], beta=0.1, clip=clip)
        assert slopes == [0, 0] and value == pytest.approx(math.log1p(math.exp(-sign * 2 * clip)))


def test_chipo_is_dpo_where_both_completions_are_unlikely():
    # e^z is nothing there: the mixed regulariser is the KL divergence
    z = torch.tensor([[-40.0, -45.0], [-42.0, -41.0]], dtype=torch.float64)
    torch.testing.assert_close(chipo_loss(*z), sigmoid_loss(*z), rtol=1e-15, atol=0)


def test_chipo_sees_more_than_the_difference():
    assert value_and_slopes(chipo_loss, 1.0, 0.0)[0] < value_and_slopes(chipo_loss, 0.0, -1.0)[0]


def test_dpop_worked_example():
    # z = (-1, -3): h = 2, and lambda 0.5 takes 0.5 off it: at beta = log 3 / 1.5 sigma is 3/4. Both slopes carry
    # (1 - 3/4) beta; that of the chosen one 1 + lambda times as much.
    beta = LOG3 / 1.5
    value, chosen, rejected = value_and_slopes(dpop_loss, -1.0, -3.0, beta=beta, penalty=0.5)
    assert value == pytest.approx(math.log(4 / 3))
    assert (chosen, rejected) == pytest.approx((-beta / 4 * 1.5, beta / 4))


def test_dpop_is_dpo_without_penalty_and_where_the_chosen_one_is_likelier():
    z = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(dpop_loss(*z, penalty=0.0), sigmoid_loss(*z), rtol=1e-15, atol=0)
    z[0] = z[0].abs()
    torch.testing.assert_close(dpop_loss(*z), sigmoid_loss(*z), rtol=1e-15, atol=0)


def test_minor_worked_example():
    # z = (log 3, -5) at beta 1: the rejected one is below the reference already, so sigma is 3/4 and it has no slope
    value, *slopes = value_and_slopes(minor_loss, LOG3, -5.0, beta=1.0)
    assert value == pytest.approx(math.log(4 / 3)) and slopes == pytest.approx([-1 / 4, 0])


def test_minor_is_dpo_where_the_rejected_one_is_likelier_than_under_the_reference():
    z = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[1] = z[1].abs()
    torch.testing.assert_close(minor_loss(*z), sigmoid_loss(*z), rtol=1e-15, atol=0)
