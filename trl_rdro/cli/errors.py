"""
What a user did wrong, said in one sentence.

Parsing, loading data and building a trainer fail for reasons the user can mend, and a traceback through three
libraries hides them. Such steps run inside `user_error`, which turns the exceptions it names into `UserError`; an
entry point wrapped in `report_user_errors` prints that as `trl-rdro: error: ...` and returns 2, as argparse does.
Everything else, above all an exception inside training, keeps its traceback.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error whose message is all that the user needs to see."""


def describe(error: BaseException) -> str:
    """The message of `error` on one line, or its type where it has none."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def user_error(*exceptions: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise `UserError`, with `prefix` before the message, for the given exceptions in the body."""
    try:
        yield
    except UserError:
        raise
    except exceptions as error:
        raise UserError(prefix + describe(error)) from error


def report_user_errors(function: Callable[..., int]) -> Callable[..., int]:
    """Make an entry point print a `UserError` on stderr and return 2."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs) -> int:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            print(f"trl-rdro: error: {error}", file=sys.stderr)
            return 2

    return wrapper
