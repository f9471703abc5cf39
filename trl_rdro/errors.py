"""
What a user did wrong, said in one sentence.

Parsing, loading data, building a trainer and calling a user's function fail for reasons the user can mend, and a
traceback through three libraries hides them. Such steps run inside `user_error`, which turns the exceptions it names
into `UserError`; the commands print that and exit with 2 (`trl_rdro.cli.errors`). Everything else, above all an
exception inside training, keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error whose message is all that the user needs to see."""


class NotFinite(FloatingPointError):
    """A loss, a gradient or parameters that are infinite or not a number, said in one sentence. From Python it is the
    `FloatingPointError` that it is; a command prints the sentence."""


def describe(error: BaseException) -> str:
    """The message of `error` on one line, or its type where it has none."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def user_error(*exceptions: type[BaseException], prefix: str = "") -> Iterator[None]:
    """Raise `UserError`, with `prefix` before the message, for the given exceptions in the body."""
    try:
        yield
    except UserError:
        raise
    except exceptions as error:
        raise UserError(prefix + describe(error)) from error
