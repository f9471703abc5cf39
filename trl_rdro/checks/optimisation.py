"""
The optimiser and the schedule that a configuration describes, built for a single number before a model is loaded.

What `optim_args` and `lr_scheduler_kwargs` may hold, PyTorch and a dozen other libraries know, and say in words of
their own once everything is loaded. A name that an optimiser does not know most of them pass over in silence.
"""

import math
from typing import Any

import torch
from transformers import Trainer
from transformers.optimization import get_scheduler

from ..errors import describe
from ..log import get_logger


logger = get_logger(__name__)

# They look for the model's layers, or change its backward pass
NEED_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")
STEPS = 1000  # of a schedule whose length is not known yet


def check_optimisation(args: Any) -> None:
    """
    Refuse an optimiser or a schedule that cannot be built, or whose learning rate is no number somewhere.

    Raises:
        `ValueError`: with one sentence that names the options.
    """
    optimizer: torch.optim.Optimizer = torch.optim.SGD([_number()], lr=args.learning_rate)
    if not str(args.optim.value).startswith(NEED_THE_MODEL):
        try:
            optimizer = _optimizer(args)
        except Exception as error:  # the optimisers of a dozen libraries, which are given these options and one number
            raise ValueError(
                f"`optim={args.optim.value!r}` cannot be built with `optim_args={args.optim_args!r}`, "
                f"`learning_rate={args.learning_rate}` and the options of Adam: {describe(error)}. Correct them."
            ) from error
        _warn_of_unread(args)
    for name, value in (args.lr_scheduler_kwargs or {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`lr_scheduler_kwargs` must hold finite numbers, got {value} as {name!r}. Correct it.")
    steps = args.max_steps if args.max_steps > 0 else STEPS
    try:
        rates = _rates(args, optimizer, steps)
    except Exception as error:  # whatever a schedule makes of keyword arguments that it did not expect
        raise ValueError(
            f"`lr_scheduler_type={args.lr_scheduler_type.value!r}` cannot be built with "
            f"`lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}`: {describe(error)}. Correct them."
        ) from error
    if bad := [rate for rate in rates if not math.isfinite(rate) or rate < 0]:
        raise ValueError(
            f"`lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}` makes the learning rate of the schedule "
            f"{args.lr_scheduler_type.value!r} {bad[0]} times `learning_rate`. Correct them."
        )


def _number() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def _optimizer(args: Any) -> torch.optim.Optimizer:
    build, options = Trainer.get_optimizer_cls_and_kwargs(args)
    if not isinstance(build, type):  # a function of the whole model
        return torch.optim.SGD([_number()], lr=args.learning_rate)
    return build([_number()], **options)


def _warn_of_unread(args: Any) -> None:
    """Name what stands in `optim_args` and makes no difference."""
    parts = args.optim_args.replace(" ", "").split(",") if args.optim_args else []
    given = args.optim_args
    _, with_all = Trainer.get_optimizer_cls_and_kwargs(args)
    try:
        for part in parts:
            args.optim_args = ",".join(other for other in parts if other != part) or None
            _, without = Trainer.get_optimizer_cls_and_kwargs(args)
            if without == with_all:
                logger.warning(f"`optim_args={given!r}`: {part} makes no difference to `optim={args.optim.value!r}`.")
    finally:
        args.optim_args = given


def _rates(args: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The factors of the learning rate at the beginning, the middle and the end, where the schedule tells."""
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return [
        float(factor(step)) for factor in getattr(scheduler, "lr_lambdas", []) for step in (0, steps // 2, steps - 1)
    ]
