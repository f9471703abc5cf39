"""
Parsing and checking that every command shares. Nothing slow is imported here.

A mistake on the command line is a `UserError`: one sentence, without the usage of some three hundred options first.
"""

import argparse
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from ..errors import UserError


class SentenceErrors:
    """Mixin of `ArgumentParser`s: what is wrong as a `UserError`, and `-1e-5` is a number, not an option."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str):
        raise UserError(message)


class Parser(SentenceErrors, argparse.ArgumentParser):
    """A parser without abbreviations, with which a misspelt option could pass for another."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)


def take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file after `--config`, and the command line without it."""
    file, rest, tokens = None, [], iter(argv)
    for token in tokens:
        option, equals, value = token.partition("=")
        if option != "--config":
            rest.append(token)
        elif file is not None:
            raise UserError("--config is given twice: put the settings into one file")
        else:
            file = value if equals else next(tokens, "")
            if not file:
                raise UserError("expected a file name after --config")
    return file, rest


def require_between(option: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Refuse an option's value that is not finite or not between the bounds, both included; None is not given."""
    if value is not None and not (least <= value <= most and value != math.inf):
        between = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        finite = " and finite" if isinstance(value, float) else ""
        raise UserError(f"{option} must be {between}{finite}, got {value:g}")


def require_directory_of(path: str | None) -> None:
    """Refuse a file to write whose directory does not exist; None is not given."""
    if path is None:
        return
    if not os.path.isdir(Path(path).parent):
        raise UserError(f"cannot write {path}: there is no directory {Path(path).parent}")
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a directory")


def require_png(option: str, path: str) -> None:
    """Refuse a plot that is no PNG, or that cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'trl-rdro[plot]'")
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"the plot is a PNG: give {option} a name that ends in .png, not {path}")
