"""The share of preferred completions of each prompt: as a column, counted, and missed."""

import random

import pytest
import torch
from datasets import Dataset

from trl_rdro import DPOTrainer, KTOTrainer, losses
from trl_rdro.losses.types import of_family
from trl_rdro.trainers.prompt_fractions import COLUMN, count_by_prompt, warn_of_unequal_shares

from ..tiny import tiny_preferences
from ..training import (
    kto_config,
    labelled,
    make_config,
    make_trainer,
    measured,
    parameters,
    same_parameters,
    steps,
    two_models,
)


EACH_LOSS = pytest.mark.parametrize("loss_type", of_family("density_ratio"))
ROWS = 8


def with_shares(values=(0.2, 0.7), n=ROWS) -> Dataset:
    rows = list(labelled(n // 2, n // 2))
    rows = [row for pair in zip(rows[: n // 2], rows[n // 2 :], strict=True) for row in pair]
    return Dataset.from_list([{**row, COLUMN: values[i // 2 % len(values)]} for i, row in enumerate(rows)])


def build(tmp_path, data, loss_type, **settings):
    models = two_models()
    given = {"train_dataset": data, "eval_dataset": data if isinstance(data, Dataset) else None, **models}
    policy = given.pop("model")
    settings = {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS, **settings}
    return make_trainer(policy, tmp_path, KTOTrainer, given, loss_type=loss_type, **settings)


@EACH_LOSS
def test_the_loss_by_hand(tmp_path, loss_type):
    data = with_shares()
    trainer = build(tmp_path, data, loss_type)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    inputs = {key: value for key, value in batch.items() if key != "trl_rdro_columns"}
    with torch.no_grad():
        z = [trainer.compute_ref_log_probs(model, inputs)[0] for model in (trainer.model, trainer.ref_model)]
    expected = 0.0
    for ratio, row in zip((z[0] - z[1]).tolist(), data, strict=True):
        share, label = row[COLUMN], torch.tensor([row["label"]])
        value = {"rdro": losses.rdro_loss, "ddro": losses.ddro_loss}[loss_type](torch.tensor([ratio]), label, share)
        expected += value.item() / (share if row["label"] else 1 - share) / ROWS
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters())


def test_shares_as_a_tensor_are_shares_as_numbers():
    z = torch.tensor([-3.0, -0.5, 0.0, 0.4, 1.0, 5.0, 80.0], dtype=torch.float64, requires_grad=True)
    for preferred in (torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)):
        for share in (0.05, 0.5, 0.8, 0.97):
            shares = torch.full((7,), share, dtype=torch.float64)
            for loss in (losses.rdro_loss, losses.ddro_loss):
                values = [loss(z, preferred, s) for s in (share, shares)]
                torch.testing.assert_close(*values)
                torch.testing.assert_close(*(torch.autograd.grad(value.sum(), z)[0] for value in values))
            assert torch.equal(losses.ddro_beyond_cap(z, share), losses.ddro_beyond_cap(z, shares))
            weights = [losses.class_weights(preferred, s) for s in (share, shares.float())]
            torch.testing.assert_close(*weights)


@EACH_LOSS
def test_streams_truncation_precomputing_evaluation_and_packing_keep_it(tmp_path, loss_type):
    """A column of the share of the whole set is the run without it; one of two shares is another run."""
    plain = with_shares((0.5,))
    long = {**plain[0], "prompt": "it was good " * 30, COLUMN: 0.9}
    table = Dataset.from_list([*plain, long])
    results = {}
    for name, data, settings in (
        ("none", plain.remove_columns(COLUMN), {}),
        ("column", table, {}),
        ("precomputed", table, {"precompute_ref_log_probs": True}),
        ("stream", table.to_iterable_dataset(), {}),
        ("packed", table, {"padding_free": True}),
        ("two shares", with_shares(), {}),
    ):
        trainer = build(tmp_path / name, data, loss_type, max_length=60, max_steps=1, **settings)
        trainer.train()
        evaluated = trainer.evaluate(data)["eval_loss"] if isinstance(data, Dataset) else None
        results[name] = (steps(trainer)[0]["loss"], evaluated, steps(trainer)[0]["reference/log_normalisation"])
    for name in ("column", "precomputed", "packed"):
        assert results[name] == pytest.approx(results["none"], rel=2e-4), name
    assert results["stream"][0] == pytest.approx(results["none"][0], rel=2e-4)
    assert results["two shares"][0] != pytest.approx(results["none"][0], abs=1e-2)


def test_nothing_changes_where_no_share_is_given(tmp_path):
    """To the last bit: with TRL's losses the column is not read, and with ours `count_fraction_by_prompt` counts
    nothing where no prompt has four completions."""
    data = with_shares()
    runs = [build(tmp_path, d, "apo_zero_unpaired") for d in (data, data.remove_columns(COLUMN))]
    for run in runs:
        run.train()
    assert measured(runs[0]) == measured(runs[1])
    assert same_parameters(*(parameters(run) for run in runs))


def counted(prompts, seed=0, **columns) -> Dataset:
    """A prepared set with `prompts` as (completions, share) of each prompt."""
    rng = random.Random(seed)
    rows = [
        {"prompt_ids": [i, i + 1], "label": rng.random() < share}
        for i, (k, share) in enumerate(prompts)
        for _ in range(k)
    ]
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def test_counting_by_hand(messages):
    labels, prompts = [True, False, False, False, True, True, False], [1, 1, 1, 1, 2, 2, 2]
    rows = [{"prompt_ids": [p], "label": label} for p, label in zip(prompts, labels, strict=True)]
    dataset = count_by_prompt(Dataset.from_list(rows), 0.6)
    # Of the three others and a fourth that is preferred to the degree .6; of three completions nothing is counted
    assert dataset[COLUMN] == pytest.approx([0.15, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6])
    assert "1 of 2 prompts" in messages()[-1] and "For the 1 with 2 or 3 make pairs" in messages()[-1]
    weighted = count_by_prompt(Dataset.from_list([{**row, "weight": 2.0} for row in rows]), 0.6)
    assert weighted[COLUMN][:2] == pytest.approx([0.6 / 7, 2.6 / 7])


def test_counting_through_the_trainer(tmp_path):
    rows = list(tiny_preferences(8, seed=1))
    data = Dataset.from_list(
        [
            {"prompt": f"prompt {i // 4 % 2}:", "completion": row["chosen"], "label": i % 4 < 1 + i // 4 % 2}
            for i, row in enumerate(rows)
        ]
    )
    trainer = build(tmp_path, data, "rdro", count_fraction_by_prompt=True, max_steps=1)
    assert sorted(set(trainer.train_dataset[COLUMN])) == pytest.approx([(k + 0.375) / 4 for k in (0, 1, 2)])
    trainer.train()
    assert COLUMN in trainer.eval_dataset.column_names


def test_unequal_shares_are_missed(messages):
    for equal in ([(8, 0.4)] * 60, [(1, 0.1), (1, 0.9)] * 50, [(2, 0.5)], [(40, 0.0), (40, 0.0)]):
        warn_of_unequal_shares(counted(equal))
    pairs = Dataset.from_list([{"prompt_ids": [i // 2], "label": i % 2 == 0} for i in range(200)])
    warn_of_unequal_shares(pairs)
    assert messages() == []
    warn_of_unequal_shares(counted([(8, 0.12), (8, 0.4), (8, 0.8)] * 20))
    assert "standard deviation of 0.2" in messages()[0] and "over the 60 prompts" in messages()[0]


def test_chance_alone_is_silent(messages):
    for seed in range(200):
        warn_of_unequal_shares(counted([(4, 0.1)] * 30, seed))
    assert messages() == []


def test_what_contradicts_a_column_is_refused_before_a_model_is_loaded(tmp_path):
    def build_with(data, loss_type="rdro", **settings):
        kwargs = {"train_dataset": data, "eval_dataset": settings.pop("eval_dataset", None)}
        KTOTrainer("no/such/model", args=kto_config(tmp_path, loss_type, **settings), **kwargs)

    data = with_shares()
    for name, value in (("rdro_alpha", 0.4), ("preferred_fraction", 0.4), ("count_fraction_by_prompt", True)):
        with pytest.raises(ValueError, match=f"`{name}=.*` and the column"):
            build_with(data, **{name: value})
    with pytest.raises(ValueError, match="beside pairs"):
        build_with(tiny_preferences(4).add_column(COLUMN, [0.4] * 4))
    for value in (0.0, 1.0, None, "half"):
        wrong = Dataset.from_list([{**row, COLUMN: value} for row in data])
        with pytest.raises(ValueError, match="column `preferred_fraction` must be a number between 0 and 1"):
            build_with(wrong)
    with pytest.raises(ValueError, match="`eval_dataset` lacks the column preferred_fraction"):
        build_with(data, eval_dataset=data.remove_columns(COLUMN))
    with pytest.raises(ValueError, match="cannot count on a streaming"):
        build_with(labelled(4, 4).to_iterable_dataset(), count_fraction_by_prompt=True)
    with pytest.raises(ValueError, match="`ddro_t=0.4` is one share for all prompts"):
        kto_config(tmp_path, "ddro", ddro_t=0.4, count_fraction_by_prompt=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_share_above_ddros_cap_is_refused(tmp_path, qwen2, streaming):
    data = with_shares((0.2, 0.995))
    data = data.to_iterable_dataset() if streaming else data
    with pytest.raises(ValueError, match="`ddro_cap` must be greater than t=0.995"):
        make_trainer(qwen2, tmp_path, KTOTrainer, {"train_dataset": data}, loss_type="ddro", max_steps=2).train()


@EACH_LOSS
def test_counting_on_evaluation_sets_and_streams_agrees(tmp_path, loss_type):
    """Where no prompt has four completions: all go by the share of the evaluated set, not the training set's."""
    rows, found = labelled(1, 5, seed=1), []
    for evaluated in (rows, rows.to_iterable_dataset()):
        trainer = build(tmp_path, labelled(6, 2), loss_type, count_fraction_by_prompt=True)
        found.append(trainer.evaluate(evaluated)["eval_loss"])
    trainer = build(tmp_path, labelled(6, 2), loss_type, preferred_fraction=1 / 6)
    assert found == pytest.approx([trainer.evaluate(rows)["eval_loss"]] * 2, rel=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_a_column_of_the_evaluation_set_alone_is_said(tmp_path, qwen2, messages, named):
    data = {"train_dataset": labelled(4, 4), "eval_dataset": {"hard": with_shares()} if named else with_shares()}
    make_trainer(qwen2, tmp_path, KTOTrainer, data, loss_type="rdro")
    name = "eval_dataset['hard']" if named else "eval_dataset"
    assert f"`{COLUMN}` of `{name}` has no effect" in " ".join(messages())


def test_a_column_that_no_loss_reads_is_said(tmp_path, qwen2, messages):
    for loss_type in ("kto", "apo_zero_unpaired"):
        make_trainer(qwen2, tmp_path, KTOTrainer, {"train_dataset": with_shares()}, loss_type=loss_type)
        assert f"`{COLUMN}` of `train_dataset` has no effect: `loss_type` is {loss_type}" in " ".join(messages())
    pairs = tiny_preferences(4).add_column(COLUMN, [0.4] * 4)
    tokens = Dataset.from_list([{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], COLUMN: 0.4}] * 4)
    for data in (pairs, tokens):
        for loss_type in ("rdro", ["sigmoid", "ddro"]):
            args = make_config(tmp_path, loss_type=loss_type)
            with pytest.raises(ValueError, match="beside pairs"):
                DPOTrainer("no/such/model", args=args, train_dataset=data)
