"""A run stops, warns or goes on in a defined way: bad numbers, guard rails, the reference model, crash and resume."""

import json
import logging
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.losses.types import LOSS_TYPES
from trl_rdro.trainers.guard_rails import GuardRails
from trl_rdro.trainers.safeguards import is_complete, last_complete_checkpoint

from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer, with_columns


LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
ALL_LOSSES = [(DPOTrainer, DPOConfig, name) for name in LOSS_TYPES] + [
    (KTOTrainer, KTOConfig, name) for name in ("ddro", "rdro")
]
each_loss = pytest.mark.parametrize(
    "trainer_class, config_class, loss_type", ALL_LOSSES, ids=lambda value: getattr(value, "__name__", value)
)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def messages(caplog):
    """The sentences logged by the package so far."""
    caplog.set_level(logging.INFO, logger="trl_rdro")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_rdro")]


def make(model, output_dir, trainer_class=DPOTrainer, config_class=DPOConfig, trainer_kwargs=None, **settings):
    settings = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, **settings}
    kwargs = {"train_dataset": with_columns(tiny_preferences(16), LOSS_TYPES), **(trainer_kwargs or {})}
    return trainer_class(model, args=config_class(**cpu_args(output_dir=str(output_dir), **settings)), **kwargs)


# Bad numbers


@each_loss
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_training_by_name(qwen2, tmp_path, trainer_class, config_class, loss_type, value):
    model = AutoModelForCausalLM.from_pretrained(qwen2)
    trainer = make(model, tmp_path, trainer_class, config_class, loss_type=loss_type)
    trainer.train()
    with torch.no_grad():
        model.model.norm.weight[0] = value
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=rf"`{loss_type}` at step \d+: .*not finite.*Log-ratios.*chosen \["):
        trainer.train()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.detach().nan_to_num())  # no step was taken on it


@each_loss
def test_evaluation_warns_once_and_goes_on(qwen2, tmp_path, messages, trainer_class, config_class, loss_type):
    model = AutoModelForCausalLM.from_pretrained(qwen2)
    kwargs = {"eval_dataset": tiny_preferences(24, seed=1)}
    trainer = make(model, tmp_path, trainer_class, config_class, loss_type=loss_type, trainer_kwargs=kwargs)
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
    trainer = make(model, tmp_path, loss_type="rdro", trainer_kwargs=kwargs)
    with pytest.raises(FloatingPointError, match="float16 overflows"):
        trainer.train()


def gradients_of(trainer, rows):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return loss, [p.grad for p in trainer.model.parameters() if p.grad is not None]


@each_loss
def test_empty_and_masked_completions(qwen2, tmp_path, trainer_class, config_class, loss_type):
    """A completion without tokens has log-ratio 0: it counts with the loss's constant and no gradient."""
    trainer = make(qwen2, tmp_path, trainer_class, config_class, loss_type=loss_type)
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
    trainer = make(qwen2, tmp_path, loss_type=loss_type, inner_loss_type=inner)
    rows = [{**trainer.train_dataset[0], "chosen_ids": []}, trainer.train_dataset[1]]
    loss, gradients = gradients_of(trainer, rows)
    assert math.isfinite(loss.item()) and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_chosen_equal_to_rejected(qwen2, tmp_path, loss_type):
    """Such a pair says nothing, and its preference gradient is zero; wdpo still penalises its two input gradients."""
    trainer = make(qwen2, tmp_path, loss_type=loss_type)
    row = trainer.train_dataset[0]
    loss, gradients = gradients_of(trainer, [{**row, "rejected_ids": row["chosen_ids"]}])
    assert math.isfinite(loss.item()) and all(gradient.isfinite().all() for gradient in gradients)
    largest = max(gradient.abs().max().item() for gradient in gradients)
    if loss_type == "wdpo":
        assert largest > 0
    elif LOSS_TYPES[loss_type].of_differences or LOSS_TYPES[loss_type].family == "density_ratio":
        assert largest < 1e-5  # others look at each of the two by itself


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_2000_token_outlier(tmp_path, loss_type):
    """Log-ratios in the hundreds of nats leave the loss and its gradient finite."""
    kwargs = {"ref_model": tiny_qwen2(max_position_embeddings=4096), "processing_class": tiny_tokenizer()}
    model = tiny_qwen2(seed=1, max_position_embeddings=4096)
    trainer = make(model, tmp_path, loss_type=loss_type, max_length=None, trainer_kwargs=kwargs)
    rows = [trainer.train_dataset[i] for i in range(2)]
    rows[0]["chosen_ids"] = (rows[0]["chosen_ids"] * 400)[:2000]
    loss, gradients = gradients_of(trainer, rows)
    assert math.isfinite(loss.item()) and all(gradient.isfinite().all() for gradient in gradients)


# Guard rails


def test_guard_rails_warn_once_each(messages):
    rails = GuardRails(DPOConfig(**cpu_args(output_dir="unused", loss_type="kldpo")))
    moving = {"logratios/chosen": 0.5}
    for step in range(1, 40):
        rails.watch(step, {**moving, "kldpo/effective_sample_size": 0.05, "ddro/capped_rejected": 0.3})
        rails.watch(step, {**moving, "wdpo/gap": 0.2, "wdpo/eps": 1e-3})
    lines = messages()
    assert len(lines) == 3
    assert "effective sample size is 5.0%" in lines[0] and "`kldpo_tau` (now 1.0)" in lines[0]
    assert "30% of the rejected completions" in lines[1]
    assert "off by more than 10% for 5 micro-batches" in lines[2]


def test_guard_rails_are_silent_in_a_good_run(messages):
    rails = GuardRails(DPOConfig(**cpu_args(output_dir="unused")))
    for step in range(1, 60):
        metrics = {"logratios/chosen": 0.0 if step < 20 else 0.1, "logratios/rejected": 0.0}
        metrics |= {"kldpo/effective_sample_size": 0.11, "ddro/capped_chosen": 0.2}
        # Now and then a large gap, which the adapted step mends
        rails.watch(step, {**metrics, "wdpo/gap": 0.5 if step % 5 else 0.01, "wdpo/eps": 1e-3})
    assert not messages()


@each_loss
@pytest.mark.parametrize("cause", ["learning rate", "frozen adapter"])
def test_a_policy_that_never_moves_is_reported(
    qwen2, tmp_path, messages, trainer_class, config_class, loss_type, cause
):
    settings, kwargs = {"max_steps": 30, "loss_type": loss_type}, {}
    if cause == "learning rate":
        settings["learning_rate"] = 0.0
    else:
        kwargs["peft_config"] = LoraConfig(**LORA)
    trainer = make(qwen2, tmp_path, trainer_class, config_class, trainer_kwargs=kwargs, **settings)
    if cause == "frozen adapter":
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_("lora_A" in name)  # lora_B, which is 0, stays 0
    trainer.train()
    assert len([line for line in messages() if "still equals the reference" in line]) == 1


@pytest.mark.parametrize("loss_type", ["rdro", "kldpo"])
def test_a_policy_that_moves_is_not_reported(qwen2, tmp_path, messages, loss_type):
    make(qwen2, tmp_path, max_steps=30, loss_type=loss_type, warmup_steps=10).train()
    assert not [line for line in messages() if "still equals" in line]


# Which model is the reference


def test_one_line_says_which_model_is_the_reference(qwen2, tmp_path, messages):
    lora = {"peft_config": LoraConfig(**LORA)}
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(qwen2), LoraConfig(**LORA))
    given = {"ref_model": tiny_qwen2(seed=1)}
    cases = [
        (qwen2, {}, {}, "a copy of qwen2 as it is before training"),
        (qwen2, {}, given, "the given `ref_model`"),
        (qwen2, {}, lora, "the base model, with the adapter switched off"),
        (adapter, {}, {"processing_class": tiny_tokenizer()}, "a frozen copy of the given adapter"),
        (qwen2, {"precompute_ref_log_probs": True}, {}, "log-probabilities computed before training"),
    ]
    for i, (model, settings, kwargs, sentence) in enumerate(cases, start=1):
        make(model, tmp_path, trainer_kwargs=kwargs, **settings)
        lines = [line for line in messages() if "Reference model: " in line]
        assert len(lines) == i and sentence in lines[-1]


@pytest.mark.parametrize("trainer_class, config_class", [(DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)])
def test_a_data_set_can_bring_its_reference_log_probabilities(qwen2, tmp_path, messages, trainer_class, config_class):
    """They are used with `precompute_ref_log_probs`, whatever the model; without, a warning says that they are not."""
    columns = trainer_class._reference_columns
    first = make(qwen2, tmp_path, trainer_class, config_class, loss_type="rdro", precompute_ref_log_probs=True)
    assert set(columns) <= set(first.train_dataset.column_names)
    saved = Dataset.from_dict({name: first.train_dataset[name] for name in first.train_dataset.column_names})
    if "label" in saved.column_names:
        saved = saved.cast(first.train_dataset.features)

    kwargs = {"train_dataset": saved, "processing_class": tiny_tokenizer()}
    brought = make(
        tiny_qwen2(seed=1),
        tmp_path,
        trainer_class,
        config_class,
        kwargs,
        loss_type="rdro",
        precompute_ref_log_probs=True,
    )
    assert brought.train_dataset[columns[0]][:] == first.train_dataset[columns[0]][:]
    assert any("taken from its columns" in line for line in messages())
    brought.train()
    assert abs(brought.state.log_history[0]["logratios/chosen"]) > 0.1, "the reference is another model"

    make(qwen2, tmp_path, trainer_class, config_class, kwargs, loss_type="rdro")
    assert any("are not used" in line or "is not used" in line for line in messages())


# Crash and resume


def run_worker(model, output_dir, loss, die_at="", processes=1):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    worker = ["-m", "tests.trainers.crash_worker", model, str(output_dir), loss, die_at]
    return subprocess.run(
        [sys.executable, *launcher, *worker], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss, processes", [("kldpo", 1), ("wdpo", 1), ("unpaired", 1), ("rdro", 2), ("wdpo", 2)])
def test_kill_9_and_the_same_command_again(qwen2, tmp_path, loss, processes):
    """Killed between checkpoints, then while one is being written, a run ends with the weights of an unbroken one."""
    if processes > 1:
        pytest.importorskip("deepspeed")
    whole_run = run_worker(qwen2, tmp_path / "whole", loss, processes=processes)
    assert whole_run.returncode == 0, whole_run.stderr[-2000:]
    broken = tmp_path / "broken"
    for die_at in ("step 4", "writing 6"):  # checkpoints at 3, 6 and 9 of 9 steps
        killed = run_worker(qwen2, broken, loss, die_at, processes)
        assert killed.returncode == -signal.SIGKILL if processes == 1 else "Signal 9 (SIGKILL)" in killed.stderr
    assert (broken / "checkpoint-6").exists() and not is_complete(broken / "checkpoint-6")
    finished = run_worker(qwen2, broken, loss, processes=processes)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "checkpoint-6 was not written to its end" in finished.stderr
    assert "Resuming from" in finished.stderr and "checkpoint-3" in finished.stderr
    whole, resumed = (torch.load(path / "final.pt") for path in (tmp_path / "whole", broken))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_complete_checkpoints_are_resumed_from(qwen2, tmp_path, messages):
    trainer = make(qwen2, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert any("starting from the beginning" in line for line in messages())
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="not a checkpoint that was written to its end"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps([]))
    assert last_complete_checkpoint(tmp_path) is None


def test_a_checkpoint_that_is_written_over_is_incomplete_meanwhile(qwen2, tmp_path):
    """A run that starts again over the checkpoints of an earlier one must not leave a mixture that looks complete."""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make(qwen2, tmp_path, **settings).train()
    again, seen = make(qwen2, tmp_path, **settings), []
    save_optimizer = again._save_optimizer_and_scheduler
    again._save_optimizer_and_scheduler = lambda path: (seen.append(is_complete(Path(path))), save_optimizer(path))
    again.train()
    assert seen == [False] and is_complete(tmp_path / "checkpoint-1")
