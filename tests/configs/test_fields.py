"""Every field of every configuration, in use or not: a wrong value, drawn at random here, ends in one sentence before
anything is loaded; and what is accepted leaves our losses finite."""

import dataclasses
import logging
import math
import typing
import warnings
from numbers import Integral, Real

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_rdro import DPOConfig, KTOConfig, losses
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.losses.types import LOSS_TYPES
from trl_rdro.trainers import objectives

from ..fuzz import VALUES, fuzz
from ..tiny import cpu_args


CONFIGS = {
    DPOConfig: lambda **kwargs: DPOConfig(**cpu_args(output_dir="out", **kwargs)),
    KTOConfig: lambda **kwargs: KTOConfig(**cpu_args(output_dir="out", **kwargs)),
    IterateConfig: lambda **kwargs: IterateConfig(**{"reward_funcs": ["module.function"], **kwargs}),
}
GIVEN = {"output_dir", *cpu_args(), "reward_funcs"} - {"gradient_checkpointing"}
# What they hold is read by accelerate and DeepSpeed, which also change the environment of the process
OF_ENGINES = {"fsdp", "deepspeed", "parallelism_config", "ddp_backend", "debug"}
FIELDS = [
    (config, field.name)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if field.init and field.name not in GIVEN | OF_ENGINES
]
# Less than this is no count
SMALLEST_COUNT = {
    **dict.fromkeys(("max_steps", "local_rank"), -1),
    **dict.fromkeys(("seed", "data_seed", "dataloader_num_workers", "top_k"), 0),
}
NOT_BELOW_ZERO_ONLY = {"f_alpha_divergence_coef", "reward_weights"}  # of any sign


def kinds(config: type, name: str) -> tuple:
    hint = typing.get_type_hints(config)[name]
    return typing.get_args(hint) if typing.get_origin(hint) not in (None, list, dict) else (hint,)


def is_number_that_cannot_be(name: str, value: object, whole: bool) -> bool:
    """Whether no option called `name` can mean `value`, by rules that are not the package's tables."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return True
    if whole:
        return value < SMALLEST_COUNT.get(name, 1)
    return not abs(value) < 1e300 or (value < 0 and name not in NOT_BELOW_ZERO_ONLY)


def is_wrong(config: type, name: str, value: object) -> bool:
    """Whether `value` is of no type that the field may have, or a number that it cannot mean."""
    allowed = kinds(config, name)
    if name == "loss_type" or name == "resume_from_checkpoint":  # also one name; also True
        allowed = (*allowed, str, bool)
    for kind in allowed:
        origin = typing.get_origin(kind) or kind
        if origin in (int, float):
            fits = not is_number_that_cannot_be(name, value, whole=origin is int)
        elif origin is list:
            (element,) = typing.get_args(kind)
            fits = isinstance(value, list) and not any(
                is_number_that_cannot_be(name, x, whole=False) if element is float else not isinstance(x, element)
                for x in value
            )
        elif origin is typing.Literal:
            fits = value in typing.get_args(kind)
        else:
            fits = isinstance(value, origin)
        if fits:
            return False
    return True


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl_rdro"), "disabled", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@fuzz(700)
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_no_wrong_value_is_accepted_and_none_ends_inside_a_library(field, value):
    config, name = field
    try:
        CONFIGS[config](**{name: value})
    except ValueError as error:
        message = str(error)
        assert name in message or f"--{name}" in message, message
        assert "\n" not in message.replace(repr(value), "")
    except ImportError as error:
        assert name in str(error)
    else:
        assert not is_wrong(config, name, value), f"{config.__name__}({name}={value!r}) was accepted"


OPTIONS = [
    name
    for name in {field.name for config in (DPOConfig, KTOConfig) for field in dataclasses.fields(config)}
    if name.split("_")[0] in LOSS_TYPES or name in ("beta", "preferred_fraction", "label_smoothing")
]


@fuzz(300)
@given(name=st.sampled_from(sorted(OPTIONS)), exponent=st.integers(-45, 45), near_one=st.booleans())
def test_what_is_accepted_leaves_our_losses_finite_in_float32(name, exponent, near_one):
    """Of numbers of every size, and those just below 1, at the reference and 200 nats from it."""
    value = 1 - 10.0**exponent if near_one and exponent < 0 else 10.0**exponent
    field = next(field for field in FIELDS if field[1] == name)
    config = field[0]
    candidates = ("ddro", "rdro") if config is KTOConfig else tuple(LOSS_TYPES)
    for loss in [loss for loss in candidates if name.startswith(f"{loss}_")] or candidates:
        try:
            args = CONFIGS[config](**{"loss_type": loss, name: value})
        except ValueError:
            continue
        z = torch.tensor([-200.0, -1.0, 0.0, 1.0, 200.0])
        fraction = getattr(args, "preferred_fraction", None) or 0.5
        for preferred in (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
            if LOSS_TYPES[loss].family == "density_ratio":
                terms = objectives.density_ratio_loss(loss, z, preferred, fraction, args)[0]
                terms = terms * losses.class_weights(preferred, fraction)
            else:
                terms = objectives.pair_loss(args.inner_loss_type, z, -z, torch.full((2, 5), 20), args)
            assert terms.isfinite().all(), (loss, name, value)
        if loss == "kldpo":
            assert losses.kldpo_loss(terms, args.kldpo_tau).isfinite().all(), value
        if loss == "wdpo":
            assert losses.wdpo_penalty(torch.tensor([0.0, 1.0, 100.0]), args.wdpo_rho).isfinite().all(), value


@pytest.mark.parametrize("config", CONFIGS)
def test_the_defaults_are_in_their_ranges(config):
    CONFIGS[config]()


@pytest.mark.parametrize(
    ("config", "values", "sentence"),
    [
        (DPOConfig, {"learning_rate": math.nan}, "`learning_rate` must be a number in [0, 1000], got nan."),
        (DPOConfig, {"per_device_train_batch_size": 0}, "must be a whole number in [1, 1e6], got 0."),
        (DPOConfig, {"eval_delay": 10**400}, "`eval_delay` must be a number >= 0, got 1000"),
        (DPOConfig, {"max_steps": 0}, "`max_steps` must be a whole number >= 1, or -1, got 0. -1 is"),
        (DPOConfig, {"max_length": -1}, "`max_length` must be a whole number >= 1 or None, got -1. Leave it None"),
        (DPOConfig, {"bf16": "no"}, "`bf16` must be True or False or None, got 'no'."),
        (DPOConfig, {"truncation_mode": "middle"}, "`truncation_mode` has no value 'middle'."),
        (DPOConfig, {"optim": "adamw_torhc"}, "`optim` has no value 'adamw_torhc'. Did you mean 'adamw_torch'?"),
        (
            DPOConfig,
            {"loss_type": ["rdro", "sft"], "loss_weights": [1, "1e-1"]},
            "`loss_weights` must be a list, each element a number in [0, 1e9] or None, got [1, '1e-1']. YAML",
        ),
        (DPOConfig, {"loss_weights": 1.0}, "got 1.0. For a single one, write [1.0]."),
        (DPOConfig, {"pad_to_multiple_of": "x"}, "a whole number in [1, 65536], 'auto' or None"),
        (DPOConfig, {"model_init_kwargs": "{'a': 1}"}, "`model_init_kwargs` must be a mapping, or one as JSON text"),
        (DPOConfig, {"fsdp_config": "none.json"}, "`fsdp_config` must be a mapping, JSON text or a file, got"),
        (DPOConfig, {"report_to": "wandv"}, "`report_to` has no value 'wandv'. Did you mean 'wandb'?"),
        (KTOConfig, {"preferred_fraction": 1e-39}, "`preferred_fraction` must be a number in [1e-9, 0.999999]"),
        (KTOConfig, {"loss_type": "ddro", "preferred_fraction": 0.99}, "`ddro_cap` must be greater than t=0.99"),
        (KTOConfig, {"loss_type": "ddro", "ddro_t": 0.5, "ddro_cap": 0.4}, "`ddro_cap` must be greater than t=0.5"),
        (KTOConfig, {"beta": 0.0}, "`beta` must be a number in [1e-9, 1e9], got 0.0. With 0 nothing"),
        (KTOConfig, {"desirable_weight": 0, "undesirable_weight": 0}, "must not both be 0"),
        (IterateConfig, {"use_vllm": "no"}, "`use_vllm` must be True or False, got 'no'."),
        (IterateConfig, {"reward_funcs": "a.b"}, "got 'a.b'. For a single one, write ['a.b']."),
        (IterateConfig, {"reward_weights": "1"}, "`reward_weights` must be a list, each element a finite number"),
        (IterateConfig, {"reward_weights": [math.nan]}, "got [nan]"),
        (IterateConfig, {"reward_weights": [0]}, "`reward_weights` must not all be 0"),
    ],
    ids=str,
)  # fmt: skip
def test_the_sentence(config, values, sentence):
    with pytest.raises(ValueError) as error:
        CONFIGS[config](**values)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("config", "values", "warned"),
    [
        (DPOConfig, {"loss_type": "rdro", "rdro_alpha": 0.3}, []),
        (DPOConfig, {"loss_type": ["sft", "kldpo"], "inner_loss_type": "ipo", "kldpo_tau": 2.0}, []),
        (DPOConfig, {"loss_type": "wdpo", "wdpo_rho": 0.1, "kldpo_tau": 2.0}, ["`kldpo_tau=2.0` has no effect"]),
        (DPOConfig, {"inner_loss_type": "ipo", "ddro_t": 0.3}, ["`inner_loss_type='ipo'`", "`ddro_t=0.3`"]),
        (KTOConfig, {"loss_type": "rdro", "preferred_fraction": 0.3}, []),
        (KTOConfig, {"preferred_fraction": 0.3}, ["`preferred_fraction=0.3` has no effect: `loss_type` is kto"]),
    ],
    ids=str,
)
def test_options_that_no_loss_in_use_reads_are_named(config, values, warned, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("trl_rdro"), "disabled", False)
    monkeypatch.setattr(logging.getLogger("trl_rdro.configs.unused_options"), "disabled", False)
    caplog.set_level("WARNING", logger="trl_rdro")
    CONFIGS[config](**values)
    messages = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(messages) == len(warned)
    assert all(any(words in message for message in messages) for words in warned)
