"""The one way in which tests build a trainer and train a few steps: tiny, on a CPU, quiet, every step logged."""

from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.losses.types import in_use

from .tiny import cpu_args, tiny_preferences, tiny_qwen2, tiny_tokenizer, with_columns


CONFIGS = {
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    trl.DPOTrainer: trl.DPOConfig,
    trl.KTOTrainer: trl.KTOConfig,
}
SETTINGS = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
# An optimiser step that shows the gradient itself
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 1e9}


def make_config(output_dir, config_class=DPOConfig, **settings):
    return config_class(**cpu_args(output_dir=str(output_dir), **{**SETTINGS, **settings}))


def kto_config(output_dir, loss_type="rdro", config_class=KTOConfig, **settings):
    return make_config(output_dir, config_class, loss_type=loss_type, **{"max_steps": 2, **settings})


def make_trainer(model, output_dir, trainer_class=DPOTrainer, trainer_kwargs=None, config_class=None, **settings):
    """
    A trainer on 32 tiny pairs, or on other data. Tables get the columns that our losses need, if they lack them.

    Args:
        trainer_kwargs: arguments of the trainer, which come on top of the model, the config and the data.
        config_class: if not the one that goes with the trainer.
        settings: fields of the config.
    """
    args = make_config(output_dir, config_class or CONFIGS[trainer_class], **settings)
    kwargs = {"train_dataset": tiny_preferences(32), **(trainer_kwargs or {})}
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    used = in_use(names, getattr(args, "inner_loss_type", None))
    for name in ("train_dataset", "eval_dataset"):
        if isinstance(kwargs.get(name), Dataset):
            kwargs[name] = with_columns(kwargs[name], used)
    return trainer_class(model, args=args, **kwargs)


def train(*args, **kwargs):
    """`make_trainer`, after training."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


# What to train


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def two_models() -> dict[str, Any]:
    """Arguments of a trainer: a policy that is not its reference, so that no log-ratio is zero."""
    return {
        "model": tiny_qwen2(seed=1),
        "ref_model": tiny_qwen2(seed=0),
        "processing_class": tiny_tokenizer(),
    }


def flatten(pairs: Dataset) -> list[dict[str, Any]]:
    """Pairs as single completions with labels."""
    return [
        {"prompt": row["prompt"], "completion": row[column], "label": column == "chosen"}
        for row in pairs
        for column in ("chosen", "rejected")
    ]


def labelled(n_preferred: int, n_others: int, seed: int = 0) -> Dataset:
    """Preferred completions first, then the others."""
    rows = flatten(tiny_preferences(max(n_preferred, n_others), seed))
    return Dataset.from_list(rows[0::2][:n_preferred] + rows[1::2][:n_others])


# What came of it


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def trained_parameters(trainer) -> dict[str, torch.Tensor]:
    """Those after training it."""
    trainer.train()
    return parameters(trainer)


def same_parameters(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """To the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


def steps(trainer) -> list[dict[str, float]]:
    """What was logged of each optimiser step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def measured(trainer) -> list[dict[str, float]]:
    """The log without its timings."""
    timings = ("runtime", "per_second", "flos")
    return [
        {key: value for key, value in entry.items() if not any(timing in key for timing in timings)}
        for entry in trainer.state.log_history
    ]
