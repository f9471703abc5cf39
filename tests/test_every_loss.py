"""What every loss type must have and do, by tests/loss_cases.py."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from trl_rdro import DPOConfig
from trl_rdro.losses.types import LOSS_TYPES, of_family
from trl_rdro.tools.plotting import LABEL_PANELS, MORE_PANELS
from trl_rdro.trainers import objectives

from .loss_cases import LOSS_CASES
from .tiny import cpu_args
from .training import SGD, make_trainer, parameters, same_parameters, steps, train


DOCS = Path(__file__).parents[1] / "docs"
# Logged for whoever sets it by hand; a constant of most runs
NOT_PLOTTED = {"wdpo/eps"}
# What the losses of pairs look at beside log-ratios; for mrpo two references that agree
COLUMNS = defaultdict(lambda: torch.linspace(0.5, 1, 16))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_nothing_is_missing(name):
    loss = LOSS_TYPES[name]
    assert name in LOSS_CASES, f"{name} has no line in tests/loss_cases.py"
    assert f"\n## {name}" in (DOCS / "losses.md").read_text(), f"{name} has no section in docs/losses.md"
    assert loss.paper["title"] and loss.paper["id"] and "@" in loss.paper["citation"], f"{name} has no paper"
    assert loss.summary and loss.family in ("density_ratio", "pair", "robust"), f"{name} is not described"
    if loss.temperature is not None:
        assert loss.temperature in DPOConfig.__dataclass_fields__, f"{name}: no option {loss.temperature}"
    drawn = {metric for metrics in MORE_PANELS.values() for metric in metrics}
    for metric in LOSS_CASES[name].metrics:
        of_a_label = metric.startswith(tuple(LABEL_PANELS.values()))
        assert of_a_label or f"{name}/{metric}" in drawn | NOT_PLOTTED, f"{name}/{metric} has no plot title"


def test_no_case_is_left_over():
    assert list(LOSS_CASES) == list(LOSS_TYPES)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_run_starts_at_the_constant_logs_its_metrics_and_learns(name, model, tmp_path):
    case = LOSS_CASES[name]
    settings = {**SGD, "max_grad_norm": 1.0, "learning_rate": case.learning_rate, **case.settings}
    logs = steps(train(model, tmp_path, loss_type=name, max_steps=12, **settings))
    if case.constant is not None:
        assert logs[0]["loss"] - logs[0].get(f"{name}/penalty", 0) == pytest.approx(case.constant, abs=1e-4)
    assert {key for key in logs[0] if key.startswith(f"{name}/")} == {f"{name}/{metric}" for metric in case.metrics}
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 1e-3
    assert logs[-1]["loss"] < logs[0]["loss"]


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(name, model, tmp_path):
    """Of two micro-batches a step, resumed after the first of two steps. Killed runs are in test_interruptions."""
    settings = {
        "loss_type": name,
        **LOSS_CASES[name].settings,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = train(model, tmp_path, **settings)
    resumed = make_trainer(model, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2 and len(steps(resumed)) == 2
    assert same_parameters(parameters(whole), parameters(resumed))


@pytest.mark.parametrize("name", [*of_family("pair"), "sigmoid", "ipo", "hinge"])
def test_pair_losses_see_a_common_constant_only_if_the_table_says_so(name):
    chosen, rejected = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    args, lengths = DPOConfig(**cpu_args(output_dir="unused"), **settings_of(name)), torch.full((2, 16), 7)
    values, shifted = (
        objectives.pair_loss(name, chosen + shift, rejected + shift, lengths, args, COLUMNS) for shift in (0.0, 0.5)
    )
    of_differences = name not in LOSS_TYPES or LOSS_TYPES[name].of_differences
    assert torch.allclose(values, shifted) == of_differences


def settings_of(name):
    return LOSS_CASES[name].settings if name in LOSS_CASES else {}
