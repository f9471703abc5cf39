"""The fraction of preferred completions: counted, set by hand, or missing."""

import logging
import math

import pytest
from datasets import Dataset

from trl_rdro import KTOTrainer
from trl_rdro.losses.types import of_family

from ..loss_cases import LOSS_CASES
from ..training import (
    kto_config,
    labelled,
    largest_difference,
    parameters,
    two_models,
)


EACH_LOSS = pytest.mark.parametrize("loss_type", of_family("density_ratio"))


def fraction_messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "Preferred fraction" in record.getMessage()]


@EACH_LOSS
def test_preferred_fraction_is_counted_after_filtering_and_logged_once(tmp_path, qwen2, caplog, loss_type):
    rows = list(labelled(3, 7))
    rows += [{**row, "prompt": row["prompt"] * 20} for row in rows[:2]]
    args = kto_config(
        tmp_path,
        loss_type,
        max_length=64,
        per_device_train_batch_size=10,
        desirable_weight=2.0,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
    )
    with caplog.at_level(logging.INFO):
        trainer = KTOTrainer(
            qwen2,
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset={"balanced": labelled(4, 4), "other": labelled(1, 4)},
        )
        trainer.train()
        trainer.evaluate(labelled(2, 2))
    assert len(trainer.train_dataset) == 10 and trainer.preferred_fraction == 0.3
    (message,) = fraction_messages(caplog)
    assert "0.3000" in message and "3 of 10" in message
    # Weights by that fraction, `desirable_weight` on top, and alpha = 0.3: 2 (1 + alpha) log 2 + (1 - alpha) log 2
    preferred, other = (1.3, 0.7) if loss_type == "rdro" else (1, 1)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx((2 * preferred + other) * math.log(2), rel=1e-5)
    assert entry["share/chosen"] == pytest.approx(0.3)
    for name, share in (("balanced", 0.5), ("other", 0.2)):
        (entry,) = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        assert entry[f"eval_{name}_share/chosen"] == pytest.approx(share)
        assert f"eval_{name}_logratios/chosen" in entry


@EACH_LOSS
def test_preferred_fraction_sets_the_mixture(tmp_path, loss_type):
    def evaluate(**kwargs):
        args = kto_config(tmp_path, loss_type, **kwargs)
        rows = {"train_dataset": labelled(2, 6), "eval_dataset": labelled(4, 4, seed=1)}
        return KTOTrainer(args=args, **rows, **two_models()).evaluate()["eval_loss"]

    option = LOSS_CASES[loss_type].mixture
    assert evaluate() == evaluate(**{option: 0.25}) == evaluate(preferred_fraction=0.25)
    assert evaluate() != pytest.approx(evaluate(**{option: 0.5}), rel=1e-3)
    # The classes of the evaluation set are weighted by its own fraction
    assert evaluate() == evaluate(preferred_fraction=0.5, **{option: 0.25})


@EACH_LOSS
def test_a_streamed_evaluation_set_is_weighted_by_its_own_fraction(tmp_path, loss_type):
    rows = labelled(1, 3, seed=1)
    rows = rows.add_column("weight", [3.0, 1.0, 2.0, 0.5])
    found = []
    for evaluated in (rows, rows.to_iterable_dataset()):
        args = kto_config(tmp_path, loss_type, per_device_eval_batch_size=4)
        trainer = KTOTrainer(args=args, train_dataset=labelled(4, 4), eval_dataset=evaluated, **two_models())
        found += [trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_a_counted_fraction_above_ddros_cap_is_refused(tmp_path, qwen2):
    with pytest.raises(ValueError, match="`ddro_cap` must be greater than t=0.75"):
        KTOTrainer(qwen2, args=kto_config(tmp_path, "ddro", ddro_cap=0.6), train_dataset=labelled(6, 2))


def test_a_set_preferred_fraction_is_compared_with_the_count(tmp_path, qwen2, caplog):
    with caplog.at_level(logging.INFO):
        trainer = KTOTrainer(qwen2, args=kto_config(tmp_path, preferred_fraction=0.4), train_dataset=labelled(2, 6))
    assert trainer.preferred_fraction == 0.4
    (message,) = fraction_messages(caplog)
    assert "0.4000 as set" in message and "0.2500 (2 of 8)" in message


@EACH_LOSS
def test_streaming_needs_the_preferred_fraction(tmp_path, qwen2, loss_type):
    rows = labelled(6, 2)
    with pytest.raises(ValueError, match="`preferred_fraction`"):
        # Refused before the model, which does not exist, is looked for
        KTOTrainer("no/such-model", args=kto_config(tmp_path, loss_type), train_dataset=rows.to_iterable_dataset())
    args = kto_config(tmp_path, loss_type, preferred_fraction=0.75, max_steps=1)
    trainer = KTOTrainer(qwen2, args=args, train_dataset=rows.to_iterable_dataset())
    before = parameters(trainer)
    trainer.train()
    assert trainer.preferred_fraction == 0.75
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LOSS_CASES[loss_type].constant, rel=1e-5)
    assert largest_difference(before, parameters(trainer)) > 0


@EACH_LOSS
@pytest.mark.parametrize(("counts", "word"), [((4, 0), "preferred"), ((0, 4), "non-preferred")])
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_one_class_is_refused(tmp_path, qwen2, loss_type, counts, word, fraction):
    args = kto_config(tmp_path, loss_type, preferred_fraction=fraction)
    with pytest.raises(ValueError, match=f"All 4 completions of `train_dataset` are {word}"):
        KTOTrainer(qwen2, args=args, train_dataset=labelled(*counts))


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_weights_set_by_hand_are_warned_about(tmp_path, qwen2, caplog, name):
    KTOTrainer(qwen2, args=kto_config(tmp_path), train_dataset=labelled(2, 8))
    assert not [record for record in caplog.records if "desirable_weight" in record.getMessage()]  # nor TRL's advice
    KTOTrainer(qwen2, args=kto_config(tmp_path, **{name: 2.0}), train_dataset=labelled(2, 8))
    (record,) = [record for record in caplog.records if "desirable_weight" in record.getMessage()]
    assert record.levelno == logging.WARNING and f"`{name}=2.0`" in record.getMessage()
    assert "no longer converges" in record.getMessage()


@EACH_LOSS
@pytest.mark.parametrize(("weights", "word"), [([1.0, 2.0, 0.0, 0.0], "preferred"), ([0, 0, 1, 0], "non-preferred")])
def test_one_class_of_positive_weight_is_refused(tmp_path, qwen2, loss_type, weights, word):
    data = labelled(2, 2).add_column("weight", weights)
    with pytest.raises(ValueError, match=f"All completions of positive weight of `train_dataset` are {word}: "):
        KTOTrainer(qwen2, args=kto_config(tmp_path, loss_type), train_dataset=data)


@EACH_LOSS
def test_an_evaluation_set_of_weights_0_is_evaluated(tmp_path, qwen2, loss_type):
    rows = labelled(2, 2, seed=1).add_column("weight", [0.0] * 4)
    for evaluated in (rows, rows.to_iterable_dataset()):
        trainer = KTOTrainer(
            qwen2, args=kto_config(tmp_path, loss_type), train_dataset=labelled(4, 4), eval_dataset=evaluated
        )
        assert trainer.evaluate()["eval_loss"] == 0
