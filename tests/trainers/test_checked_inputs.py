"""What the trainers refuse before a model is loaded, and what they make of data that need a second look."""

import logging
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.compat import trl as trl_compat

from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_tokenizer


TRAINERS = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}
METHODS = pytest.mark.parametrize("method", list(TRAINERS))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def build(method, model, tmp_path, train=None, evaluation=None, **settings):
    trainer, config = TRAINERS[method]
    args = config(**cpu_args(output_dir=str(tmp_path), **{"loss_type": "rdro", "max_steps": 1, **settings}))
    return trainer(model, args=args, train_dataset=train or tiny_preferences(8), eval_dataset=evaluation)


def labelled(preferred: int, other: int) -> Dataset:
    pairs = tiny_preferences(preferred + other)
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if i < preferred else "rejected"],
                "label": i < preferred,
            }
            for i, row in enumerate(pairs)
        ]
    )


def spoilt(dataset: Dataset, number: int) -> Dataset:
    return Dataset.from_list(
        [{**row, "rejected": None if i == number else row["rejected"]} for i, row in enumerate(dataset)]
    )


@METHODS
def test_the_tokenizer_is_loaded_once(method, model, tmp_path, monkeypatch):
    loaded, load = [], AutoProcessor.from_pretrained
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    trainer = build(method, model, tmp_path)
    assert len(loaded) == 1
    assert trainer.processing_class.pad_token == "<|endoftext|>"
    assert trainer._begun_with["tokenizer"] is None  # the model's own, which counts as part of it


# Before a model is loaded: there is none of that name


@METHODS
def test_every_data_set_is_looked_at_before_the_model(method, tmp_path):
    good, bad = tiny_preferences(8), spoilt(tiny_preferences(8), 5)
    for train, evaluation, name in (
        (bad, None, "train_dataset"),
        (good, bad, "eval_dataset"),
        (good, {"a": good, "b": bad}, "eval_dataset['b']"),
        (bad.to_iterable_dataset(), None, "train_dataset"),
    ):
        with pytest.raises(ValueError, match=f"^`{re.escape(name)}`, row 5 .*the column `rejected` must be text"):
            build(method, "/no/such/model", tmp_path, train, evaluation)
    with pytest.raises(ValueError, match="`train_dataset` has the splits train, test: pass one of them"):
        build(method, "/no/such/model", tmp_path, {"train": good, "test": good})


# evaluate()


@METHODS
def test_evaluation_sets_given_later(method, model, tmp_path):
    good, bad = tiny_preferences(8), spoilt(tiny_preferences(8), 5)
    trainer = build(method, model, tmp_path)
    for given, name in ((bad, "eval_dataset"), ({"a": good, "b": bad}, "eval_dataset['b']")):
        with pytest.raises(ValueError, match=f"^`{re.escape(name)}`, row 5 .*the column `rejected` must be text"):
            trainer.evaluate(given)
    assert math.isfinite(trainer.evaluate(good)["eval_loss"])
    assert set(trainer.evaluate({"a": good, "b": good})) >= {"eval_a_loss", "eval_b_loss"}


# Streams


@METHODS
def test_a_stream_is_checked_while_it_trains(method, model, tmp_path):
    rows = spoilt(tiny_preferences(130), 120)
    with pytest.raises(ValueError, match="`train_dataset`, row 120 .*the column `rejected` must be text"):
        # TRL reads a thousand rows of a stream of pairs when it makes labelled completions of them
        build(method, model, tmp_path, rows.to_iterable_dataset(), max_steps=40).train()


def test_a_stream_trains_as_the_table_does(model, tmp_path):
    losses = []
    for rows in (tiny_preferences(16), tiny_preferences(16).to_iterable_dataset()):
        trainer = build(
            "dpo", model, tmp_path, rows, max_steps=3, train_sampling_strategy="sequential", logging_steps=1
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 3


# Nothing left


@METHODS
def test_nothing_left_names_max_length(method, model, tmp_path):
    with pytest.raises(ValueError, match="No row of `train_dataset` has a prompt shorter than `max_length=2` tokens"):
        build(method, model, tmp_path, max_length=2)
    long = Dataset.from_list([{**row, "prompt": row["prompt"] * 20} for row in tiny_preferences(4)])
    for evaluation, name in ((long, "eval_dataset"), ({"long": long}, "eval_dataset['long']")):
        with pytest.raises(
            ValueError, match=f"No row of `{re.escape(name)}` has a prompt .* nothing is left to evaluate"
        ):
            build(method, model, tmp_path, None, evaluation, max_length=64)


def test_image_tokens_that_are_cut_off_name_max_length():
    """As TRL's `compute_loss` does, which ours does not go through, for the policy's forward and the reference's."""

    def complains(*args, **kwargs):
        raise ValueError("Image features and image tokens do not match, tokens: 6, features: 16")

    ids = torch.zeros(2, 3, dtype=torch.long)
    inputs = {"input_ids": ids, "completion_mask": ids}
    for max_length, sentence in ((10, "`max_length=10` is too short"), (None, "^Image features")):
        trainer = SimpleNamespace(
            args=SimpleNamespace(max_length=max_length), aux_loss_enabled=False, precompute_ref_logps=False,
            stand_in=lambda model: model,
            compute_ref_log_probs=complains, model=torch.nn.Linear(1, 1), ref_model=None,
        )  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            trl_compat.policy_forward(trainer, complains, inputs)
        with pytest.raises(ValueError, match=sentence):
            trl_compat.pair_reference_logps(trainer, inputs)


# Tokens instead of text


@METHODS
def test_tokenised_rows_train_as_their_text_does(method, model, tmp_path):
    names = ["chosen_ids", "rejected_ids"] if method == "dpo" else ["completion_ids", "label"]
    text = tiny_preferences(16) if method == "dpo" else labelled(8, 8)
    tokens = build(method, model, tmp_path, text).train_dataset.select_columns(["prompt_ids", *names])
    losses = []
    for rows in (text, tokens):
        trainer = build(method, model, tmp_path, rows, max_steps=3, logging_steps=1, learning_rate=1e-3)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_tokenised_rows_are_dropped_where_no_completion_fits(model, tmp_path):
    rows = [{"prompt_ids": [1] * n, "chosen_ids": [2], "rejected_ids": [3]} for n in (5, 50)]
    assert len(build("dpo", model, tmp_path, Dataset.from_list(rows), max_length=20).train_dataset) == 1


def test_tokenised_rows_and_an_estimate_of_the_divergence(model, tmp_path):
    rows = Dataset.from_list([{"prompt_ids": [1], "completion_ids": [2], "label": i == 0} for i in range(4)])
    with pytest.raises(ValueError, match="the loss `kto` needs the text"):
        build("kto", model, tmp_path, rows, loss_type="kto", per_device_train_batch_size=2)


# Evaluation of labelled completions


def test_an_evaluation_set_is_weighted_by_its_own_fraction(model, tmp_path):
    """Where the policy is the reference, the loss is a constant of the loss function: 2 log 2 for rdro at 1/2, on any
    mix of classes, under any name, given before or later."""
    mixes = {"train": labelled(1, 7), "test": labelled(6, 2)}
    trainer = build("kto", model, tmp_path, labelled(4, 4), mixes)
    assert trainer.preferred_fraction == 0.5
    metrics = trainer.evaluate()
    later = trainer.evaluate(labelled(2, 6))
    for value in (metrics["eval_train_loss"], metrics["eval_test_loss"], later["eval_loss"]):
        np.testing.assert_allclose(value, 2 * math.log(2), rtol=1e-6)
    # The training set keeps its own
    assert trainer.preferred_fraction == 0.5


def test_an_evaluation_set_called_train_is_not_the_training_set(model, tmp_path):
    trainer = build("kto", model, tmp_path, labelled(6, 2), {"train": labelled(1, 3), "one class": labelled(4, 0)})
    assert trainer.preferred_fraction == 0.75
    assert math.isfinite(trainer.evaluate()["eval_one class_loss"])  # weighted by the training set's fraction


def test_several_batches_of_different_mixes(model, tmp_path):
    trainer = build("kto", model, tmp_path, labelled(4, 4), labelled(3, 13), per_device_eval_batch_size=4)
    np.testing.assert_allclose(trainer.evaluate()["eval_loss"], 2 * math.log(2), rtol=1e-6)


# The date in a chat template


@METHODS
def test_a_template_with_todays_date_is_warned_of(method, tmp_path, caplog):
    directory = save_tiny(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(directory)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in tiny_preferences(4)
    ]
    pinned = [{**row, "chat_template_kwargs": {"date_string": "26 Jul 2024"}} for row in rows]
    for data, count in ((rows, 1), (pinned, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="trl_rdro"):
            trainer = build(method, directory, tmp_path / "out", Dataset.from_list(data))
        assert sum("today's date" in record.getMessage() for record in caplog.records) == count
    assert "26 Jul 2024" in tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])


# predict


@METHODS
def test_predict_looks_at_its_rows_and_prepares_them(method, model, tmp_path):
    trainer = build(method, model, tmp_path)
    with pytest.raises(ValueError, match=r"`test_dataset`, row 3 \(counted from 0\): the column `rejected`"):
        trainer.predict(spoilt(tiny_preferences(8), 3))
    with pytest.raises(ValueError, match="`test_dataset` lacks the columns"):
        trainer.predict(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(TypeError, match="`test_dataset` must be"):
        trainer.predict([{"prompt": "a"}])
    trainer.args.prediction_loss_only = True
    rows = tiny_preferences(8, seed=1)
    predicted = trainer.predict(rows).metrics["test_loss"]
    assert predicted == pytest.approx(trainer.evaluate(rows)["eval_loss"])


# Completions without text


def conversation(rows):
    return Dataset.from_list(
        [
            {key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in row.items()}
            for row in rows
        ]
    )


@METHODS
@pytest.mark.parametrize("form", [lambda rows: rows, conversation], ids=["text", "messages"])
@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_rejected_completion_is_trained_on_and_a_blank_chosen_one_refused(
    method, form, blank, model, tmp_path, caplog
):
    """The worse of two answers may be silence: of it the model learns the end of the turn, a token like others."""
    caplog.set_level(logging.WARNING, logger="trl_rdro")
    rows = tiny_preferences(8)
    for column, text in (("chosen", "refused"), ("rejected", "trained on")):
        spoilt_rows = form(
            Dataset.from_list([{**row, column: blank} if i == 5 else row for i, row in enumerate(rows)])
        )
        if text == "refused":
            with pytest.raises(ValueError, match=r"row 5 \(counted from 0\): the column `chosen`"):
                build(method, "no/such/model", tmp_path, spoilt_rows)
            continue
        trainer = build(method, model, tmp_path, spoilt_rows)
        assert len(trainer.train_dataset) == (8 if method == "dpo" else 16)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(map(math.isfinite, losses))
    said = [record.getMessage() for record in caplog.records if "`rejected` has no text in 1 of 8 rows" in record.msg]
    assert len(said) == 1 and "row 5" in said[0]
