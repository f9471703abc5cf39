"""The mixtures that stand for the reference, and which loss takes which."""

import math

import numpy as np
import pytest

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.iterate.references import geometric, linear, needs_distribution

from ..tiny import cpu_args


def test_references_are_the_two_mixtures():
    policy, base = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    mixed = [linear(math.log(p), math.log(q), 0.3) for p, q in zip(policy, base, strict=True)]
    np.testing.assert_allclose(np.exp(mixed), 0.3 * policy + 0.7 * base)
    assert linear(-1000.0, -2.0, 0.0) == -2.0 and linear(-3.0, -1000.0, 1.0) == -3.0
    assert linear(-2000.0, -2000.0, 0.5) == pytest.approx(-2000.0)
    values = [geometric(math.log(p), math.log(q), 0.3) for p, q in zip(policy, base, strict=True)]
    product = policy**0.3 * base**0.7
    np.testing.assert_allclose(np.diff(values), np.diff(np.log(product / product.sum())))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "kldpo", "wdpo", ["sigmoid", "sft"]])
def test_losses_of_differences_take_the_geometric_mixture(loss, tmp_path):
    assert not needs_distribution(DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=loss)))


@pytest.mark.parametrize(
    "loss", ["rdro", "ddro", "nca_pair", "bco_pair", "apo_zero", "sppo_hard", ["sigmoid", "rdro"]]
)
def test_losses_of_single_log_ratios_take_the_sampling_distribution(loss, tmp_path):
    assert needs_distribution(DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=loss)))


def test_f_divergences_and_unpaired_losses_take_the_sampling_distribution(tmp_path):
    assert needs_distribution(DPOConfig(**cpu_args(output_dir=str(tmp_path), f_divergence_type="js_divergence")))
    assert needs_distribution(KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="apo_zero_unpaired")))
