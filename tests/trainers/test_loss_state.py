"""What repo and grdpo learn beside the policy: one update per optimiser step, from all pairs, in each checkpoint."""

import json

import pytest
import torch

from trl_rdro import DPOConfig, DPOTrainer, losses
from trl_rdro.trainers.columns import label_id
from trl_rdro.trainers.loss_state import LossState

from ..tiny import cpu_args, tiny_preferences, tiny_qwen2, tiny_tokenizer


ANNOTATORS = ["ann", "bo", "ann", "ann", "bo", "ann", "cy", "ann"]


def data(n=8):
    dataset = tiny_preferences(n).add_column("annotator", (ANNOTATORS * n)[:n])
    return dataset.add_column("group", (ANNOTATORS * n)[:n])


def build(output_dir, dataset=None, **settings):
    """A trainer of a policy that is not its reference, with SGD."""
    settings = {
        "loss_type": "repo",
        "beta": 1.0,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        **settings,
    }
    return DPOTrainer(
        tiny_qwen2(seed=1),
        ref_model=tiny_qwen2(seed=0),
        args=DPOConfig(**cpu_args(output_dir=str(output_dir), **settings)),
        train_dataset=data() if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
    )


def trained(output_dir, dataset=None, **settings):
    trainer = build(output_dir, dataset, **settings)
    trainer.train()
    return trainer


def etas(trainer, name="repo"):
    return trainer._loss_state.values[name]


def log_ratios(output_dir, dataset):
    """Of each pair, before training."""
    trainer = build(output_dir, dataset, loss_type="sigmoid", per_device_train_batch_size=1)
    margins = []
    for row in range(len(dataset)):
        batch = trainer.data_collator([trainer.train_dataset[row]])
        margins.append(trainer.compute_loss(trainer.model, batch).item())
    u = -torch.tensor(margins, dtype=torch.float64).expm1().log()  # of l = log(1 + exp(-u))
    return u


def test_one_step_by_hand(tmp_path):
    """eta + rate (mean posterior - eta), for each annotator of the step."""
    u = log_ratios(tmp_path, data())
    posteriors = losses.repo_posterior(u, torch.zeros_like(u), 0.8, beta=1.0)
    values = etas(trained(tmp_path, repo_eta=0.8, repo_rate=0.25))
    for name in set(ANNOTATORS):
        own = posteriors[[i for i, other in enumerate(ANNOTATORS) if other == name]]
        assert values[str(label_id(name))] == pytest.approx(0.8 + 0.25 * (own.mean().item() - 0.8), abs=1e-5)
    everybody = etas(trained(tmp_path, tiny_preferences(8), repo_eta=0.8, repo_rate=0.25))
    assert everybody == {"0": pytest.approx(0.8 + 0.25 * (posteriors.mean().item() - 0.8), abs=1e-5)}


GRDPO = {"loss_type": "grdpo", "grdpo_eta": 2.0}


@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "kldpo", "inner_loss_type": "repo"}, GRDPO, {**GRDPO, "inner_loss_type": "repo"}]
)
def test_the_update_does_not_depend_on_the_split(tmp_path, settings):
    whole = trained(tmp_path, **settings)
    for micro_batch, accumulation in ((4, 2), (1, 8), (3, 3)):
        split = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        parts = trained(tmp_path, **split, **settings)
        for name in whole._stateful:
            assert etas(parts, name) == pytest.approx(etas(whole, name), abs=1e-6)


def test_weights_count_in_the_mean(tmp_path):
    rows = [0, 1, 1, 3, 4, 5, 6, 7]
    weighted = data().add_column("weight", [1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    expected = etas(trained(tmp_path, data().select(rows)))
    assert etas(trained(tmp_path, weighted)) == pytest.approx(expected, abs=1e-6)


def test_each_step_uses_and_logs_what_the_last_one_learned(tmp_path):
    trainer = trained(tmp_path, tiny_preferences(8), max_steps=3, repo_eta=0.6)
    logged = [entry["repo/eta"] for entry in trainer.state.log_history if "repo/eta" in entry]
    assert logged[0] == pytest.approx(0.6) and len(set(logged)) == 3
    again = build(tmp_path, tiny_preferences(8))
    again._loss_state.values = {"repo": {"0": logged[2]}}
    batch = next(iter(again.get_train_dataloader()))
    again.model.eval()
    plain = build(tmp_path, tiny_preferences(8), repo_eta=logged[2])
    plain.model.eval()
    assert again.compute_loss(again.model, batch) == plain.compute_loss(plain.model, batch)


def test_evaluation_does_not_move_it(tmp_path):
    trainer = build(tmp_path)
    trainer.evaluate(data())
    assert not any(etas(trainer).values()) and not trainer._loss_state._seen
    trainer.train()
    before = dict(etas(trainer))
    metrics = trainer.evaluate(data())
    trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
    assert etas(trainer) == before
    assert metrics["eval_repo/eta"] == pytest.approx(
        sum(before[str(label_id(name))] for name in ANNOTATORS) / len(ANNOTATORS), rel=1e-6
    )


@pytest.mark.parametrize("loss", [{"loss_type": "repo"}, GRDPO], ids=["repo", "grdpo"])
@pytest.mark.parametrize("restore", [False, True])
def test_resume_goes_on_with_the_same_numbers(tmp_path, restore, loss):
    name = loss["loss_type"]
    settings = {
        **loss,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = trained(tmp_path, data(16), **settings)
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["LossState"]["attributes"]["values"][name].keys() == etas(whole, name).keys()
    resumed = build(tmp_path, data(16), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert etas(resumed, name) == etas(whole, name)
    assert sum(isinstance(callback, LossState) for callback in resumed.callback_handler.callbacks) == 1
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_streaming_meets_annotators_as_they_come(tmp_path):
    stream = etas(trained(tmp_path, data().to_iterable_dataset()))
    assert stream == pytest.approx(etas(trained(tmp_path, data())), abs=1e-6)


def test_names_of_annotators_are_told_apart_whatever_their_type():
    assert len({label_id(name) for name in ("a", "b", "", 0, 1, None, 1.5)}) == 7
    assert label_id("a") == label_id("a") and 0 <= label_id("a") < 2**56


# grdpo


GROUPS = sorted(set(ANNOTATORS))


def group_means(values):
    return [values[[i for i, other in enumerate(ANNOTATORS) if other == name]].mean().item() for name in GROUPS]


def test_groups_start_equal_and_the_worst_gains(tmp_path):
    """a_g exp(eta mean_g l), normalised, from the inner losses before the step."""
    inner = torch.nn.functional.softplus(-log_ratios(tmp_path, data()))
    trainer = trained(tmp_path, **GRDPO)
    factors = torch.tensor([2.0 * mean for mean in group_means(inner)]).exp()
    shares = (factors / factors.sum()).tolist()
    expected = {str(label_id(name)): share for name, share in zip(GROUPS, shares, strict=True)}
    assert etas(trainer, "grdpo") == pytest.approx(expected, rel=1e-4)
    logged = trainer.state.log_history[0]
    assert {key: logged[key] for key in logged if key.startswith("grdpo/")} == pytest.approx(
        {f"grdpo/weight_{name}": 1 / 3 for name in set(ANNOTATORS)}
    )


@pytest.mark.parametrize("split", [(8, 1), (2, 4)], ids=str)
def test_a_grdpo_step_is_the_weighted_sum_of_the_groups_mean_gradients(tmp_path, split):
    """By hand, from the gradients of single pairs, with a row of weight 2 and group weights that are not equal."""
    weights = [1.0, 2.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    dataset = data().add_column("weight", weights)
    start = {str(label_id(name)): share for name, share in zip(GROUPS, (0.5, 0.2, 0.3), strict=True)}
    gradients = []
    for row in range(8):
        single = build(tmp_path, dataset.remove_columns("weight"), loss_type="sigmoid")
        batch = single.data_collator([single.train_dataset[row]])
        single.compute_loss(single.model.train(), batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in single.model.parameters()]))
    expected = 0
    for name in GROUPS:
        rows = [i for i, other in enumerate(ANNOTATORS) if other == name]
        total = sum(weights[i] for i in rows)
        expected += start[str(label_id(name))] * sum(weights[i] * gradients[i] for i in rows) / total
    expected *= sum(weights) / len(weights)  # a mean over rows, not over their weights

    micro_batch, accumulation = split
    sizes = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    trainer = build(tmp_path, dataset, learning_rate=1.0, max_grad_norm=0.0, **sizes, **GRDPO)
    trainer._loss_state.values = {"grdpo": dict(start)}
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    update = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before
    assert (update + expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("groups", [["everybody"] * 8, [0, 1] * 4], ids=str)
def test_one_group_and_equal_groups_without_a_step_are_dpo(tmp_path, groups):
    dataset = tiny_preferences(8).add_column("group", groups)
    ours = trained(tmp_path, dataset, loss_type="grdpo", grdpo_eta=0.0, max_steps=3)
    dpo = trained(tmp_path, dataset, loss_type="sigmoid", max_steps=3)
    for parameter, other in zip(ours.model.parameters(), dpo.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


def refused(output_dir, train, evaluation=None):
    args = DPOConfig(**cpu_args(output_dir=str(output_dir), loss_type="grdpo"))
    with pytest.raises(ValueError) as error:
        DPOTrainer("no/such/model", args=args, train_dataset=train, eval_dataset=evaluation)
    return str(error.value)


def test_data_without_countable_groups_are_refused(tmp_path):
    assert "`train_dataset` lacks the column group" in refused(tmp_path, tiny_preferences(4))
    assert "streaming" in refused(tmp_path, data().to_iterable_dataset())
    strange = tiny_preferences(2).add_column("group", ["ann", "zoe"])
    assert "The group 'zoe' of `eval_dataset['held-out']`" in refused(tmp_path, data(), {"held-out": strange})


def test_a_group_met_first_in_evaluation_is_named_as_such(tmp_path):
    trainer = build(tmp_path, **GRDPO)
    with pytest.raises(ValueError, match="`grdpo` met a `group` that the training set does not have"):
        trainer.evaluate(tiny_preferences(2).add_column("group", ["ann", "zoe"]))


def test_a_group_whose_rows_all_have_weight_0_is_no_group(tmp_path):
    """Training with its rows is training without them, up to the number of rows in the mean."""
    dataset = data().add_column("weight", [0.0 if name == "bo" else 1.5 for name in ANNOTATORS])
    others = dataset.filter(lambda row: row["group"] != "bo")
    trainer, without = (trained(tmp_path, rows, **GRDPO) for rows in (dataset, others))
    expected = {**etas(without, "grdpo"), str(label_id("bo")): 0.0}
    assert etas(trainer, "grdpo") == pytest.approx(expected, rel=1e-5)
    losses_of_steps = [run.state.log_history[0]["loss"] for run in (trainer, without)]
    assert losses_of_steps[0] == pytest.approx(losses_of_steps[1] * len(others) / len(dataset), rel=1e-5)
    trainer.evaluate(dataset)  # where it is no group either
    assert "is not in `train_dataset` with a weight above 0" in refused(tmp_path, dataset, data())
