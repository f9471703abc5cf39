"""MRPO: the harmonic reference and its limits."""

import math
from functools import partial

import pytest
import torch

from trl_rdro import losses
from trl_rdro.losses import sigmoid_loss


# Without the clip but where it is tested
mrpo_loss, mrpo_reference = partial(losses.mrpo_loss, clip=None), partial(losses.mrpo_reference, clip=None)
GENERATOR = torch.Generator().manual_seed(0)
OWN, OTHER = -200 + 60 * torch.randn(2, 2, 32, generator=GENERATOR, dtype=torch.float64)
Z = 5 * torch.randn(2, 32, generator=GENERATOR, dtype=torch.float64)


def test_worked_example():
    # Probabilities 1/2 and 1/4 with alpha 1/3 on the second reference: 1 / pi = 2/3 * 2 + 1/3 * 4 = 8/3
    own, other = torch.tensor([[0.5], [0.5]]).double().log(), torch.tensor([[0.25], [0.25]]).double().log()
    assert mrpo_reference(own, other, alpha=1 / 3).exp().flatten().tolist() == pytest.approx([3 / 8, 3 / 8])


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
def test_one_reference_twice_is_dpo(alpha):
    torch.testing.assert_close(mrpo_reference(OWN, OWN, alpha), OWN, rtol=1e-14, atol=0)
    torch.testing.assert_close(mrpo_loss(*Z, OWN, OWN, alpha=alpha), sigmoid_loss(*Z), rtol=1e-9, atol=0)


def test_a_weight_of_one_or_zero_is_dpo_with_that_reference():
    torch.testing.assert_close(mrpo_loss(*Z, OWN, OTHER, alpha=0.0), sigmoid_loss(*Z), rtol=1e-9, atol=0)
    expected = sigmoid_loss(*(Z + OWN - OTHER))
    torch.testing.assert_close(mrpo_loss(*Z, OWN, OTHER, alpha=1.0), expected, rtol=1e-9, atol=1e-12)


def test_adaptive_weight_is_the_references_share_of_the_margins():
    own, other = torch.tensor([[-1.0], [-3.0]]).double(), torch.tensor([[-4.0], [-3.0]]).double()  # margins 2 and -1
    torch.testing.assert_close(mrpo_reference(own, other), mrpo_reference(own, other, alpha=1 / 3))


def test_it_lies_between_the_references_and_near_the_smaller_probability():
    reference = mrpo_reference(OWN, OTHER, alpha=0.5)
    lower, upper = torch.minimum(OWN, OTHER), torch.maximum(OWN, OTHER)
    assert (reference >= lower).all() and (reference <= upper).all()
    assert (reference <= lower + math.log(2) + 1e-9).all()


def test_clip_keeps_the_second_reference_near_the_first():
    reference = losses.mrpo_reference(OWN, OTHER, alpha=1.0)
    assert ((reference / OWN - 1).abs() <= 0.1 + 1e-12).all()
    near = OWN * 1.05
    torch.testing.assert_close(mrpo_reference(OWN, near, 1.0, clip=0.1), near)
    torch.testing.assert_close(mrpo_reference(OWN, OWN - 1e4, 1.0, clip=0.1), 1.1 * OWN)
    torch.testing.assert_close(mrpo_reference(OWN, OWN + 1e4, 1.0, clip=0.1), 0.9 * OWN)


def test_references_that_disagree_by_thousands_of_nats_are_finite():
    z = Z.float().requires_grad_()
    value = mrpo_loss(z[0], z[1], OWN.float(), OTHER.float() - 1e4)
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all()
