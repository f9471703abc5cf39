"""
`KTOTrainer` in real runs of tiny models.

TRL's own losses must come out of it unchanged, to the last bit. The density-ratio losses must be those of a naive
computation, must not depend on how samples fall into micro-batches, must agree with `DPOTrainer` on the same data as
pairs, must forward no more than they need, and must work with what people train with: adapters, quantisation,
precomputed reference log-probabilities, evaluation, resuming and reloading.
"""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer


LOSSES = ["rdro", "ddro"]
MIXTURE = {"rdro": "rdro_alpha", "ddro": "ddro_t"}
EACH_LOSS = pytest.mark.parametrize("loss_type", LOSSES)
# One optimiser step that shows the gradient itself
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def flatten(pairs: Dataset) -> list[dict]:
    return [
        {"prompt": row["prompt"], "completion": row[column], "label": column == "chosen"}
        for row in pairs
        for column in ("chosen", "rejected")
    ]


def labelled(n_preferred: int, n_others: int, seed: int = 0) -> Dataset:
    """Preferred completions first, then the others."""
    rows = flatten(tiny_preferences(max(n_preferred, n_others), seed))
    return Dataset.from_list(rows[0::2][:n_preferred] + rows[1::2][:n_others])


def config(tmp_path, loss_type="rdro", config_class=KTOConfig, **kwargs):
    settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 2}
    return config_class(**cpu_args(output_dir=str(tmp_path), loss_type=loss_type, **{**settings, **kwargs}))


def two_models() -> dict:
    """A policy that is not its reference, so that no log-ratio is zero."""
    return {
        "model": tiny_qwen2(seed=1),
        "ref_model": tiny_qwen2(seed=0),
        "processing_class": tiny_tokenizer(),
    }


def lora(**kwargs):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs)


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def trained(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return parameters(trainer)


def history(trainer) -> list[dict]:
    timings = ("runtime", "per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(timings)}
        for entry in trainer.state.log_history
    ]


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


def count_forwards(*models) -> list[int]:
    """Counters, one per model, of the forwards made from now on."""
    counts = [0] * len(models)

    def counter(i):
        def hook(*_):
            counts[i] += 1

        return hook

    for i, model in enumerate(models):
        model.register_forward_pre_hook(counter(i))
    return counts


# TRL's own losses


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize(
    ("settings", "use_lora"),
    [
        ({}, False),
        ({}, True),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, False),
        ({"precompute_ref_log_probs": True}, False),
        ({"precompute_ref_log_probs": True, "desirable_weight": 1.5}, True),
    ],
    ids=["full", "lora", "accumulation", "precompute", "precompute-lora"],
)
def test_trl_losses_are_trls_to_the_last_bit(tmp_path, model_path, loss_type, settings, use_lora):
    def run(trainer_class, config_class):
        args = config(tmp_path, loss_type, config_class, max_steps=4, eval_strategy="steps", eval_steps=2, **settings)
        trainer = trainer_class(
            model_path,
            args=args,
            train_dataset=labelled(8, 5),
            eval_dataset=labelled(3, 4, seed=1),
            peft_config=lora() if use_lora else None,
        )
        trainer.train()
        return history(trainer), parameters(trainer), trainer

    theirs, their_parameters, _ = run(trl.KTOTrainer, trl.KTOConfig)
    for config_class in (KTOConfig, trl.KTOConfig):
        ours, our_parameters, trainer = run(KTOTrainer, config_class)
        assert ours == theirs
        assert all(torch.equal(our_parameters[name], value) for name, value in their_parameters.items())
        assert trainer.preferred_fraction is None
        assert trainer._paper["id"] == "2402.01306"


# What is computed


@EACH_LOSS
def test_no_kl_and_random_order_by_default(tmp_path, model_path, loss_type):
    trainer = KTOTrainer(model_path, args=config(tmp_path, loss_type), train_dataset=labelled(4, 4))
    assert trainer.calculate_KL is False
    assert not [name for name in trainer.train_dataset.column_names if "KL" in name]
    assert not [name for name in next(iter(trainer.get_train_dataloader())) if "KL" in name]
    assert trainer.args.loss_type == trainer.loss_type == loss_type
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)

    args = config(tmp_path, loss_type, train_sampling_strategy="sequential", per_device_train_batch_size=1)
    trainer = KTOTrainer(model_path, args=args, train_dataset=labelled(4, 4))
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.SequentialSampler)


def test_order_stays_sequential_for_losses_with_a_kl_estimate(tmp_path):
    assert config(tmp_path, "kto").train_sampling_strategy == "sequential"
    assert config(tmp_path, "apo_zero_unpaired").train_sampling_strategy == "sequential"


@EACH_LOSS
@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_forward_of_each_model(tmp_path, model_path, loss_type, accumulation):
    args = config(
        tmp_path, loss_type, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_steps=2
    )
    trainer = KTOTrainer(model_path, args=args, train_dataset=labelled(8, 4))
    counts = count_forwards(trainer.model, trainer.ref_model)
    trainer.train()
    assert counts == [2 * accumulation, 2 * accumulation]


def test_no_reference_forward_when_precomputed(tmp_path, model_path):
    args = config(tmp_path, precompute_ref_log_probs=True)
    trainer = KTOTrainer(model_path, args=args, train_dataset=labelled(8, 8))
    assert trainer.ref_model is None
    counts = count_forwards(trainer.model)
    trainer.train()
    assert counts == [2]


def test_the_adapter_is_switched_off_for_the_reference_forward(tmp_path, model_path):
    trainer = KTOTrainer(model_path, args=config(tmp_path), train_dataset=labelled(8, 8), peft_config=lora())
    assert trainer.ref_model is None
    counts = count_forwards(trainer.model)
    trainer.train()
    assert counts == [4]


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
    args = config(
        tmp_path,
        loss_type,
        **{MIXTURE[loss_type]: mixture},
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
def test_metrics_are_trls_and_ours(tmp_path, model_path, loss_type):
    def run(trainer_class, config_class, loss_type):
        args = config(tmp_path, loss_type, config_class, eval_strategy="steps", eval_steps=1, max_steps=1)
        datasets = {"train_dataset": labelled(4, 4), "eval_dataset": labelled(3, 2, seed=1)}
        trainer = trainer_class(model_path, args=args, **datasets)
        trainer.train()
        return history(trainer)

    theirs = run(trl.KTOTrainer, trl.KTOConfig, "apo_zero_unpaired")
    ours = run(KTOTrainer, KTOConfig, loss_type)
    added = ["logratios/{}", "share/{}"] + ["ddro/capped_{}"] * (loss_type == "ddro")
    added = {name.format(label) for name in added for label in ("chosen", "rejected")}
    assert [set(entry) for entry in ours] == [
        set(theirs[0]) | added,
        set(theirs[1]) | {f"eval_{name}" for name in added},
        set(theirs[2]),
    ]
    # Logged by TRL from the same forward passes, before the first update
    for name in set(theirs[0]) - {"loss", "grad_norm"}:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5, abs=1e-6), name


def test_a_class_missing_from_a_batch_adds_nothing_to_its_averages(tmp_path):
    rows = labelled(2, 4)
    args = config(tmp_path, "ddro", per_device_eval_batch_size=2)
    trainer = KTOTrainer(args=args, train_dataset=rows, eval_dataset=rows, **two_models())
    small = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 6
    whole = trainer.evaluate()
    for name in ("logratios", "share", "rewards", "logps"):
        for label in ("chosen", "rejected"):
            assert small[f"eval_{name}/{label}"] == pytest.approx(whole[f"eval_{name}/{label}"], rel=1e-4), name


@EACH_LOSS
@pytest.mark.parametrize(("n_preferred", "n_others"), [(8, 8), (3, 13), (12, 4)])
def test_first_loss_is_the_constant(tmp_path, model_path, loss_type, n_preferred, n_others):
    args = config(tmp_path, loss_type, per_device_train_batch_size=16, max_steps=1)
    trainer = KTOTrainer(model_path, args=args, train_dataset=labelled(n_preferred, n_others))
    trainer.train()
    assert trainer.preferred_fraction == n_preferred / 16
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * math.log(2), rel=1e-5)


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
            config(tmp_path, router_aux_loss_coef=coefficient),
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
        args = config(
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
        after = trained(trainer)
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
        args = config(
            tmp_path,
            loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            **{**SGD, "learning_rate": 0.01},
        )
        trainer = KTOTrainer(args=args, train_dataset=labelled(6, 14), **two_models())
        before = parameters(trainer)
        results.append(trained(trainer))
        assert trainer.state.epoch == 2
    scale = largest_difference(before, results[0])
    assert scale > 1e-3
    assert largest_difference(*results) < 1e-4 * scale


@EACH_LOSS
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_of_one_class_keeps_the_graph(tmp_path, loss_type, label, size):
    trainer = KTOTrainer(args=config(tmp_path, loss_type), train_dataset=labelled(4, 4), **two_models())
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
        args = config(
            tmp_path,
            loss_type,
            config_class,
            **{MIXTURE[loss_type]: mixture},
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
        updated.append(trained(trainer))
        assert trainer.state.log_history[0]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    scale = max(gradient.abs().max().item() for gradient in gradients[0].values())
    assert scale > 1e-2
    for other_gradients, other_parameters in zip(gradients[1:], updated[1:], strict=True):
        assert largest_difference(gradients[0], other_gradients) < 1e-5 * scale
        assert largest_difference(updated[0], other_parameters) < 1e-5 * scale * SGD["learning_rate"]


# The preferred fraction


def fraction_messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "Preferred fraction" in record.getMessage()]


@EACH_LOSS
def test_preferred_fraction_is_counted_after_filtering_and_logged_once(tmp_path, model_path, caplog, loss_type):
    rows = list(labelled(3, 7))
    rows += [{**row, "prompt": row["prompt"] * 20} for row in rows[:2]]
    args = config(
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
            model_path,
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
        assert entry["eval_share/chosen"] == pytest.approx(share) and "eval_logratios/chosen" in entry


@EACH_LOSS
def test_preferred_fraction_sets_the_mixture(tmp_path, loss_type):
    def evaluate(**kwargs):
        args = config(tmp_path, loss_type, **kwargs)
        rows = {"train_dataset": labelled(2, 6), "eval_dataset": labelled(4, 4, seed=1)}
        return KTOTrainer(args=args, **rows, **two_models()).evaluate()["eval_loss"]

    assert evaluate() == evaluate(**{MIXTURE[loss_type]: 0.25}) == evaluate(preferred_fraction=0.25)
    assert evaluate() != pytest.approx(evaluate(**{MIXTURE[loss_type]: 0.5}), rel=1e-3)
    # The classes of the evaluation set are weighted by its own fraction
    assert evaluate() == evaluate(preferred_fraction=0.5, **{MIXTURE[loss_type]: 0.25})


def test_a_set_preferred_fraction_is_compared_with_the_count(tmp_path, model_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = KTOTrainer(model_path, args=config(tmp_path, preferred_fraction=0.4), train_dataset=labelled(2, 6))
    assert trainer.preferred_fraction == 0.4
    (message,) = fraction_messages(caplog)
    assert "0.4000 as set" in message and "0.2500 (2 of 8)" in message


@EACH_LOSS
def test_streaming_needs_the_preferred_fraction(tmp_path, model_path, loss_type):
    rows = labelled(6, 2)
    with pytest.raises(ValueError, match="`preferred_fraction`"):
        # Refused before the model, which does not exist, is looked for
        KTOTrainer("no/such-model", args=config(tmp_path, loss_type), train_dataset=rows.to_iterable_dataset())
    args = config(tmp_path, loss_type, preferred_fraction=0.75, max_steps=1)
    trainer = KTOTrainer(model_path, args=args, train_dataset=rows.to_iterable_dataset())
    before = parameters(trainer)
    trainer.train()
    assert trainer.preferred_fraction == 0.75
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * math.log(2), rel=1e-5)
    assert largest_difference(before, parameters(trainer)) > 0


@EACH_LOSS
@pytest.mark.parametrize(("counts", "word"), [((4, 0), "preferred"), ((0, 4), "non-preferred")])
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_one_class_is_refused(tmp_path, model_path, loss_type, counts, word, fraction):
    args = config(tmp_path, loss_type, preferred_fraction=fraction)
    with pytest.raises(ValueError, match=f"All 4 completions of `train_dataset` are {word}"):
        KTOTrainer(model_path, args=args, train_dataset=labelled(*counts))


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_weights_set_by_hand_are_warned_about(tmp_path, model_path, caplog, name):
    KTOTrainer(model_path, args=config(tmp_path), train_dataset=labelled(2, 8))
    assert not [record for record in caplog.records if "desirable_weight" in record.getMessage()]  # nor TRL's advice
    KTOTrainer(model_path, args=config(tmp_path, **{name: 2.0}), train_dataset=labelled(2, 8))
    (record,) = [record for record in caplog.records if "desirable_weight" in record.getMessage()]
    assert record.levelno == logging.WARNING and f"`{name}=2.0`" in record.getMessage()
    assert "no longer converges" in record.getMessage()


# Refusals


@pytest.mark.parametrize("loss_type", ["rdro", "ddro", "kto"])
@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"label": ["yes", "no"]}, r"`train_dataset`, row 0 .*`label` must be True .*got 'yes' \(str\)"),
        ({"label": [1, 0]}, r"`train_dataset`, row 0 .*`label` must be True .*got 1 \(int\)"),
        ({"label": [None, True]}, r"`train_dataset`, row 0 .*`label` must be True .*got null"),
        ({"label": [True, None]}, r"`train_dataset`, row 1 .*`label` must be True .*got null"),
        ({}, "`train_dataset` lacks the column label"),
    ],
    ids=["strings", "ints", "none", "none-later", "missing"],
)
def test_labels_of_another_kind_are_refused_before_the_model_is_loaded(tmp_path, loss_type, columns, sentence):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": [" c", " d"], **columns})
    with pytest.raises(ValueError, match=sentence) as error:
        KTOTrainer("no/such-model", args=config(tmp_path, loss_type), train_dataset=rows)
    assert "\n" not in str(error.value)


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        KTOTrainer("no/such-model", args=config(tmp_path), train_dataset=labelled(1, 1).select([]))


@EACH_LOSS
def test_a_plain_trl_config_is_refused(tmp_path, loss_type):
    args = trl.KTOConfig(**cpu_args(output_dir=str(tmp_path)))
    args.loss_type = loss_type
    with pytest.raises(TypeError, match="needs `trl_rdro.KTOConfig`"):
        KTOTrainer("no/such-model", args=args, train_dataset=labelled(1, 1))


@EACH_LOSS
@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_refused(tmp_path, loss_type, column):
    rows = labelled(1, 1).add_column(column, ["picture", "picture"])
    with pytest.raises(ValueError, match="not implemented for unpaired image data"):
        KTOTrainer("no/such-model", args=config(tmp_path, loss_type), train_dataset=rows)


# What people train with


@EACH_LOSS
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_precomputed_reference_gives_the_same_run(tmp_path, model_path, loss_type, use_lora):
    runs = []
    for precompute in (False, True):
        args = config(
            tmp_path,
            loss_type,
            precompute_ref_log_probs=precompute,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=4,
            **{**SGD, "learning_rate": 0.03},
        )
        trainer = KTOTrainer(
            model_path,
            args=args,
            train_dataset=labelled(7, 11),
            eval_dataset=labelled(3, 3, seed=1),
            peft_config=lora(init_lora_weights="gaussian") if use_lora else None,
        )
        before = parameters(trainer)
        runs.append((trained(trainer), history(trainer)))
        assert ("ref_logps" in trainer.train_dataset.column_names) is precompute
    scale = largest_difference(before, runs[0][0])
    assert scale > 1e-3
    assert largest_difference(runs[0][0], runs[1][0]) < 1e-4 * scale
    for left, right in zip(runs[0][1], runs[1][1], strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


@EACH_LOSS
def test_qlora(tmp_path, loss_type):
    pytest.importorskip("bitsandbytes")
    model_path = save_tiny(tmp_path, hidden_size=64, intermediate_size=128)  # whole blocks of 64 weights
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    trainer = KTOTrainer(
        model_path,
        args=config(tmp_path, loss_type, max_steps=6, learning_rate=1e-2, eval_strategy="steps", eval_steps=6),
        train_dataset=labelled(3, 5),
        eval_dataset=labelled(4, 4, seed=1),
        peft_config=lora(),
        quantization_config=quantization,
    )
    assert trainer.model.is_loaded_in_4bit
    before = parameters(trainer)
    after = trained(trainer)
    adapter = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert adapter == {name for name in after if "lora_" in name}  # evaluation repacks the others on a CPU
    assert all(not torch.equal(before[name], after[name]) for name in adapter)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(2 * math.log(2), rel=1e-4)
    assert losses[-1] < losses[0]


@EACH_LOSS
def test_resuming_gives_the_uninterrupted_run(tmp_path, model_path, loss_type):
    def build(name):
        args = config(
            tmp_path / name,
            loss_type,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        return KTOTrainer(model_path, args=args, train_dataset=labelled(4, 6))

    whole = trained(build("whole"))
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert largest_difference(whole, parameters(resumed)) == 0
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["loss"] == resumed.state.log_history[3]["loss"]


@EACH_LOSS
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_saved_and_reloaded(tmp_path, model_path, loss_type, use_lora):
    trainer = KTOTrainer(
        model_path,
        args=config(tmp_path / "run", loss_type, learning_rate=1e-2),
        train_dataset=labelled(4, 4),
        peft_config=lora() if use_lora else None,
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids = torch.tensor([tiny_tokenizer()("the film was good")["input_ids"]])
    with torch.no_grad():
        logits = [
            model.eval()(input_ids=ids).logits
            for model in (
                trainer.model,
                AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
                AutoModelForCausalLM.from_pretrained(model_path),
            )
        ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


@pytest.mark.parametrize(
    ("loss_type", "paper", "title"),
    [
        ("rdro", "2604.04410", "Relative Density Ratio Optimization for Stable"),
        ("ddro", "2505.07558", "Direct Density Ratio Optimization: A Statistically"),
    ],
)
def test_model_card_names_the_method(tmp_path, model_path, loss_type, paper, title):
    trainer = KTOTrainer(model_path, args=config(tmp_path, loss_type), train_dataset=labelled(1, 1))
    trainer.create_model_card(model_name="tiny")
    card = Path(tmp_path, "README.md").read_text(encoding="utf-8")
    assert title in card and f"https://huggingface.co/papers/{paper}" in card
    assert f"trained with {loss_type.upper()}" in card
    for tag in ("trl", loss_type, "trl-rdro"):
        assert f"\n- {tag}\n" in card
    assert {loss_type, "trl-rdro"} <= set(trainer.model.model_tags)


@EACH_LOSS
def test_learns_what_distinguishes_the_classes(tmp_path, model_path, loss_type):
    args = config(tmp_path, loss_type, per_device_train_batch_size=16, max_steps=30, learning_rate=3e-3)
    trainer = KTOTrainer(model_path, args=args, train_dataset=labelled(16, 48), eval_dataset=labelled(16, 16, seed=1))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_logratios/chosen"] > after["eval_logratios/rejected"] + 0.5
    assert before["eval_logratios/chosen"] == before["eval_logratios/rejected"] == 0


@EACH_LOSS
@pytest.mark.filterwarnings("ignore:.*return_outputs=True:FutureWarning")
def test_compute_metrics_gets_the_logits(tmp_path, loss_type):
    trainer = KTOTrainer(
        args=config(tmp_path, loss_type),
        train_dataset=labelled(4, 4),
        eval_dataset=labelled(3, 3, seed=1),
        compute_metrics=lambda prediction: {"shape": list(prediction.predictions.shape)},
        **two_models(),
    )
    metrics = trainer.evaluate()
    trainer.compute_metrics = None
    without = trainer.evaluate()
    assert metrics["eval_shape"][0] == 6 and metrics["eval_shape"][2] == len(tiny_tokenizer())
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"], rel=1e-6)
