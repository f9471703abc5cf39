"""Names and options of the config reach the right function with the right arguments."""

from collections import defaultdict

import pytest
import torch

from trl_rdro import DPOConfig, losses
from trl_rdro.configs.dpo_config import INNER_LOSSES
from trl_rdro.losses.types import LOSS_TYPES, of_family
from trl_rdro.trainers import objectives

from ..loss_cases import LOSS_CASES
from ..tiny import cpu_args


CHOSEN, REJECTED = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LENGTHS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
COLUMNS = defaultdict(lambda: torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))
PREFERRED = torch.tensor([True, False, True, True, False, False])


def config(**settings) -> DPOConfig:
    return DPOConfig(**cpu_args(output_dir="unused", **settings))


def test_trls_pair_losses():
    args = config(beta=0.3, loss_type="kldpo", label_smoothing=0.2)
    expected = {
        "sigmoid": losses.sigmoid_loss(CHOSEN, REJECTED, 0.3, 0.2),
        "ipo": losses.ipo_loss(CHOSEN / LENGTHS[0], REJECTED / LENGTHS[1], 0.3),
        "hinge": losses.hinge_loss(CHOSEN, REJECTED, 0.3),
    }
    for name, values in expected.items():
        assert torch.equal(objectives.pair_loss(name, CHOSEN, REJECTED, LENGTHS, args), values), name


@pytest.mark.parametrize("name", INNER_LOSSES)
def test_every_inner_loss_is_known_and_finite(name):
    args = config(**(LOSS_CASES[name].settings if name in LOSS_CASES else {}))
    values = objectives.pair_loss(name, CHOSEN, REJECTED, LENGTHS, args, COLUMNS)
    assert values.shape == (6,) and values.isfinite().all()


@pytest.mark.parametrize("given", [None, 0.3])
def test_density_ratio_losses_take_the_datas_fraction_unless_told_otherwise(given):
    args = config(loss_type="ddro", ddro_t=given, rdro_alpha=given, ddro_cap=0.9)
    mixture = 0.4 if given is None else given
    values, beyond_cap = objectives.density_ratio_loss("rdro", CHOSEN, PREFERRED, 0.4, args)
    assert torch.equal(values, losses.rdro_loss(CHOSEN, PREFERRED, mixture)) and beyond_cap is None
    values, beyond_cap = objectives.density_ratio_loss("ddro", CHOSEN, PREFERRED, 0.4, args)
    assert torch.equal(values, losses.ddro_loss(CHOSEN, PREFERRED, mixture, 0.9))
    assert torch.equal(beyond_cap, losses.ddro_beyond_cap(CHOSEN, mixture, 0.9))


def test_every_density_ratio_loss_is_known():
    for name in of_family("density_ratio"):
        values, _ = objectives.density_ratio_loss(name, CHOSEN, PREFERRED, 0.4, config(loss_type=name))
        assert values.shape == (6,) and values.isfinite().all()


def test_every_temperature_is_the_option_that_the_table_names():
    for name, loss in LOSS_TYPES.items():
        if loss.temperature is not None:
            value = abs(objectives.temperature(name, config(**{loss.temperature: 0.25})))
            assert value == 0.25, name


@pytest.mark.parametrize(
    "call",
    [
        lambda: objectives.pair_loss("rdro", CHOSEN, REJECTED, LENGTHS, config()),
        lambda: objectives.density_ratio_loss("sigmoid", CHOSEN, PREFERRED, 0.4, config()),
        lambda: objectives.temperature("wdpo", config()),
        lambda: objectives.number_of_a_new_label("holder", config()),
        lambda: objectives.state_statistics("holder", None, config()),
        lambda: objectives.state_metrics("holder", None, {}),
        lambda: objectives.updated_numbers("holder", None, None, None, None, config()),
    ],
)
def test_a_name_of_another_family_is_refused(call):
    with pytest.raises(ValueError, match="There is no"):
        call()
