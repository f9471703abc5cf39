"""What every field of a configuration must be, said once and checked for all of them: the type is the annotation, the
choices are those of the command line's help, the range stands in a table.

Each check raises `ValueError` with one sentence: what is wrong, the value seen, the value expected, what to do."""

import dataclasses
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from .choices import require_choice


# Of libraries that take more than their annotations say
_LOOSELY_ANNOTATED = {
    "resume_from_checkpoint": str | bool | None,
    "accelerator_config": dict | str | AcceleratorConfig | None,  # the last once it has been read
    "fsdp": str | bool | list[str] | None,
    "lora_target_modules": str | list[str] | None,
    "debug": str | list[str] | None,
}
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
_WORDS |= {types.NoneType: "None", list: "a list"}


@dataclasses.dataclass(frozen=True)
class Range:
    """
    Where a number, or each number of a list, must lie.

    Parameters:
        interval (`str`): as `"[0, 1)"`, `"(0, inf)"`. An infinite end, and not a number, never belong to it.
        advice (`str`): what to do about a value outside.
        also (`float`, *optional*): a value outside the interval that is allowed all the same.
    """

    interval: str
    advice: str = ""
    also: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        low, high = map(float, self.interval[1:-1].split(","))
        return low, high

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return (above and below and abs(value) <= sys.float_info.max) or value == self.also

    def describe(self, noun: str) -> str:
        """`noun`, "a number" or "a whole number", and where it must lie."""
        low, high = self.ends
        if high < math.inf:
            text = f"{noun} in {self.interval}"
        elif low == -math.inf:
            text = noun.replace("a number", "a finite number")
        elif self.interval[0] == "[":
            text = f"{noun} >= {self.interval[1:].split(',')[0]}"
        else:
            text = noun.replace("a number", "a positive number")
        return text if self.also is None else f"{text}, or {self.also}"


_NOT_COUNTS = ("auto", "none", "null")  # of `pad_to_multiple_of`, as TRL reads them
ANY_NUMBER = Range("(-inf, inf)")


def validate_fields(config: Any, ranges: Mapping[str, Range]) -> None:
    """
    Check the type of each field of the dataclass `config`, its choices where it has some, and its range in `ranges`.

    Raises:
        `ValueError`: for the first field that is not what it must be.
    """
    annotations = _annotations(type(config))  # type: ignore[arg-type]  # a class is hashable
    for field in dataclasses.fields(config):
        require(
            field.name,
            getattr(config, field.name),
            annotations[field.name],
            ranges.get(field.name, ANY_NUMBER),
            field.metadata.get("choices"),
        )


@functools.cache
def _annotations(config_class: Any) -> dict[str, tuple]:
    """For each field the types it may be of, unions taken apart."""
    hints = typing.get_type_hints(config_class) | _LOOSELY_ANNOTATED
    return {field.name: alternatives(hints[field.name]) for field in dataclasses.fields(config_class)}


def alternatives(annotation: Any) -> tuple:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def require(name: str, value: Any, kinds: tuple, allowed: Range, choices: list[str] | None = None) -> None:
    """Refuse `value` unless it is of one of `kinds`, its numbers in `allowed`, and one of `choices` if given."""
    enumerations = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if enumerations and not isinstance(value, Enum):
        choices = [member.value for member in enumerations[0]]
    if choices is not None and not (value is None and types.NoneType in kinds):
        require_choice(name, value, choices)
        return
    if not any(_is_a(value, kind, allowed) for kind in kinds):
        expected = [_describe(kind, allowed) for kind in kinds]
        advice = " ".join(filter(None, (_repair(value, kinds), allowed.advice)))
        raise ValueError(
            f"`{name}` must be {', '.join(expected[:-1])}{' or ' if expected[1:] else ''}{expected[-1]}, got "
            f"{value!r}.{advice and ' ' + advice}"
        )
    if isinstance(value, str) and not isinstance(value, Enum):
        is_count = value in _NOT_COUNTS or (value.isdecimal() and int(value) in allowed)
        if int in kinds and not is_count:
            raise ValueError(f"`{name}` must be {allowed.describe(_WORDS[int])}, 'auto' or None, got {value!r}.")


def _is_a(value: Any, kind: Any, allowed: Range) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin is float or origin is int:
        is_number = isinstance(value, Real if origin is float else Integral) and not isinstance(value, bool)
        return is_number and value in allowed
    if origin is list:
        elements = typing.get_args(kind)
        return isinstance(value, (list, tuple)) and all(_is_a(x, kind, allowed) for x in value for kind in elements)
    if origin is dict and typing.get_args(kind):
        key_kind, value_kind = typing.get_args(kind)
        return isinstance(value, dict) and all(
            _is_a(key, key_kind, allowed) and (value_kind is Any or _is_a(element, value_kind, allowed))
            for key, element in value.items()
        )
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    return isinstance(value, (str, os.PathLike) if origin is str else origin)


def _describe(kind: Any, allowed: Range) -> str:
    origin = typing.get_origin(kind) or kind
    if origin in (int, float):
        return allowed.describe(_WORDS[origin])
    if origin is list and typing.get_args(kind):
        return f"a list, each element {_describe(typing.get_args(kind)[0], allowed)}"
    if origin is dict and typing.get_args(kind) and typing.get_args(kind)[1] is not Any:
        return f"a mapping, each value {_describe(typing.get_args(kind)[1], allowed)}"
    if origin is typing.Literal:
        return repr(*typing.get_args(kind))
    return _WORDS.get(origin) or f"a {origin.__name__}"


def _repair(value: Any, kinds: tuple) -> str:
    """What to do about a value that is nearly right."""
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if lists and isinstance(value, (str, Real)):
        return f"For a single one, write [{value!r}]."
    if lists and isinstance(value, (list, tuple)) and typing.get_args(lists[0]) == (float,):
        texts = [x for x in value if isinstance(x, str)]
        return f"YAML reads {texts[0]!r} as text: a number there has a point, as in 1.0e-3." if texts else ""
    return ""


def require_reverse_kl(loss_types: list[str], f_divergence_type: str) -> None:
    """Refuse f-divergences: our losses are defined on the log-ratio itself."""
    if f_divergence_type != "reverse_kl":
        raise ValueError(
            f"`f_divergence_type={f_divergence_type!r}` cannot be combined with {' and '.join(loss_types)}: these "
            "losses are functions of the log-ratio itself, which an f-divergence replaces by another score. Use the "
            "default `f_divergence_type='reverse_kl'`."
        )
