"""Class weights: the mean over labelled samples must estimate E_{p+}[loss] + E_{p-}[loss] whatever the batch holds."""

from itertools import product

import pytest
import torch

from trl_rdro.losses import class_weights, rdro_loss


# A training set of five, two of them preferred (pi = 0.4), with exact binary fractions as losses.
LABELS = torch.tensor([True, False, False, True, False])
LOSSES = torch.tensor([1.0, 2.0, 4.0, 0.5, 8.0], dtype=torch.float64)
# E_{p+} = (1 + 0.5) / 2 and E_{p-} = (2 + 4 + 8) / 3
OBJECTIVE = 1.5 / 2 + 14 / 3


def test_worked_example():
    # pi = 0.4: a preferred sample counts 1/0.4 = 2.5, another 1/0.6 = 5/3. Over the training set the weights average
    # to pi/pi + (1-pi)/(1-pi) = 2, and the weighted mean of the losses is the sum of the class means.
    weights = class_weights(LABELS, 0.4)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([2.5, 5 / 3, 5 / 3, 2.5, 5 / 3])
    assert weights.mean().item() == pytest.approx(2)
    assert (weights * LOSSES).mean().item() == pytest.approx(OBJECTIVE)


@pytest.mark.parametrize("fraction", [0.2, 0.39, 0.5, 0.8])
def test_equals_a_naive_loop(fraction):
    generator = torch.Generator().manual_seed(0)
    preferred = torch.rand(50, generator=generator) < fraction
    expected = [1 / fraction if label else 1 / (1 - fraction) for label in preferred.tolist()]
    assert class_weights(preferred, fraction).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_unbiased_for_every_batch_size(size):
    # All batches that can be drawn, equally likely; most of size 1 and 2 lack a class, where a class mean over the
    # batch would not even exist.
    batches = list(product(range(5), repeat=size))
    assert any(LABELS[list(batch)].all() or not LABELS[list(batch)].any() for batch in batches)
    estimates = [(class_weights(LABELS[list(b)], 0.4) * LOSSES[list(b)]).mean().item() for b in batches]
    assert sum(estimates) / len(estimates) == pytest.approx(OBJECTIVE, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(size):
    z = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)
    preferred = torch.tensor([True, True, True, False, False, False, False, False])  # size 2 and less: one class only

    def loss(part: slice) -> torch.Tensor:
        return (class_weights(preferred[part], 0.39) * rdro_loss(z[part], preferred[part], 0.39)).mean()

    whole = torch.autograd.grad(loss(slice(0, 8)), z)[0]
    split = torch.zeros_like(z)
    for start in range(0, 8, size):
        split += torch.autograd.grad(loss(slice(start, start + size)), z)[0] * size / 8
    assert torch.allclose(split, whole, rtol=1e-14, atol=0)


def test_flattened_pairs_have_the_loss_of_the_pairs():
    # Paired scale: the mean over pairs of the SUM of a pair's two terms. Flattened, pi = 1/2 and every weight is 2.
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.bool)
    paired = (rdro_loss(chosen, ones) + rdro_loss(rejected, ~ones)).mean()
    labels = torch.cat([ones, ~ones])
    flat = (class_weights(labels, 0.5) * rdro_loss(torch.cat([chosen, rejected]), labels)).mean()
    assert class_weights(labels, 0.5).tolist() == [2.0] * 12
    assert flat.item() == pytest.approx(paired.item(), rel=1e-14)


@pytest.mark.parametrize("labels", [[], [True, True], [False, False]], ids=["empty", "no rejected", "no chosen"])
def test_missing_samples(labels):
    preferred = torch.tensor(labels, dtype=torch.bool)
    assert class_weights(preferred, 0.25).tolist() == pytest.approx([4.0 if p else 4 / 3 for p in labels])
    z = torch.zeros(len(labels), requires_grad=True)
    (class_weights(preferred, 0.25) * rdro_loss(z, preferred)).sum().backward()
    # slope -1/4 of a preferred and 1/4 of a non-preferred sample at z = 0 (alpha = 1/2)
    assert z.grad.tolist() == pytest.approx([-1.0 if p else 1 / 3 for p in labels])
