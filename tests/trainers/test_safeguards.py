"""A run stops, warns or goes on in a defined way: bad numbers, guard rails, the reference model."""

import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from trl_rdro import DPOConfig, DPOTrainer, KTOTrainer
from trl_rdro.losses.types import LOSS_TYPES, of_family
from trl_rdro.trainers.guard_rails import GuardRails
from trl_rdro.trainers.sharpness import say_how_sharp

from ..loss_cases import LOSS_CASES
from ..tiny import cpu_args, tiny_preferences, tiny_qwen2, tiny_tokenizer
from ..training import lora, make_trainer, train


ALL_LOSSES = [(DPOTrainer, name) for name in LOSS_CASES] + [(KTOTrainer, name) for name in of_family("density_ratio")]
each_loss = pytest.mark.parametrize(
    "trainer_class, loss_type", ALL_LOSSES, ids=lambda value: getattr(value, "__name__", value)
)


# Bad numbers


@each_loss
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_training_by_name(qwen2, tmp_path, trainer_class, loss_type, value):
    model = AutoModelForCausalLM.from_pretrained(qwen2)
    trainer = make_trainer(model, tmp_path, trainer_class, loss_type=loss_type)
    trainer.train()
    with torch.no_grad():
        model.model.norm.weight[0] = value
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=rf"`{loss_type}` at step \d+: .*not finite.*Log-ratios.*chosen \["):
        trainer.train()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.detach().nan_to_num())  # no step was taken on it


@each_loss
def test_evaluation_warns_once_and_goes_on(qwen2, tmp_path, messages, trainer_class, loss_type):
    model = AutoModelForCausalLM.from_pretrained(qwen2)
    kwargs = {"eval_dataset": tiny_preferences(24, seed=1)}
    trainer = make_trainer(model, tmp_path, trainer_class, loss_type=loss_type, trainer_kwargs=kwargs)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    trainer.evaluate()
    assert len([line for line in messages() if "not finite" in line]) == 1


def test_fp16_overflow_is_named(tmp_path):
    """float16 weights whose activations overflow give inf and NaN log-probabilities."""
    model = tiny_qwen2(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    kwargs = {"ref_model": tiny_qwen2(dtype=torch.float16), "processing_class": tiny_tokenizer()}
    trainer = make_trainer(model, tmp_path, loss_type="rdro", trainer_kwargs=kwargs)
    with pytest.raises(FloatingPointError, match="float16 overflows"):
        trainer.train()


def gradients_of(trainer, rows):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return loss, [p.grad for p in trainer.model.parameters() if p.grad is not None]


@each_loss
def test_empty_and_masked_completions(qwen2, tmp_path, trainer_class, loss_type):
    """A completion without tokens has log-ratio 0: it counts with the loss's constant and no gradient."""
    trainer = make_trainer(qwen2, tmp_path, trainer_class, loss_type=loss_type)
    rows = [trainer.train_dataset[i] for i in range(2)]
    for column in ("chosen_ids", "rejected_ids", "completion_ids"):
        if column in rows[0]:
            rows[0][column] = []
            rows[1][column] = []
    loss, gradients = gradients_of(trainer, rows)
    assert math.isfinite(loss.item())
    assert gradients and all(gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize("inner", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("loss_type", ["kldpo", "wdpo"])
def test_empty_completions_inside_the_robust_losses(qwen2, tmp_path, loss_type, inner):
    trainer = make_trainer(qwen2, tmp_path, loss_type=loss_type, inner_loss_type=inner)
    rows = [{**trainer.train_dataset[0], "chosen_ids": []}, trainer.train_dataset[1]]
    loss, gradients = gradients_of(trainer, rows)
    assert math.isfinite(loss.item()) and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("loss_type", LOSS_CASES)
def test_chosen_equal_to_rejected(qwen2, tmp_path, loss_type):
    """Such a pair says nothing, and its preference gradient is zero; wdpo still penalises its two input gradients."""
    trainer = make_trainer(qwen2, tmp_path, loss_type=loss_type)
    row = trainer.train_dataset[0]
    loss, gradients = gradients_of(trainer, [{**row, "rejected_ids": row["chosen_ids"]}])
    assert math.isfinite(loss.item()) and all(gradient.isfinite().all() for gradient in gradients)
    largest = max(gradient.abs().max().item() for gradient in gradients)
    if loss_type == "wdpo":
        assert largest > 0
    elif LOSS_TYPES[loss_type].of_differences or LOSS_TYPES[loss_type].family == "density_ratio":
        assert largest < 1e-5  # others look at each of the two by itself


@pytest.mark.parametrize("loss_type", LOSS_CASES)
def test_a_2000_token_outlier(tmp_path, loss_type):
    """Log-ratios in the hundreds of nats leave the loss and its gradient finite."""
    size = {"max_position_embeddings": 4096, "num_hidden_layers": 1}
    kwargs = {"ref_model": tiny_qwen2(**size), "processing_class": tiny_tokenizer()}
    model = tiny_qwen2(seed=1, **size)
    trainer = make_trainer(model, tmp_path, loss_type=loss_type, max_length=None, trainer_kwargs=kwargs)
    rows = [trainer.train_dataset[i] for i in range(2)]
    rows[0]["chosen_ids"] = (rows[0]["chosen_ids"] * 400)[:2000]
    loss, gradients = gradients_of(trainer, rows)
    assert math.isfinite(loss.item()) and all(gradient.isfinite().all() for gradient in gradients)


# Guard rails


def test_guard_rails_warn_once_each(messages):
    rails = GuardRails(DPOConfig(**cpu_args(output_dir="unused", loss_type="kldpo")))
    moving = {"logratios/chosen": 0.5}
    for step in range(1, 40):
        rails.watch(step, {**moving, "kldpo/effective_sample_size": 0.05, "ddro/capped_rejected": 0.3}, 100, 10)
        rails.watch(step, {**moving, "ddro/capped_chosen": 0.3}, 100, 10)
        rails.watch(step, {**moving, "wdpo/gap": 0.2, "wdpo/eps": 1e-3}, 100, 10)
    lines = messages()
    assert len(lines) == 4
    assert "effective sample size is 5.0 of the step's 100 pairs" in lines[0] and "`kldpo_tau` (now 1.0)" in lines[0]
    assert "30% of the last rejected completions" in lines[1]
    assert "the reference is not the mixture" in lines[2]
    assert "off by more than 3% for 5 micro-batches" in lines[3] and "three times as much" in lines[3]


@pytest.mark.parametrize(
    ("pairs", "share", "said"),
    [
        (1, 1.0, "a single pair"),
        (8, 0.2, "1.6 of the step's 8 pairs"),
        (8, 0.3, None),
        (1000, 0.09, "90.0 of the step's 1000 pairs"),
        (1000, 0.2, None),
    ],
)
def test_few_pairs_are_few_for_small_and_large_steps(messages, pairs, share, said):
    rails = GuardRails(DPOConfig(**cpu_args(output_dir="unused", loss_type="kldpo")))
    for step in range(1, 4):
        rails.watch(step, {"logratios/chosen": 0.5, "kldpo/effective_sample_size": share}, pairs, pairs)
    assert [said in line for line in messages()] == ([True] if said else [])


@pytest.mark.parametrize(
    ("settings", "share", "said"),
    [
        ({"kldpo_tau": 2.0}, 0.999, True),
        ({"kldpo_tau": 2.0}, 0.95, False),
        ({"kldpo_target_ess": 0.995}, 0.995, False),
    ],
)
def test_weights_that_stay_equal_are_dpo(messages, settings, share, said):
    rails = GuardRails(DPOConfig(**cpu_args(output_dir="unused", loss_type="kldpo", **settings)))
    for step in range(1, 60):
        rails.watch(step, {"logratios/chosen": 0.5, "kldpo/effective_sample_size": share}, 8, 8)
    lines = messages()
    assert len(lines) == said
    # -ln 0.999 is 0.001 = s^2 / tau^2
    assert all("spread by about 0.06" in line and "say 0.1 for 80 %" in line for line in lines)


def test_how_sharp_the_weights_are_is_said_before_a_run(messages):
    args = DPOConfig(**cpu_args(output_dir="unused", loss_type="kldpo", kldpo_tau=0.5))
    say_how_sharp(["rdro", "kldpo"], args)
    (line,) = messages()
    assert (
        "`kldpo_tau=0.5`" in line
        and "99 % where its losses spread by 0.05, 80 % by 0.24 (margins by 4.7 nats)" in line
    )
    say_how_sharp(["kldpo"], DPOConfig(**cpu_args(output_dir="unused", loss_type="kldpo", kldpo_target_ess=0.5)))
    assert len(messages()) == 1


def test_one_capped_completion_of_four_is_no_alarm(messages):
    """The share is that of the last fifty completions or more."""
    rails = GuardRails(DPOConfig(**cpu_args(output_dir="unused", loss_type="ddro")))
    for step in range(1, 60):
        rails.watch(step, {"logratios/chosen": 0.5, "ddro/capped_rejected": 0.25 if step % 4 == 0 else 0.0}, 4, 4)
    assert messages() == []
    for step in range(60, 80):
        rails.watch(step, {"logratios/chosen": 0.5, "ddro/capped_rejected": 0.5}, 4, 4)
    assert len(messages()) == 1 and "% of the last rejected completions" in messages()[0]


def test_guard_rails_are_silent_in_a_good_run(messages):
    rails = GuardRails(DPOConfig(**cpu_args(output_dir="unused")))
    for step in range(1, 60):
        metrics = {"logratios/chosen": 0.0 if step < 20 else 0.1, "logratios/rejected": 0.0}
        metrics |= {"kldpo/effective_sample_size": 0.11, "ddro/capped_chosen": 0.2}
        # Now and then a large gap, which the adapted step mends
        rails.watch(step, {**metrics, "wdpo/gap": 0.5 if step % 5 else 0.01, "wdpo/eps": 1e-3}, 100, 100)
    assert not messages()


@each_loss
@pytest.mark.parametrize("cause", ["learning rate", "frozen adapter"])
def test_a_policy_that_never_moves_is_reported(qwen2, tmp_path, messages, trainer_class, loss_type, cause):
    settings, kwargs = {"max_steps": 30, "per_device_train_batch_size": 2, "loss_type": loss_type}, {}
    if cause == "learning rate":
        settings["learning_rate"] = 0.0
    else:
        kwargs["peft_config"] = lora()
    trainer = make_trainer(qwen2, tmp_path, trainer_class, trainer_kwargs=kwargs, **settings)
    if cause == "frozen adapter":
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_("lora_A" in name)  # lora_B, which is 0, stays 0
    trainer.train()
    assert len([line for line in messages() if "still equals the reference" in line]) == 1


@pytest.mark.parametrize("loss_type", ["rdro", "kldpo"])
def test_a_policy_that_moves_is_not_reported(qwen2, tmp_path, messages, loss_type):
    train(qwen2, tmp_path, max_steps=30, per_device_train_batch_size=2, loss_type=loss_type, warmup_steps=10)
    assert not [line for line in messages() if "still equals" in line]


# Which model is the reference


def test_one_line_says_which_model_is_the_reference(qwen2, tmp_path, messages):
    new_adapter = {"peft_config": lora()}
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(qwen2), lora())
    given = {"ref_model": tiny_qwen2(seed=1)}
    cases = [
        (qwen2, {}, {}, "a copy of qwen2 as it is before training"),
        (qwen2, {}, given, "the given `ref_model`"),
        (qwen2, {}, new_adapter, "the base model, with the adapter switched off"),
        (adapter, {}, {"processing_class": tiny_tokenizer()}, "a frozen copy of the given adapter"),
        (qwen2, {"precompute_ref_log_probs": True}, {}, "log-probabilities computed before training"),
    ]
    for i, (model, settings, kwargs, sentence) in enumerate(cases, start=1):
        make_trainer(model, tmp_path, trainer_kwargs=kwargs, **settings)
        lines = [line for line in messages() if "Reference model: " in line]
        assert len(lines) == i and sentence in lines[-1]


@pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer])
def test_a_data_set_can_bring_its_reference_log_probabilities(qwen2, tmp_path, messages, trainer_class):
    """They are used with `precompute_ref_log_probs`, whatever the model; without, a warning says that they are not."""
    columns = trainer_class._reference_columns
    first = make_trainer(qwen2, tmp_path, trainer_class, loss_type="rdro", precompute_ref_log_probs=True)
    assert set(columns) <= set(first.train_dataset.column_names)
    saved = Dataset.from_dict({name: first.train_dataset[name] for name in first.train_dataset.column_names})
    if "label" in saved.column_names:
        saved = saved.cast(first.train_dataset.features)

    kwargs = {"train_dataset": saved, "processing_class": tiny_tokenizer()}
    brought = make_trainer(
        tiny_qwen2(seed=1),
        tmp_path,
        trainer_class,
        kwargs,
        loss_type="rdro",
        precompute_ref_log_probs=True,
    )
    assert brought.train_dataset[columns[0]][:] == first.train_dataset[columns[0]][:]
    assert any("taken from its columns" in line for line in messages())
    brought.train()
    assert abs(brought.state.log_history[0]["logratios/chosen"]) > 0.1, "the reference is another model"

    make_trainer(qwen2, tmp_path, trainer_class, kwargs, loss_type="rdro")
    assert any("are not used" in line or "is not used" in line for line in messages())
