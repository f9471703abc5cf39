"""Checks shared by the configurations. Each raises `ValueError` with one sentence: what is wrong, the value seen, the
value expected, what to do."""

import dataclasses
import difflib
import math
from numbers import Real
from typing import Any


def require_in_range(
    name: str, value: Any, low: float, high: float, expected: str, advice: str = "", low_included: bool = False
) -> None:
    """Refuse `value` unless it is a number between `low` (included or not) and `high` (not included)."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and (low < value < high or (low_included and value == low))):
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.{advice and ' ' + advice}")


def require_choice(name: str, value: object, choices: list[str]) -> None:
    """Refuse `value` unless it is one of `choices`, and name the nearest."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{name}` has no value {value!r}.{hint} Choose from {', '.join(map(repr, choices))}.")


def require_reverse_kl(loss_types: list[str], f_divergence_type: str) -> None:
    """Refuse f-divergences: our losses are defined on the log-ratio itself."""
    if f_divergence_type != "reverse_kl":
        raise ValueError(
            f"`f_divergence_type={f_divergence_type!r}` cannot be combined with {' and '.join(loss_types)}: these "
            "losses are functions of the log-ratio itself, which an f-divergence replaces by another score. Use the "
            "default `f_divergence_type='reverse_kl'`."
        )


# Fields that transformers, TRL and PEFT take over as they are, and die or go wrong of later: least value, and bound
RANGES = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs"), (0, math.inf)),
    "seed": (0, 2**32),
    **dict.fromkeys(("warmup_steps", "dataloader_num_workers"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), (0, 1)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "max_length"), (1, math.inf)),
    **dict.fromkeys(("ref_model_sync_steps", "precompute_ref_batch_size", "dataset_num_proc"), (1, math.inf)),
    **dict.fromkeys(("lora_r", "lora_alpha"), (1, math.inf)),
}


def require_sane_numbers(config: Any) -> None:
    """Refuse NaN in any field of a dataclass, and what is outside `RANGES` in the fields there."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if not isinstance(value, Real) or isinstance(value, bool):
            continue
        if math.isnan(value):
            raise ValueError(f"`{field.name}` must be a number, got {value!r}.")
        if field.name in RANGES:
            least, bound = RANGES[field.name]
            expected = f"a number >= {least}" + (f" and < {bound}" if bound < math.inf else "")
            require_in_range(field.name, value, least, bound, expected, low_included=True)
