"""
Functions of the user: found by their dotted path, called, and their answers checked.

Whatever goes wrong in one is the user's to mend: a `UserError` names the function, and the place in it.
"""

import functools
import importlib
import inspect
import itertools
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from typing import Any

from ..errors import UserError, describe


# What a function may raise, or end with. Ctrl-C is not its own
FAILURES = (Exception, SystemExit)


def name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def source_of(function: Callable, outer: tuple = ()) -> str:
    """The text of a function, or of the class of one that is called, and what a `partial`, a decorator or the function
    that made it has put into it; its name where there is no text."""
    try:
        text = inspect.getsource(function if hasattr(function, "__code__") else type(function))
    except (OSError, TypeError):  # compiled, or typed in
        text = name_of(function)
    outer = (*outer, function)  # a function may hold itself
    for value in _held_by(function):
        if isinstance(value, str | int | float | None):
            text += repr(value)
        elif callable(value) and value not in outer:
            text += source_of(value, outer)
    return text


def _held_by(function: Any) -> list[Any]:
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *itertools.chain(*sorted(function.keywords.items()))]
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def load_function(path: str) -> Callable[..., list[float]]:
    """
    Import `package.module.function`.

    The working directory is searched too, after everything else: a file there must not stand in for a module of
    Python or of a library. (TRL's GRPO script searches it first.)
    """
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(
            f"Cannot import the function {path!r} (`package.module.function`): {_what_and_where(error)}."
        ) from error
    if not callable(function):
        raise UserError(f"{path!r} must be a function, got {type(function).__name__}.")
    return function


def ask(function: Callable, expected: int, **arguments: Any) -> list[float]:
    """Call a reward or preference function, which must return so many finite numbers."""
    name = name_of(function)
    try:
        answer = function(**arguments)
        # Of text or of a mapping the list would be one of letters or keys
        # One more than expected: an iterator may have no end
        is_list = isinstance(answer, Iterable) and not isinstance(answer, (str, bytes, Mapping, Set))
        values = list(itertools.islice(answer, expected + 1)) if is_list else None
    except FAILURES as error:
        raise UserError(f"The judge `{name}` failed: {_what_and_where(error)}.") from error
    if values is None:
        raise UserError(f"`{name}` must return a list of {expected} numbers, got {_shown(answer)}.")
    if len(values) != expected:
        got = len(answer) if isinstance(answer, Sized) else len(values) if len(values) < expected else "more"
        raise UserError(f"`{name}` must return {expected} values, one for each, got {got}.")
    return [_number(name, value) for value in values]


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if value is None or isinstance(value, (str, bytes)) else float(value)
    except FAILURES:  # no number, one that no float holds, or an object of the user's that fails
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"`{name}` must return finite numbers, got {_shown(value)}.")
    return number


def _shown(value: Any) -> str:
    """A value in a few words of one line, which a tensor's are not."""
    return " ".join(reprlib.repr(value).split())


def _what_and_where(error: BaseException) -> str:
    """The error in one line, with the line of the user's code in which it arose or which called what raised it."""
    if isinstance(error, SystemExit):
        what = f"it ends the process with sys.exit({error.code!r})"
    else:
        what = f"{type(error).__name__}: {describe(error)}" if str(error) else type(error).__name__
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen"):
            return f"{what} ({frame.filename}, line {frame.lineno})"
    return what
