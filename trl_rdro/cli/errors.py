"""The one place where a mistake of the user becomes a line on stderr and an exit code."""

import functools
import sys
from collections.abc import Callable

from ..errors import UserError


def report_user_errors(function: Callable[..., int]) -> Callable[..., int]:
    """Make an entry point print a `UserError` on stderr and return 2, as argparse does."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs) -> int:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            print(f"trl-rdro: error: {error}", file=sys.stderr)
            return 2

    return wrapper
