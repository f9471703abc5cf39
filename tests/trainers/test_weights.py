"""The column `weight`: 2 is the row twice, 1 changes nothing, for every loss and however the data are loaded."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.configs.loss_names import TRL_DPO_LOSSES
from trl_rdro.trainers.columns import WithColumns

from ..loss_cases import LOSS_CASES
from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer, with_columns


SORTING = ("aot", "aot_unpaired")
UNPAIRED_LOSSES = ("kto", "apo_zero_unpaired", "ddro", "rdro")
WEIGHTS = [2.0, 1.0, 0.0, 1.0]  # as rows: the first twice, the third not at all
ROWS = [0, 0, 1, 3]


def pairs(weights=None, rows=None) -> Dataset:
    dataset = with_columns(tiny_preferences(4, seed=3), LOSS_CASES)
    dataset = dataset.add_column("weight", weights) if weights else dataset
    return dataset.select(rows) if rows else dataset


def unpaired(dataset: Dataset) -> Dataset:
    rows = [
        {**{key: row[key] for key in ("prompt", "weight") if key in row}, "completion": row[side], "label": label}
        for row in dataset
        for side, label in (("chosen", True), ("rejected", False))
    ]
    return Dataset.from_list(rows)


def gradient(output_dir, dataset, trainer_class=DPOTrainer, config_class=DPOConfig, **settings):
    """Loss and gradient of one batch of all rows, at a policy that is not the reference."""
    settings = {"per_device_train_batch_size": len(dataset), **settings}
    args = config_class(**cpu_args(output_dir=str(output_dir), **settings))
    trainer = trainer_class(
        tiny_qwen2(seed=1),
        ref_model=tiny_qwen2(seed=0),
        args=args,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def settings_of(loss_type):
    smoothed = {"exo_pair": 0.1, "robust": 0.1}.get(loss_type, 0.0)
    case = LOSS_CASES.get(loss_type)
    return {"loss_type": loss_type, "label_smoothing": smoothed, **(case.settings if case else {})}


# kldpo and drdpo take the logarithm of a mean of exp(w l / tau): no row twice
MEANS = [name for name in LOSS_CASES if name not in ("kldpo", "drdpo")]


@pytest.mark.parametrize("loss_type", [*MEANS, *[name for name in TRL_DPO_LOSSES if name not in SORTING]])
def test_a_weight_of_two_is_the_row_twice(tmp_path, loss_type):
    settings = settings_of(loss_type)
    loss, weighted = gradient(tmp_path, pairs(WEIGHTS), **settings)
    expected_loss, expected = gradient(tmp_path, pairs(rows=ROWS), **settings)
    if loss_type == "sft":  # the mean over the tokens of all rows, also of those that do not count
        lengths = [len(tiny_tokenizer()(row["chosen"])["input_ids"]) + 1 for row in pairs()]
        ratio = sum(lengths[row] for row in ROWS) / sum(lengths)
        expected_loss, expected = ratio * expected_loss, ratio * expected
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tolerance = 2e-3 if loss_type == "wdpo" else 1e-5  # of another central difference
    assert (weighted - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("settings", [{"wdpo_penalty": "rms", "wdpo_rho": 0.1}, {"inner_loss_type": "dpop"}], ids=str)
def test_wdpos_variants(tmp_path, settings):
    loss, _ = gradient(tmp_path, pairs(WEIGHTS), loss_type="wdpo", **settings)
    expected, _ = gradient(tmp_path, pairs(rows=ROWS), loss_type="wdpo", **settings)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_type", UNPAIRED_LOSSES)
def test_a_weight_of_two_is_the_unpaired_row_twice(tmp_path, loss_type):
    setting = {"trainer_class": KTOTrainer, "config_class": KTOConfig, "loss_type": loss_type}
    if loss_type in LOSS_CASES:  # the shares of the classes are those of the weighted rows
        dataset = unpaired(pairs()).add_column("weight", [2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        rows = unpaired(pairs()).select([0, 0, 1, 3, 4, 5, 6, 7])
    else:  # pairs of a KL estimate, which has no weights, are to be the same
        dataset, rows = unpaired(pairs([2.0] * 4)), unpaired(pairs())
    loss, weighted = gradient(tmp_path, dataset, **setting)
    expected_loss, expected = gradient(tmp_path, rows, **setting)
    factor = 1 if loss_type in LOSS_CASES else 2
    assert loss == pytest.approx(factor * expected_loss, rel=1e-5)
    assert (weighted - factor * expected).norm() < 1e-5 * weighted.norm()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_weights_of_trls_unpaired_losses_belong_to_their_rows(tmp_path, loss_type):
    """The gradient is linear in the weights, and a row's share is the change that its weight makes."""
    base, parts = unpaired(pairs()), []
    setting = {"trainer_class": KTOTrainer, "config_class": KTOConfig, "loss_type": loss_type}
    for weights in ([1.0] * 8, [3.0] + [1.0] * 7, [1.0, 3.0] + [1.0] * 6):
        parts.append(gradient(tmp_path, base.add_column("weight", weights), **setting)[1])
    both = gradient(tmp_path, base.add_column("weight", [3.0, 3.0] + [1.0] * 6), **setting)[1]
    plain, first, second = parts
    assert (first - plain).norm() > 1e-2 * plain.norm() and (second - plain).norm() > 1e-2 * plain.norm()
    assert (both - (first + second - plain)).norm() < 1e-5 * both.norm()


@pytest.mark.parametrize("mixture", [["kldpo", "sigmoid", "sft"], ["rdro", "sft"], ["sigmoid", "sft"]], ids=str)
def test_lists(tmp_path, mixture):
    weights = [1.0, 0.5, 0.25][: len(mixture)]
    loss, weighted = gradient(tmp_path, pairs(WEIGHTS), loss_type=mixture, loss_weights=weights)
    parts = [gradient(tmp_path, pairs(WEIGHTS), loss_type=name) for name in mixture]
    assert loss == pytest.approx(sum(w * part for w, (part, _) in zip(weights, parts, strict=True)), rel=1e-5)
    expected = sum(w * part for w, (_, part) in zip(weights, parts, strict=True))
    assert (weighted - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("loss_type", "tau"), [("kldpo", 0.1), ("drdpo", -0.1)])
@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_inside_kldpo_weights_multiply_the_losses(tmp_path, loss_type, tau, split):
    """DoRA: tau log mean exp(w l / tau), its step by hand from the gradients of single pairs."""
    weights = [2.0, 1.0, 0.5, 1.5]
    singles = [gradient(tmp_path, pairs(rows=[i]), loss_type="sigmoid") for i in range(4)]
    losses = torch.tensor(weights) * torch.tensor([loss for loss, _ in singles])
    shares = torch.softmax(losses / tau, dim=0) * torch.tensor(weights)
    expected = -sum(share * part for share, (_, part) in zip(shares, singles, strict=True))
    policy = tiny_qwen2(seed=1)
    start = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    args = DPOConfig(
        **cpu_args(
            output_dir=str(tmp_path),
            loss_type=loss_type,
            kldpo_tau=0.1,
            drdpo_beta=0.1,
            per_device_train_batch_size=split[0],
            gradient_accumulation_steps=split[1],
            max_steps=1,
            logging_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
    )
    trainer = DPOTrainer(
        policy,
        ref_model=tiny_qwen2(seed=0),
        args=args,
        train_dataset=pairs(weights),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    update = torch.cat([p.detach().flatten() for p in policy.parameters()]) - start
    assert (update - expected).norm() < 1e-5 * expected.norm()
    objective = tau * (torch.logsumexp(losses / tau, 0) - torch.tensor(4.0).log())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(objective.item(), rel=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def run(model, output_dir, dataset, trainer_class, config_class, **settings):
    settings = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, **settings}
    args = config_class(**cpu_args(output_dir=str(output_dir), learning_rate=1e-3, **settings))
    evaluation = dataset.select(range(4)) if isinstance(dataset, Dataset) else None
    trainer = trainer_class(model, args=args, train_dataset=dataset, eval_dataset=evaluation)
    trainer.train()
    log = [
        {key: value for key, value in entry.items() if not any(t in key for t in ("time", "second", "flos"))}
        for entry in trainer.state.log_history
    ]
    return log, {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("trainer_class, config_class", [(DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)])
@pytest.mark.parametrize(
    "settings", [{}, {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 2}]
)
def test_weights_of_one_and_no_weights_are_the_same_bits(model, tmp_path, trainer_class, config_class, settings):
    data = tiny_preferences(16) if trainer_class is DPOTrainer else unpaired(tiny_preferences(16))
    names = ("kldpo", "rdro", "sigmoid") if trainer_class is DPOTrainer else ("rdro", "kto", "apo_zero_unpaired")
    for loss_type in names:
        plain = run(model, tmp_path, data, trainer_class, config_class, loss_type=loss_type, **settings)
        ones = data.add_column("weight", [1.0] * len(data))
        weighted = run(model, tmp_path, ones, trainer_class, config_class, loss_type=loss_type, **settings)
        theirs = loss_type not in LOSS_CASES
        for ours, other in zip(plain[0], weighted[0], strict=True):
            assert ours == (pytest.approx(other, rel=1e-6) if theirs else other)
        for name, parameter in plain[1].items():
            if theirs:  # the same numbers in another order of operations
                torch.testing.assert_close(weighted[1][name], parameter, rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(weighted[1][name], parameter), name


def test_streaming_truncation_and_evaluation_keep_the_weights(model, tmp_path):
    """Rows too long to be kept are dropped with their weights, and the held-out loss is weighted too."""
    long = [{"prompt": "it was good " * 30, "chosen": " good", "rejected": " bad", "weight": 100.0}]
    rows = [{**row, "weight": 3.0} for row in tiny_preferences(4)]
    dataset = Dataset.from_list(long + rows)
    settings = {"loss_type": "sigmoid", "max_length": 40, "max_steps": 1}
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), per_device_train_batch_size=4, logging_steps=1, **settings))
    trainer = DPOTrainer(model, args=args, train_dataset=dataset.to_iterable_dataset(), eval_dataset=dataset)
    trainer.train()
    log2 = 0.6931472
    assert trainer.state.log_history[0]["loss"] == pytest.approx(3 * log2, rel=1e-5)
    fresh = DPOTrainer(model, args=args, train_dataset=dataset, eval_dataset=dataset)
    assert fresh.evaluate()["eval_loss"] == pytest.approx(3 * log2, rel=1e-5)
    assert fresh.evaluate(Dataset.from_list(rows[:2]))["eval_loss"] == pytest.approx(3 * log2, rel=1e-5)


def test_a_set_given_to_evaluate_can_be_precomputed(model, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro", precompute_ref_log_probs=True))
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(WEIGHTS), peft_config=lora)
    assert trainer.evaluate(pairs([2.0] * 4))["eval_loss"] == pytest.approx(4 * 0.6931472, rel=1e-5)


@pytest.mark.parametrize("loss_type", SORTING)
def test_losses_that_sort_the_pairs_refuse_weights(tmp_path, loss_type):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=["sft", loss_type]))
    with pytest.raises(ValueError, match=f"`weight` cannot be combined with `{loss_type}`"):
        DPOTrainer("no/such/model", args=args, train_dataset=pairs(WEIGHTS))


def test_it_yields_to_a_collator_that_reads_weights_itself():
    def theirs(rows):
        return {"input_ids": torch.zeros(len(rows), 1), "weight": torch.tensor([row["weight"] for row in rows])}

    batch = WithColumns(theirs, ("weight",))([{"weight": 2.0}])
    assert batch["weight"].tolist() == [2.0] and set(batch) == {"input_ids", "weight"}


@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro"])
def test_a_training_set_of_weights_0_is_refused_before_a_model_is_loaded(tmp_path, loss_type):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=loss_type))
    with pytest.raises(ValueError, match="the weights of all 4 rows are 0: nothing would be trained"):
        DPOTrainer("no/such/model", args=args, train_dataset=pairs([0.0] * 4))
    args = KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="kto" if loss_type == "sigmoid" else loss_type))
    with pytest.raises(ValueError, match="the weights of all 8 rows are 0: nothing would be trained"):
        KTOTrainer("no/such/model", args=args, train_dataset=unpaired(pairs([0.0] * 4)))


def test_weights_that_truncation_leaves_all_0_are_refused(model, tmp_path):
    rows = [{**row, "weight": 0} for row in unpaired(pairs())]
    rows.append({**rows[0], "prompt": "it was good " * 60, "weight": 1})
    args = KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro", max_length=64))
    with pytest.raises(ValueError, match="the weights of all 8 rows are 0: nothing would be trained"):
        KTOTrainer(model, args=args, train_dataset=Dataset.from_list(rows))
