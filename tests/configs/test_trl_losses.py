"""What TRL's trainers refuse among their own options, ours refuse when the config is built, and no more than that."""

import pytest
import trl

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.configs.dpo_config import F_DIVERGENCES
from trl_rdro.configs.loss_names import TRL_DPO_LOSSES

from ..tiny import cpu_args, tiny_preferences
from ..training import make_trainer


PAIRS = [
    *({"loss_type": [loss], "f_divergence_type": f} for loss in TRL_DPO_LOSSES for f in F_DIVERGENCES[1:2]),
    *({"loss_type": [loss], "use_weighting": True} for loss in TRL_DPO_LOSSES),
    *({"loss_type": [loss], "label_smoothing": 0.0} for loss in TRL_DPO_LOSSES),
    {"loss_type": ["sigmoid", "aot"], "use_weighting": True},
    {"loss_type": ["sigmoid", "exo_pair"]},
    {"loss_type": ["sigmoid", "aot"], "f_divergence_type": "js_divergence"},
    {"sync_ref_model": True, "precompute_ref_log_probs": True},
]
KTO = [
    *({"loss_type": loss, "per_device_train_batch_size": 1} for loss in ("kto", "apo_zero_unpaired")),
    *({"loss_type": loss, "train_sampling_strategy": "random"} for loss in ("kto", "apo_zero_unpaired")),
    {"sync_ref_model": True, "precompute_ref_log_probs": True},
]


@pytest.fixture(scope="module")
def pairs():
    return tiny_preferences(4)


@pytest.mark.parametrize(
    ("config_class", "trainer_class", "options"),
    [*((DPOConfig, trl.DPOTrainer, options) for options in PAIRS)]
    + [*((KTOConfig, trl.KTOTrainer, options) for options in KTO)],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused_exactly_where_trl_refuses(config_class, trainer_class, options, qwen2, tmp_path, pairs):
    smoothed = {"label_smoothing": 0.1} if options.get("loss_type") in (["exo_pair"], ["robust"]) else {}
    options = {**smoothed, **options}
    try:
        # TRL's own config, which checks next to nothing
        make_trainer(
            qwen2,
            tmp_path,
            trainer_class,
            trainer_kwargs={"train_dataset": pairs},
            **options,
        )
        refused = False
    except (ValueError, NotImplementedError):
        refused = True
    try:
        config_class(**cpu_args(output_dir="out", **options))
    except ValueError as error:
        assert refused, error
        assert "\n" not in str(error) and str(error).startswith("`")
    else:
        assert not refused
