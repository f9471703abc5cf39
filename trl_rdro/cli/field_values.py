"""
Values of a YAML file against the types of the fields they are for.

On the command line argparse turns text into numbers and refuses what it cannot. What YAML has made of a file goes past
that: `loss_weights: 0.5` would be a number where a list is read, `datasets: mine.jsonl` a list of letters.
"""

import dataclasses
import enum
import json
import reprlib
import types
import typing
from collections.abc import Iterable
from typing import Any

from ..errors import UserError, user_error


WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", dict: "a mapping"}


def field_hints(dataclass_types: Iterable[Any]) -> dict[str, Any]:
    """The type of each field of these dataclasses."""
    hints: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        names = {field.name for field in dataclasses.fields(dataclass_type) if field.init}
        hints |= {name: hint for name, hint in typing.get_type_hints(dataclass_type).items() if name in names}
    return hints


def converted(name: str, value: Any, hint: Any) -> Any:
    """The value that a field takes over from a YAML file; a `UserError` if it is of another kind."""
    options = options_of(hint)
    if value is False and any(_is_enum(option) and "no" in {item.value for item in option} for option in options):
        return "no"  # what YAML makes of a bare `no`
    if type(value) is int and float in options and int not in options and abs(value) <= 2**53:
        value = float(value)  # a `0` for an option of an optimiser that wants 0.0
    if isinstance(value, list) and any(typing.get_args(option) == (float,) for option in options):
        # PyYAML reads 1e-3 as text
        with user_error(ValueError, TypeError, prefix=f"`{name}` must be a list of numbers: "):
            value = [item if isinstance(item, bool) or item is None else float(item) for item in value]
    if isinstance(value, str) and name.endswith("_kwargs"):
        with user_error(ValueError, RecursionError, prefix=f"`{name}` must be a mapping, got {value!r}: "):
            value = json.loads(value)
    try:
        fits = any(_fits(value, option) for option in options)
    except UserError as error:  # about a key in it
        raise UserError(f"`{name}`: {error}") from error
    if fits:
        return value
    if str in options and isinstance(value, int):
        return str(value)  # as on the command line: `run_name: 2026`, `resume_from_checkpoint: true`
    expected = " or ".join(filter(None, map(_in_words, options)))
    quotes = "; put it in quotes" if str in options and not isinstance(value, (dict, list)) else ""
    raise UserError(f"`{name}` must be {expected}, got {reprlib.repr(value)}{quotes}")


def require_mappings(parsed: list[Any]) -> None:
    """Refuse text that was given for the keyword arguments of something, and is no JSON."""
    for arguments in parsed:
        for name, value in vars(arguments).items():
            if name.endswith("_kwargs") and not isinstance(value, (dict, types.NoneType)):
                raise UserError(f"`{name}` must be a mapping, got {reprlib.repr(value)}")


def options_of(hint: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Any:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        # A list of one may be given as the item itself where that is text, as `loss_type: rdro`
        items = [value] if arguments == (str,) and isinstance(value, str) else value
        return isinstance(items, list) and all(_fits(item, argument) for item in items for argument in arguments)
    if isinstance(origin, type) and dataclasses.is_dataclass(origin):
        return isinstance(value, dict) and _fits_fields(value, origin)
    if isinstance(value, bool):
        return origin is bool
    if origin in (float, int, bool) and isinstance(value, str):
        return True  # argparse reads it
    if origin is float:
        return isinstance(value, (float, int))
    return isinstance(value, str if _is_enum(origin) else origin)


def _fits_fields(values: dict[str, Any], dataclass_type: type) -> bool:
    hints = field_hints([dataclass_type])
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown key {name} in {dataclass_type.__name__}: it has {', '.join(hints)}")
        values[name] = converted(name, value, hints[name])
    for field in dataclasses.fields(dataclass_type):
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and field.name not in values:
            raise UserError(f"a {dataclass_type.__name__} must have the key {field.name}, got {values!r}")
    return True


def _in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is types.NoneType:
        return ""
    if origin is typing.Literal:
        return ", ".join(map(repr, arguments))
    if origin is list:
        plural = {float: "numbers", str: "texts"}.get(arguments[0], "mappings")
        return f"a list of {plural}"
    if _is_enum(origin):
        return f"one of {', '.join(str(item.value) for item in origin)}"
    return WORDS.get(origin, "a mapping")
