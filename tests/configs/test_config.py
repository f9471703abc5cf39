"""`DPOConfig`: what it refuses and says about it, what it lets through, and that TRL's parser can read and list it."""

import inspect
import math
import re
from dataclasses import fields

import pytest
import trl
import yaml
from trl import TrlParser
from trl.trainer import dpo_trainer as trl_dpo_trainer

from trl_rdro import DPOConfig
from trl_rdro.losses.types import LOSS_TYPES, of_family

from ..tiny import cpu_args


# From TRL's code, which knows them by `loss_type == "..."`
TRL_LOSSES = sorted(set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(trl_dpo_trainer))))
OURS = list(LOSS_TYPES)
PAIRWISE = of_family("pair")
ROBUST = of_family("robust")

NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "0.5", "", [0.5], {}]
NOT_OPEN_UNIT = [*NOT_NUMBERS, 0, 0.0, 1, 1.0, -0.1, 1.1, 2]
NOT_POSITIVE = [*NOT_NUMBERS, None, 0, 0.0, -1, -0.05]
NOT_NAMES = ["", "Squared", True, 3, ["squared"]]

BAD_VALUES = {
    "ddro_t": NOT_OPEN_UNIT,
    "ddro_cap": [*NOT_OPEN_UNIT, None, 1e-39],
    "rdro_alpha": [*NOT_OPEN_UNIT, 1e-39, 1 - 1e-9],
    "kldpo_tau": [*NOT_NUMBERS, None, 0, 0.0, -1, -0.05, 1e39],
    "kldpo_target_ess": [*NOT_NUMBERS, 0, 1, 1.5, -0.1],
    "drdpo_beta": [*NOT_POSITIVE, 1e39],
    "grdpo_eta": [*NOT_NUMBERS, None, -1, -1e-9, 1e39],
    "wdpo_rho": [*NOT_NUMBERS, None, -1, -1e-9, 1e39],
    "wdpo_penalty": [*NOT_NAMES, None, "mean"],
    "wdpo_difference": [*NOT_NAMES, None, "forward"],
    "wdpo_interval": [*NOT_NUMBERS, None, 0, -1, 1.5, 2.0],
    "wdpo_eps": [*NOT_OPEN_UNIT, 1e-39],
    "inner_loss_type": [*NOT_NAMES, None, "kldpo", "robust"],
    "holder_gamma": NOT_POSITIVE,
    "ropo_alpha": NOT_POSITIVE,
    "repo_eta": [*NOT_POSITIVE, 1.1],
    "repo_rate": [*NOT_NUMBERS, None, -0.1, 1.1],
    "chipo_clip": NOT_POSITIVE,
    "dpop_lambda": [*NOT_NUMBERS, None, -1, -1e-9],
    "adadpo_rho0": NOT_POSITIVE,
    "adadpo_tau_min": NOT_POSITIVE,
    "adadpo_tau_max": [*NOT_POSITIVE, 0.09],
    "dpopro_rho": [*NOT_NUMBERS, None, -1, -1e-9],
    "mrpo_reference": ["", 3, True, ["model"]],
    "mrpo_alpha": [*NOT_NUMBERS, -0.1, 1.1],
    "plot": [None, "yes", 1],
    "resume_with_changes": [None, "yes", 1],
    "share_prompt": [None, "yes", 1],
    "balance_tokens": [None, "yes", 1],
    "loss_type": ["", "dpo", "rdro,sft", ["rdro", "dpo"], [3], [None], [["rdro"]], 3, True, None, []],
}
GOOD_VALUES = {
    "ddro_t": [None, 1e-3, 0.39, 0.999],
    "ddro_cap": [1e-3, 0.9, 0.999],
    "rdro_alpha": [None, 1e-3, 0.39, 0.999],
    "kldpo_tau": [0.005, 1, 1e6],
    "kldpo_target_ess": [None, 0.25, 0.99],
    "drdpo_beta": [0.005, 1, 1e6],
    "grdpo_eta": [0, 0.01, 10],
    "wdpo_rho": [0, 0.0, 0.005, 100],
    "wdpo_penalty": ["squared", "rms"],
    "wdpo_difference": ["central", "one_sided"],
    "wdpo_interval": [1, 4],
    "wdpo_eps": [None, 1e-5, 0.1],
    "inner_loss_type": ["sigmoid", "ipo", "hinge", *PAIRWISE],
    "holder_gamma": [0.5, 2, 8],
    "ropo_alpha": [1e-3, 14],
    "repo_eta": [0.01, 0.9, 1, 1.0],
    "repo_rate": [0, 0.1, 1],
    "chipo_clip": [0.5, 2],
    "dpop_lambda": [0, 0.0, 50],
    "adadpo_rho0": [1e-6, 0.1, 2],
    "adadpo_tau_min": [1e-3, 5.0],
    "adadpo_tau_max": [0.1, 100],
    "dpopro_rho": [0, 0.0, 0.1, 2],
    "mrpo_reference": [None, "some/model"],
    "mrpo_alpha": [None, 0, 0.5, 1],
    "plot": [False, True],
    "resume_with_changes": [False, True],
    "share_prompt": [False, True],
    "balance_tokens": [False, True],
    "loss_type": [["rdro", "sft"], ["sigmoid"], ["kldpo", "wdpo"]],
}


@pytest.fixture
def build(tmp_path):
    return lambda **kwargs: DPOConfig(**cpu_args(output_dir=str(tmp_path), **kwargs))


@pytest.fixture
def parse(tmp_path):
    """Parse YAML text, and arguments that come on top, as TRL's scripts do."""

    def run(text: str, *args: str) -> DPOConfig:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(cpu_args(output_dir=str(tmp_path))) + text)
        return TrlParser((DPOConfig,)).parse_args_and_config(["--config", str(path), *args])[0]

    return run


def test_the_tables_above_name_every_field_of_ours():
    ours = {field.name for field in fields(DPOConfig)} - {field.name for field in fields(trl.DPOConfig)}
    assert set(BAD_VALUES) == set(GOOD_VALUES) == ours | {"loss_type"}
    assert len(TRL_LOSSES) >= 15 and {"sigmoid", "bco_pair", "sft"} <= set(TRL_LOSSES)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD_VALUES for value in BAD_VALUES[name]])
def test_bad_values_are_refused_by_name_and_value(build, name, value):
    seen = value if name != "loss_type" or not isinstance(value, list) or not value else value[-1]
    with pytest.raises(ValueError) as error:
        build(**{name: value})
    assert f"`{name}`" in str(error.value) and repr(seen) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in GOOD_VALUES for value in GOOD_VALUES[name]])
def test_good_values_are_kept(build, name, value):
    assert getattr(build(**{name: value}), name) == value


@pytest.mark.parametrize("loss_type", TRL_LOSSES + OURS)
def test_every_loss_type_is_accepted_and_becomes_a_list(build, loss_type):
    needed = {"label_smoothing": 1e-3} if loss_type == "exo_pair" else {}
    assert build(loss_type=loss_type, **needed).loss_type == [loss_type]


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("sigmoidd", "sigmoid"),
        ("rdor", "rdro"),
        ("RDRO", "rdro"),
        ("ddrro", "ddro"),
        ("kl_dpo", "kldpo"),
        ("wdop", "wdpo"),
        ("hinge_loss", "hinge"),
        ("apo-zero", "apo_zero"),
    ],
)
def test_an_unknown_loss_type_is_refused_with_the_nearest_name(build, typo, nearest):
    for loss_type in (typo, ["sigmoid", typo]):
        with pytest.raises(ValueError, match=rf"`loss_type`.*'{typo}'.*'{nearest}'\?"):
            build(loss_type=loss_type)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        *[({"loss_type": loss, "f_divergence_type": "js_divergence"}, [loss, "js_divergence"]) for loss in OURS],
        ({"loss_type": ["sigmoid", "rdro"], "f_divergence_type": "forward_kl"}, ["rdro", "forward_kl"]),
        *[({"loss_type": loss, "use_weighting": True}, [loss, "use_weighting=True"]) for loss in OURS],
        ({"loss_type": ["sigmoid", "wdpo"], "use_weighting": True}, ["wdpo", "use_weighting=True"]),
        *[({"loss_type": loss, "ld_alpha": 0.5}, [loss, "ld_alpha=0.5"]) for loss in ("ddro", "rdro")],
        ({"loss_type": ["rdro", "kldpo"], "ld_alpha": 0.0}, ["rdro", "ld_alpha=0.0"]),
        (
            {"loss_type": "kldpo", "kldpo_target_ess": 0.1, "per_device_train_batch_size": 8},
            ["0.1", "8 pairs", "0.125"],
        ),
        ({"loss_type": "kldpo", "kldpo_target_ess": 0.5, "kldpo_tau": 0.5}, ["kldpo_tau=0.5", "kldpo_target_ess=0.5"]),
        ({"loss_type": "kto"}, ["'kto'", "needs labelled completions", "`KTOTrainer`"]),
        *[
            ({"loss_type": loss, "label_smoothing": value}, ["label_smoothing", repr(value)])
            for loss in ("kldpo", "wdpo", "cdpo")
            for value in (0.5, 0.7, -0.1, math.nan, "0.1", True)
        ],
        *[
            ({"loss_type": loss, "inner_loss_type": inner, "label_smoothing": 0.1}, ["label_smoothing", inner])
            for loss in ("kldpo", "wdpo")
            for inner in ("ipo", "hinge", "holder")
        ],
        ({"loss_type": ["holder", "dpop"], "label_smoothing": 0.1}, ["label_smoothing=0.1", "'holder' and 'dpop'"]),
        *[
            ({"loss_type": loss, "beta": value}, ["beta", repr(value)])
            for loss in (*ROBUST, *PAIRWISE)
            for value in (0, -0.1, math.nan, math.inf, "0.1", True)
        ],
        ({"loss_type": ["rdro", "sft"], "loss_weights": [1.0]}, ["loss_weights", "1", "2"]),
        ({"loss_type": "drdpo", "per_device_train_batch_size": 1}, ["`drdpo`", "one pair", "`sigmoid`"]),
        ({"loss_type": ["sft", "drdpo"], "per_device_train_batch_size": 1}, ["`drdpo`", "one pair"]),
        ({"loss_type": ["rdro", "sft"], "loss_weights": [0, 0.0]}, ["`loss_weights` must not all be 0", "[0, 0.0]"]),
        *[({"loss_type": loss, "beta": 0}, ["`beta`", "got 0"]) for loss in ("sigmoid", "ipo", "bco_pair")],
        ({"loss_type": ["rdro", "apo_zero"], "beta": 0.0}, ["`beta`", "got 0.0"]),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ["`label_smoothing`", "[0, 0.5)", "got 0.5"]),
        # t is known: half of the completions of pairs are preferred
        ({"loss_type": "ddro", "ddro_cap": 0.5}, ["`ddro_cap`", "t=0.5", "got 0.5"]),
        ({"loss_type": ["sft", "ddro"], "ddro_cap": 0.8, "ddro_t": 0.9}, ["`ddro_cap`", "t=0.9", "got 0.8"]),
    ],
    ids=str,
)
def test_combinations_that_mean_nothing_are_refused(build, kwargs, words):
    with pytest.raises(ValueError) as error:
        build(**kwargs)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"loss_type": ["rdro", "sft"], "loss_weights": [1.0, 0.1]},
        {"loss_type": ["ddro", "kldpo"]},
        {"loss_type": "kldpo", "ld_alpha": 0.5},
        {"loss_type": "wdpo", "ld_alpha": 0.5},
        {"loss_type": "kldpo", "label_smoothing": 0.1},
        {"loss_type": "wdpo", "label_smoothing": 0.49},
        {"loss_type": "kldpo", "inner_loss_type": "ipo", "label_smoothing": 0.0},
        {"loss_type": "kldpo", "inner_loss_type": "cdpo", "label_smoothing": 0.1},
        {"loss_type": "drdpo", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"loss_type": ["holder", "cdpo"], "label_smoothing": 0.1},
        # TRL's losses keep their options, alone and beside ours
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "exo_pair", "label_smoothing": 0.7},
        {"loss_type": "sigmoid", "use_weighting": True, "f_divergence_type": "forward_kl", "ld_alpha": 0.5},
        *[
            {"loss_type": ["kldpo", smoothed], "inner_loss_type": "ipo", "label_smoothing": 0.1}
            for smoothed in ("robust", "exo_pair", "aot", "aot_unpaired")
        ],
        {"loss_type": ["rdro", "robust"], "label_smoothing": 0.1},
        # where beta only scales the logged rewards
        {"loss_type": "rdro", "beta": 0.0},
        {"loss_type": ["rdro", "sft"], "beta": 0.0},
        {"loss_type": ["rdro", "sft"], "loss_weights": [1, 0]},
        {"loss_type": "ddro", "ddro_cap": 0.5, "ddro_t": 0.4},
        {"loss_type": "rdro", "ddro_cap": 0.5},
        # fields of losses that are not in use do no harm
        {"loss_type": "sigmoid", "rdro_alpha": 0.3, "ddro_t": 0.3, "kldpo_tau": 0.1, "wdpo_rho": 0.1},
    ],
    ids=str,
)
def test_combinations_that_mean_something_are_allowed(build, kwargs):
    config = build(**kwargs)
    assert all(getattr(config, name) in (value, [value]) for name, value in kwargs.items())


def test_defaults_are_the_documented_ones(build):
    config = build()
    assert config.loss_type == ["sigmoid"] and config.inner_loss_type == "sigmoid" and config.wdpo_penalty == "squared"
    assert config.ddro_t is None and config.rdro_alpha is None and config.wdpo_eps is None
    assert config.ddro_cap == 0.99 and config.kldpo_tau > 0 and config.wdpo_rho >= 0
    for field in fields(trl.DPOConfig):  # a change of import changes nothing else
        if field.init and field.name not in cpu_args(output_dir=""):
            ours, theirs = (getattr(cls(**cpu_args(output_dir="x")), field.name) for cls in (DPOConfig, trl.DPOConfig))
            assert ours == theirs, field.name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss_type: rdro\nrdro_alpha: 0.39\n", {"loss_type": ["rdro"], "rdro_alpha": 0.39}),
        (
            "loss_type: [ddro, sft]\nloss_weights: [1, 0.1]\nddro_t: 2e-1\nddro_cap: 9.5e-1\n",
            {"loss_type": ["ddro", "sft"], "loss_weights": [1, 0.1], "ddro_t": 0.2, "ddro_cap": 0.95},
        ),
        (
            "loss_type:\n  - rdro\nrdro_alpha: null\nddro_t:\n",
            {"loss_type": ["rdro"], "rdro_alpha": None, "ddro_t": None},
        ),
        # YAML reads 5e-2, having no point, as text
        (
            "loss_type: kldpo\nkldpo_tau: 5e-2\ninner_loss_type: ipo\n",
            {"loss_type": ["kldpo"], "kldpo_tau": 0.05, "inner_loss_type": "ipo"},
        ),
        (
            'loss_type: wdpo\nwdpo_rho: "5e-2"\nwdpo_eps: "1e-3"\nwdpo_penalty: rms\n',
            {"loss_type": ["wdpo"], "wdpo_rho": 0.05, "wdpo_eps": 1e-3, "wdpo_penalty": "rms"},
        ),
        ("loss_type: wdpo\nwdpo_rho: 0\n", {"loss_type": ["wdpo"], "wdpo_rho": 0}),
    ],
)
def test_yaml(parse, text, expected):
    config = parse(text)
    assert {name: getattr(config, name) for name in expected} == expected


def test_arguments_come_on_top_of_yaml(parse):
    args = "--loss_type rdro sft --rdro_alpha 3e-1 --wdpo_penalty rms".split()
    config = parse("loss_type: kldpo\nrdro_alpha: 0.39\nkldpo_tau: 0.5\n", *args)
    assert (config.loss_type, config.rdro_alpha, config.kldpo_tau) == (["rdro", "sft"], 0.3, 0.5)
    assert config.wdpo_penalty == "rms"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss_type: rdor\n", ["`loss_type`", "'rdor'", "'rdro'"]),
        ("loss_type: [sigmoid, rdor]\n", ["`loss_type`", "'rdor'", "'rdro'"]),
        ("rdro_alpha: 39\n", ["`rdro_alpha`", "39"]),
        ("kldpo_tau: .nan\n", ["`kldpo_tau`", "nan"]),
        ("ddro_t: true\n", ["`ddro_t`", "True"]),
        ("wdpo_penalty: mean\n", ["`wdpo_penalty`", "'mean'"]),
        ("rdro_alfa: 0.39\n", ["rdro_alfa"]),
    ],
)
def test_yaml_with_bad_values_or_unknown_keys_is_refused(parse, text, words):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert all(word in str(error.value) for word in words)


def test_help_renders_and_describes_every_field_of_ours(capsys):
    with pytest.raises(SystemExit) as stop:  # argparse formats the texts with `%`
        TrlParser((DPOConfig,)).parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    help_of = {field.name: field.metadata["help"] for field in fields(DPOConfig) if field.name in BAD_VALUES}
    assert set(help_of) == set(BAD_VALUES)
    unbroken = text.replace(" ", "")  # lines are broken at hyphens too
    for name, words in help_of.items():
        assert f"--{name}" in text and words.replace(" ", "") in unbroken, name
    assert all(f"`'{loss}'`" in help_of["loss_type"] for loss in TRL_LOSSES + OURS)
