"""Activation checkpointing by the names that transformers has for it now.

TRL 1.16 uses the deprecated ones at its own defaults, so that every run would begin with four warnings nobody can act
on. What is done is the same.
"""

from contextlib import contextmanager
from typing import Any

import trl.trainer.dpo_trainer
import trl.trainer.kto_trainer


TRL_MODULES: tuple[Any, ...] = (trl.trainer.dpo_trainer, trl.trainer.kto_trainer)


def kwargs_of(args: Any) -> dict[str, Any] | None:
    """How checkpointing is done. TRL decides it, and writes what it decides into the field of the old name."""
    return {**(args.activation_checkpointing_kwargs or {}), **(args.gradient_checkpointing_kwargs or {})} or None


def may_be_reentrant(args: Any) -> bool:
    """Whether the Trainer, which reads the field of the new name, or TRL has it reentrant."""
    fields = (args.activation_checkpointing_kwargs, args.gradient_checkpointing_kwargs)
    return any((kwargs or {}).get("use_reentrant") for kwargs in fields)


@contextmanager
def checkpointing_off(model: Any, checkpointing_kwargs: dict[str, Any] | None = None):
    """TRL's `disable_gradient_checkpointing`: off for a while, then as it was."""
    was_enabled = model.is_activation_checkpointing
    if was_enabled:
        model.activation_checkpointing_disable()
    try:
        yield
    finally:
        if was_enabled:
            model.activation_checkpointing_enable(checkpointing_kwargs)


@contextmanager
def quiet_checkpointing():
    """Let TRL's trainers switch checkpointing off, for the reference pass, by `checkpointing_off`."""
    saved = [module.disable_gradient_checkpointing for module in TRL_MODULES]
    for module in TRL_MODULES:
        module.disable_gradient_checkpointing = checkpointing_off
    try:
        yield
    finally:
        for module, function in zip(TRL_MODULES, saved, strict=True):
            module.disable_gradient_checkpointing = function
