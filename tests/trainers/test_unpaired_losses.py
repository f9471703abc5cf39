"""
The density-ratio losses of `KTOTrainer` are those of a naive computation, do not depend on how samples fall into
micro-batches, and agree with `DPOTrainer` on the same data as pairs.
"""

import math

import pytest
import torch
import trl
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.losses.types import of_family

from ..loss_cases import LOSS_CASES
from ..tiny import tiny_preferences, tiny_tokenizer
from ..training import (
    SGD,
    flatten,
    kto_config,
    labelled,
    largest_difference,
    measured,
    parameters,
    trained_parameters,
    two_models,
)


EACH_LOSS = pytest.mark.parametrize("loss_type", of_family("density_ratio"))


# Values


def naive_loss(loss_type, z, preferred, mixture, cap):
    if loss_type == "rdro":
        softplus = math.log1p(math.exp(z))
        return (1 + mixture) * softplus - z if preferred else (1 - mixture) * softplus
    capped = min(z, math.log(cap / mixture))
    r = math.exp(capped)
    if preferred:
        slope = -1 / (1 + (1 - 2 * mixture) * r)
        value = math.log((1 / r + 1 - 2 * mixture) / (1 - mixture))
        if mixture < 0.5:
            return math.log((math.exp(-z) + 1 - 2 * mixture) / (1 - mixture))
        return value + slope * (z - capped)
    slope = (1 - 2 * mixture) * r / (1 + (1 - 2 * mixture) * r) + mixture * r / (1 - mixture * r)
    return math.log((1 + (1 - 2 * mixture) * r) / (1 - mixture * r)) + slope * (z - capped)


@torch.no_grad()
def completion_logp(model, row) -> float:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    assert ids[: len(prompt)] == prompt
    log_probs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


@EACH_LOSS
@pytest.mark.parametrize("mixture", [None, 0.3])
def test_evaluation_equals_a_naive_computation(tmp_path, loss_type, mixture):
    models, rows = two_models(), labelled(4, 2, seed=1)
    cap, pi, beta = 0.9, 0.75, 0.2
    z = [completion_logp(models["model"], row) - completion_logp(models["ref_model"], row) for row in rows]
    share = pi if mixture is None else mixture
    values = [
        (6 / 4 if row["label"] else 6 / 2) * naive_loss(loss_type, z_i, row["label"], share, cap)
        for z_i, row in zip(z, rows, strict=True)
    ]
    classes = {"chosen": z[:4], "rejected": z[4:]}
    args = kto_config(
        tmp_path,
        loss_type,
        **{LOSS_CASES[loss_type].mixture: mixture},
        ddro_cap=cap,
        beta=beta,
        per_device_eval_batch_size=6,
    )
    trainer = KTOTrainer(args=args, train_dataset=labelled(6, 2), eval_dataset=rows, **models)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(values) / 6, rel=1e-4)
    for name, z_class in classes.items():
        mean = sum(z_class) / len(z_class)
        assert metrics[f"eval_logratios/{name}"] == pytest.approx(mean, rel=1e-4)
        assert metrics[f"eval_rewards/{name}"] == pytest.approx(beta * mean, rel=1e-4)
        assert metrics[f"eval_share/{name}"] == pytest.approx(len(z_class) / 6)
        if loss_type == "ddro":
            capped = sum(z_i > math.log(cap / share) for z_i in z_class) / len(z_class)
            assert metrics[f"eval_ddro/capped_{name}"] == pytest.approx(capped)
    # The weights are those of the whole evaluation set, so the loss does not depend on its batches
    trainer.args.per_device_eval_batch_size = 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@EACH_LOSS
def test_metrics_are_trls_and_ours(tmp_path, qwen2, loss_type):
    def run(trainer_class, config_class, loss_type):
        args = kto_config(tmp_path, loss_type, config_class, eval_strategy="steps", eval_steps=1, max_steps=1)
        datasets = {"train_dataset": labelled(4, 4), "eval_dataset": labelled(3, 2, seed=1)}
        trainer = trainer_class(qwen2, args=args, **datasets)
        trainer.train()
        return measured(trainer)

    theirs = run(trl.KTOTrainer, trl.KTOConfig, "apo_zero_unpaired")
    ours = run(KTOTrainer, KTOConfig, loss_type)
    added = ["logratios/{}", "share/{}"] + ["ddro/capped_{}"] * (loss_type == "ddro")
    added = {name.format(label) for name in added for label in ("chosen", "rejected")}
    added |= {"reference/log_normalisation", "reference/log_normalisation_error"}
    no_kl = [set(entry) - {"kl", "eval_kl"} for entry in theirs]  # which these losses do not estimate
    assert [set(entry) for entry in ours] == [
        no_kl[0] | added | {"reference/log_normalisation_recent"},
        no_kl[1] | {f"eval_{name}" for name in added},
        no_kl[2],
    ]
    # Logged by TRL from the same forward passes, before the first update
    for name in no_kl[0] - {"loss", "grad_norm"}:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5, abs=1e-6), name


def test_a_class_missing_from_a_batch_adds_nothing_to_its_averages(tmp_path):
    rows = labelled(2, 4)
    args = kto_config(tmp_path, "ddro", per_device_eval_batch_size=2)
    trainer = KTOTrainer(args=args, train_dataset=rows, eval_dataset=rows, **two_models())
    small = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 6
    whole = trainer.evaluate()
    for name in ("logratios", "share", "rewards", "logps"):
        for label in ("chosen", "rejected"):
            assert small[f"eval_{name}/{label}"] == pytest.approx(whole[f"eval_{name}/{label}"], rel=1e-4), name


@EACH_LOSS
@pytest.mark.parametrize(("n_preferred", "n_others"), [(8, 8), (3, 13), (12, 4)])
def test_first_loss_is_the_constant(tmp_path, qwen2, loss_type, n_preferred, n_others):
    args = kto_config(tmp_path, loss_type, per_device_train_batch_size=16, max_steps=1)
    trainer = KTOTrainer(qwen2, args=args, train_dataset=labelled(n_preferred, n_others))
    trainer.train()
    assert trainer.preferred_fraction == n_preferred / 16
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LOSS_CASES[loss_type].constant, rel=1e-5)


def test_mixture_of_experts_adds_its_balancing_loss(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model_config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    state = MixtralForCausalLM(model_config).state_dict()
    metrics = {}
    for coefficient in (0.0, 0.5):
        models = [MixtralForCausalLM(model_config) for _ in range(2)]
        for model in models:
            model.load_state_dict(state)
        trainer = KTOTrainer(
            *models,
            kto_config(tmp_path, router_aux_loss_coef=coefficient),
            train_dataset=labelled(4, 4),
            eval_dataset=labelled(4, 4),
            processing_class=tokenizer,
        )
        metrics[coefficient] = trainer.evaluate()
    assert metrics[0.0]["eval_loss"] == pytest.approx(2 * math.log(2), rel=1e-5)
    balancing = metrics[0.5]["eval_aux_loss"]
    assert metrics[0.5]["eval_loss"] == pytest.approx(2 * math.log(2) + 0.5 * balancing, rel=1e-5)


# Batches


@EACH_LOSS
def test_gradients_do_not_depend_on_the_micro_batches(tmp_path, loss_type):
    # In order, so that nearly every micro-batch holds a single class; 4 + 4 + 2 has an odd last one.
    rows = labelled(4, 6)
    results = {}
    for size, accumulation in ((10, 1), (5, 2), (4, 3), (1, 10)):
        args = kto_config(
            tmp_path,
            loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            max_steps=1,
            **SGD,
        )
        trainer = KTOTrainer(args=args, train_dataset=rows, **two_models())
        before = parameters(trainer)
        after = trained_parameters(trainer)
        results[size] = {name: after[name] - before[name] for name in after}
        entry = trainer.state.log_history[0]
        assert all(math.isfinite(value) for value in entry.values()), entry
        assert entry["loss"] == pytest.approx(results.setdefault("loss", entry["loss"]), rel=1e-5)
    scale = max(update.abs().max().item() for update in results[10].values())
    assert scale > 1e-3
    for size in (5, 4, 1):
        assert largest_difference(results[10], results[size]) < 1e-5 * scale, size


@EACH_LOSS
def test_accumulation_of_shuffled_batches(tmp_path, loss_type):
    # 20 samples in steps of 8, 8 and 4, over two epochs: the last step of an epoch has fewer micro-batches.
    results = []
    for size, accumulation in ((8, 1), (1, 8)):
        args = kto_config(
            tmp_path,
            loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            **{**SGD, "learning_rate": 0.01},
        )
        trainer = KTOTrainer(args=args, train_dataset=labelled(6, 14), **two_models())
        before = parameters(trainer)
        results.append(trained_parameters(trainer))
        assert trainer.state.epoch == 2
    scale = largest_difference(before, results[0])
    assert scale > 1e-3
    assert largest_difference(*results) < 1e-4 * scale


@EACH_LOSS
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_of_one_class_keeps_the_graph(tmp_path, loss_type, label, size):
    trainer = KTOTrainer(args=kto_config(tmp_path, loss_type), train_dataset=labelled(4, 4), **two_models())
    rows = [row for row in trainer.train_dataset if row["label"] is label][:size]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    assert loss.shape == () and all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max().item() for gradient in gradients) > 1e-3


# Pairs


@EACH_LOSS
@pytest.mark.parametrize("mixture", [None, 0.3])
def test_the_same_data_as_pairs(tmp_path, loss_type, mixture):
    pairs = tiny_preferences(8)
    cases = [
        (DPOTrainer, DPOConfig, 8, pairs),
        (KTOTrainer, KTOConfig, 16, Dataset.from_list(flatten(pairs))),
        (KTOTrainer, KTOConfig, 16, pairs),  # flattened by TRL
    ]
    losses, gradients, updated = [], [], []
    for trainer_class, config_class, size, rows in cases:
        args = kto_config(
            tmp_path,
            loss_type,
            config_class,
            **{LOSS_CASES[loss_type].mixture: mixture},
            per_device_train_batch_size=size,
            max_steps=1,
            **SGD,
        )
        trainer = trainer_class(args=args, train_dataset=rows, **two_models())
        trainer.model.train()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()})
        trainer.model.zero_grad()
        updated.append(trained_parameters(trainer))
        assert trainer.state.log_history[0]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    scale = max(gradient.abs().max().item() for gradient in gradients[0].values())
    assert scale > 1e-2
    for other_gradients, other_parameters in zip(gradients[1:], updated[1:], strict=True):
        assert largest_difference(gradients[0], other_gradients) < 1e-5 * scale
        assert largest_difference(updated[0], other_parameters) < 1e-5 * scale * SGD["learning_rate"]
