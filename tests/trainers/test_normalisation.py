"""`reference/log_normalisation`, from both trainers: what is logged, however a step is cut, and what is said."""

import math

import pytest
import torch
from datasets import Dataset

from trl_rdro import DPOTrainer, KTOTrainer
from trl_rdro.losses import normalisation_sums
from trl_rdro.trainers import normalisation
from trl_rdro.trainers.guard_rails import GuardRails
from trl_rdro.trainers.normalisation import ERROR, NAME, RECENT

from ..tiny import tiny_preferences
from ..training import flatten, labelled, make_config, make_trainer, steps, train, two_models


def weighted_rows(trainer_class) -> Dataset:
    rows = list(tiny_preferences(8)) if trainer_class is DPOTrainer else list(labelled(3, 5))
    return Dataset.from_list([{**row, "weight": 1.0 + i % 3} for i, row in enumerate(rows)])


@pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer])
@pytest.mark.parametrize("settings", [{"loss_type": "rdro", "rdro_alpha": 0.3}, {"loss_type": "ddro"}], ids=str)
def test_the_same_however_a_step_is_cut(tmp_path, trainer_class, settings):
    data, logs = weighted_rows(trainer_class), []
    for micro_batch, accumulation in ((8, 1), (1, 8), (3, 3)):
        models = two_models()
        trainer = train(
            models.pop("model"),
            tmp_path,
            trainer_class,
            {"train_dataset": data, "eval_dataset": data, **models},
            per_device_train_batch_size=micro_batch,
            per_device_eval_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            **settings,
        )
        log = {key: steps(trainer)[0][key] for key in (NAME, RECENT, ERROR)}
        logs.append(log | {key: value for key, value in trainer.evaluate().items() if NAME in key})
    assert abs(logs[0][NAME]) > 0.1 and logs[0][ERROR] > 0.01 and f"eval_{ERROR}" in logs[0]
    assert logs[0][RECENT] == logs[0][NAME]
    for log in logs[1:]:
        assert log == pytest.approx(logs[0], abs=1e-5)


def test_by_hand(tmp_path):
    """Of labelled completions, against the log-ratios that `compute_loss` sees."""
    models, rows = two_models(), labelled(2, 6)
    policy = models.pop("model")
    trainer = make_trainer(
        policy, tmp_path, KTOTrainer, {"train_dataset": rows, **models}, loss_type="rdro", rdro_alpha=0.6
    )
    z = {True: [], False: []}
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        reference, own = (trainer.compute_ref_log_probs(m, batch)[0].item() for m in (trainer.ref_model, policy))
        z[row["label"]].append(own - reference)
    n = sum(share * sum(map(math.exp, z[label])) / len(z[label]) for label, share in ((True, 0.6), (False, 0.4)))
    assert trainer.evaluate(rows)[f"eval_{NAME}"] == pytest.approx(math.log(n), abs=1e-4)


@pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer])
def test_the_guard_rail_speaks_for_a_reference_that_is_not_the_mixture(qwen2, tmp_path, messages, trainer_class):
    trainer = train(qwen2, tmp_path, trainer_class, loss_type="ddro", max_steps=20)
    assert steps(trainer)[0][NAME] == pytest.approx(0, abs=1e-5)  # the policy has not moved
    (said,) = [line for line in messages() if "the mean of policy / reference" in line]
    assert steps(trainer)[-1][RECENT] > math.log(1.5) and "trl-rdro inspect --reference" in said


def test_the_guard_rail_is_silent_within_its_error_and_with_few_completions(tmp_path, messages):
    rails = GuardRails(make_config(tmp_path, loss_type="rdro"))
    for value, error, completions in ((0.39, 0.1, 500), (-0.34, 0.0, 500), (1.0, 0.4, 500), (3.0, 0.1, 40)):
        rails.watch_reference({NAME: value, ERROR: error}, completions, "")
    for step in range(1, 30):
        rails.watch(step, {"logratios/chosen": 0.0, RECENT: 0.0, ERROR: 0.0}, 8, 8)
    assert not [line for line in messages() if "the mean of policy" in line]
    rails.watch_reference({NAME: -0.6, ERROR: 0.1}, 50, "In `eval`")
    assert "In `eval` the mean of policy / reference over the completions is 0.549" in messages()[-1]


def test_not_with_other_losses(tmp_path, qwen2):
    assert NAME not in steps(train(qwen2, tmp_path, max_steps=1, loss_type="kldpo"))[0]
    rows = Dataset.from_list(flatten(tiny_preferences(4)))
    log = steps(train(qwen2, tmp_path, KTOTrainer, {"train_dataset": rows}, loss_type="kto", max_steps=1))[0]
    assert NAME not in log


def test_the_recent_steps_are_bounded_where_few_completions_count(monkeypatch):
    """One completion outweighs all others, so that the effective number never reaches `COMPLETIONS`."""
    monkeypatch.setattr(normalisation, "STEPS", 20)
    recent = normalisation.Normalisation()
    for step in range(50):
        weight = torch.tensor([1e6 if step % 10 == 0 else 1.0])
        recent.of_step(step, tuple(normalisation_sums(torch.zeros(1), weight).tolist()), 1)
    assert normalisation.completions(recent.recent) == pytest.approx(2, rel=1e-3)
