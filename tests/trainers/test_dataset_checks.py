"""
Data sets of the wrong kind are refused with one sentence: what is wrong, in which data set, and what to do.

The checks read the first row of any data set, and all labels of one that is held in memory or on disk.
"""

import re

import pytest
from datasets import Dataset

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.trainers.dataset_checks import (
    first_example,
    require_preference_columns,
    require_unpaired_columns,
)

from ..tiny import cpu_args, save_tiny, tiny_preferences


MESSAGES = [{"role": "user", "content": "hello"}]
CHECKS = [require_preference_columns, require_unpaired_columns]
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["in-memory", "streaming"])


def build(columns: dict, streaming: bool):
    dataset = Dataset.from_dict(columns)
    return dataset.to_iterable_dataset() if streaming else dataset


def refusal(check, columns: dict, streaming: bool) -> str:
    with pytest.raises(ValueError) as error:
        check(build(columns, streaming), "train_dataset")
    message = str(error.value)
    assert "`train_dataset`" in message and "\n" not in message
    return message


@STREAMING
def test_first_example(streaming):
    assert first_example(build({"prompt": ["a", "b"]}, streaming), "train_dataset") == {"prompt": "a"}


@STREAMING
@pytest.mark.parametrize("check", [first_example, *CHECKS])
def test_empty(check, streaming):
    dataset = build({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, streaming).filter(lambda row: False)
    with pytest.raises(ValueError, match="^`eval_dataset` is empty"):
        check(dataset, "eval_dataset")


@STREAMING
@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
        {"chosen": ["a b"], "rejected": ["a c"]},
        {"prompt": [MESSAGES], "chosen": [MESSAGES], "rejected": [MESSAGES], "score": [0.3]},
        {"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]},
    ],
    ids=["text", "implicit-prompt", "conversation", "tokenised"],
)
def test_pairs_are_accepted(columns, streaming):
    dataset = build(columns, streaming)
    assert require_preference_columns(dataset, "train_dataset") == next(iter(dataset))


@STREAMING
@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["a", "a"], "completion": ["b", "c"], "label": [True, False]},
        {"prompt": [MESSAGES] * 2, "completion": [MESSAGES] * 2, "label": [False, False]},
        {"prompt_ids": [[1]], "completion_ids": [[2]], "label": [True]},
        {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
        {"chosen": ["a b"], "rejected": ["a c"]},
    ],
    ids=["text", "conversation", "tokenised", "pairs", "implicit-prompt"],
)
def test_labelled_completions_and_pairs_are_accepted(columns, streaming):
    dataset = build(columns, streaming)
    assert require_unpaired_columns(dataset, "train_dataset") == next(iter(dataset))


@STREAMING
def test_pairs_with_missing_columns(streaming):
    message = refusal(require_preference_columns, {"prompt": ["a"], "chosen": ["b"], "worse": ["c"]}, streaming)
    assert "lacks the column rejected of a preference data set; it has chosen, prompt, worse." in message
    assert "rename_column" in message
    message = refusal(require_preference_columns, {"prompt": ["a"], "text": ["b"]}, streaming)
    assert "lacks the columns chosen, rejected of" in message


@STREAMING
def test_labelled_completions_for_the_paired_trainer(streaming):
    columns = {"prompt": ["a"], "completion": ["b"], "label": [True]}
    assert "use `KTOTrainer` (`trl-rdro kto`)" in refusal(require_preference_columns, columns, streaming)


@STREAMING
@pytest.mark.parametrize(("column", "other"), [("chosen", "rejected"), ("rejected", "chosen")])
@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (None, "NoneType"), ({"text": "b"}, "dict")])
def test_pairs_that_are_not_text(column, other, value, kind, streaming):
    message = refusal(require_preference_columns, {"prompt": ["a"], column: [value], other: ["c"]}, streaming)
    assert f"`{column}`" in message and f"got {kind} in the first row" in message


@STREAMING
@pytest.mark.parametrize(
    ("columns", "missing", "present"),
    [
        ({"prompt": ["a"], "completion": ["b"]}, "column label of", "completion, prompt"),
        ({"prompt": ["a"], "response": ["b"], "label": [True]}, "column completion of", "label, prompt, response"),
        ({"prompt": ["a"], "text": ["b"]}, "columns completion, label of", "prompt, text"),
        ({"prompt_ids": [[1]], "label": [True]}, "column completion_ids of", "label, prompt_ids"),
        ({"prompt": ["a"], "chosen": ["b"]}, "columns completion, label of", "chosen, prompt"),
    ],
)
def test_labelled_completions_with_missing_columns(columns, missing, present, streaming):
    message = refusal(require_unpaired_columns, columns, streaming)
    assert f"lacks the {missing} an unpaired preference data set" in message and f"it has {present}." in message
    assert "rename_column" in message


@STREAMING
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["yes", "no"], "'yes' (str) in the first row"),
        (["True", "False"], "'True' (str) in the first row"),
        ([1, 0], "1 (int) in the first row"),
        ([0, 1], "0 (int) in the first row"),
        ([1.0, 0.0], "1.0 (float) in the first row"),
        ([None, True], "None (NoneType) in the first row"),
    ],
)
def test_labels_of_another_kind(labels, found, streaming):
    columns = {"prompt": ["a"] * 2, "completion": ["b"] * 2, "label": labels}
    message = refusal(require_unpaired_columns, columns, streaming)
    assert f"must be True (preferred) or False, got {found}." in message and "dataset.map" in message


@pytest.mark.parametrize(("labels", "found"), [([True, None], "1 empty one."), ([True, None, None], "2 empty ones.")])
def test_labels_that_are_empty_further_down(labels, found):
    columns = {"prompt": ["a"] * len(labels), "completion": ["b"] * len(labels), "label": labels}
    assert f"got {found}" in refusal(require_unpaired_columns, columns, streaming=False)


def test_labels_of_a_selection():
    # The empty label lies in the table, but not in the rows that were selected from it
    labels = [None, True, False]
    dataset = Dataset.from_dict({"prompt": ["a"] * 3, "completion": ["b"] * 3, "label": labels})
    assert require_unpaired_columns(dataset.select([1, 2]), "train_dataset")["label"] is True
    with pytest.raises(ValueError, match="1 empty one"):
        require_unpaired_columns(dataset.select([2, 1, 0]), "train_dataset")


@pytest.mark.parametrize("columns", [{"prompt": ["a"]}, {"prompt": ["a"], "completion": ["b"], "label": [True]}])
def test_the_paired_trainer_refuses_before_the_model_is_loaded(tmp_path, columns):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro"))
    with pytest.raises(ValueError, match="`train_dataset` lacks the columns chosen, rejected"):
        DPOTrainer("no/such-model", args=args, train_dataset=Dataset.from_dict(columns))


# What the checks are given by the trainers


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_every_evaluation_set_is_checked(tmp_path, method):
    """As early as the training set: before the model, which does not exist here, is looked for."""
    trainer = {"dpo": DPOTrainer, "kto": KTOTrainer}[method]
    config = {"dpo": DPOConfig, "kto": KTOConfig}[method]
    args = config(**cpu_args(output_dir=str(tmp_path), loss_type="rdro"))
    good, wrong = tiny_preferences(4), Dataset.from_list([{"question": "a"}])
    for evaluation, name in ((wrong, "`eval_dataset`"), ({"a": good, "b": wrong}, "`eval_dataset['b']`")):
        with pytest.raises(ValueError, match=re.escape(name) + " lacks the columns"):
            trainer("no/such/model", args=args, train_dataset=good, eval_dataset=evaluation)
    with pytest.raises(ValueError, match="`train_dataset` has the splits train, test: pass one of them"):
        trainer("no/such/model", args=args, train_dataset={"train": good, "test": good})


def test_labels_may_come_in_any_format():
    labelled = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}])
    for form in (None, "numpy", "torch"):
        require_unpaired_columns(labelled.with_format(form), "train_dataset")


def test_nothing_left_of_the_training_set_names_max_length(tmp_path):
    args = KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro", max_length=2))
    with pytest.raises(ValueError, match="`max_length=2` tokens: nothing is left"):
        KTOTrainer(save_tiny(tmp_path), args=args, train_dataset=tiny_preferences(4))


def test_streaming_pairs_are_half_preferred(tmp_path):
    args = KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro", max_steps=1))
    trainer = KTOTrainer(save_tiny(tmp_path), args=args, train_dataset=tiny_preferences(8).to_iterable_dataset())
    assert trainer.preferred_fraction == 0.5
