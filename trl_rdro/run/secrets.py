"""Tokens and keys, which belong into no file that is shared and into no process's list of arguments."""

import copy
import os
import re
from typing import Any


# From the command to the processes that it launches, whose arguments every user of the machine can read
HUB_TOKEN_VARIABLE = "TRL_RDRO_HUB_TOKEN"

SECRET = re.compile(r"(.*_)?((hub|auth|access|hf)_token|api_key|secret(_key)?|password)|token")


def is_secret(name: str) -> bool:
    """Whether an option of this name holds a token or a key. `pad_token` and its like do not."""
    return SECRET.fullmatch(name.lower()) is not None


def without_secrets(value: Any) -> Any:
    """A copy in which the tokens and keys of nested dictionaries are None."""
    if isinstance(value, dict):
        return {key: None if is_secret(str(key)) else without_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(entry) for entry in value) if type(value) in (list, tuple) else value
    return value


def args_without_secrets(args: Any) -> Any:
    """A copy of training arguments without tokens and keys."""
    cleaned = copy.copy(args)
    vars(cleaned).update(without_secrets(vars(args)))
    return cleaned


def split_hub_token(argv: list[str]) -> tuple[list[str], str | None]:
    """A command line without `--hub_token TOKEN` or `--hub_token=TOKEN`, and the token (the last one, as argparse)."""
    kept, token, rest = [], None, iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--hub_token":
            kept.append(argument)
        else:
            token = value if equals else next(rest, None)
    return kept, token


def take_hub_token(args: Any) -> None:
    """Give training arguments the token that the launcher passed on."""
    args.hub_token = os.environ.pop(HUB_TOKEN_VARIABLE, args.hub_token)
