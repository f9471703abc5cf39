"""
What options the training commands have, from a table, so that a mistake is said before anything slow is imported.

TRL's and accelerate's parsers take seconds to import. `scripts/docs.py` writes `options.json` from them, and a test
compares the two. The table is only believed with the releases that it was written from: with others the parsers
themselves decide, a few seconds later.
"""

import argparse
import difflib
import json
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..configs.choices import require_loss_type
from ..errors import UserError, user_error
from ..tools.yaml_files import read_yaml
from .parsing import Parser, take_config


TABLE = Path(__file__).with_name("options.json")
METHODS = ("dpo", "kto")
COMMANDS = (*METHODS, "iterate dpo", "iterate kto")  # as the table names them
LAUNCH = "launch"  # the options of `accelerate launch`, beside those of each command
PACKAGES = ("accelerate", "transformers", "trl")


@cache
def read_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def installed_versions() -> dict[str, str]:
    try:
        return {package: version(package) for package in PACKAGES}
    except PackageNotFoundError:
        return {}


def find_option(argv: list[str], name: str) -> Any:
    """An option that decides over others: from the command line, else from its YAML file, else None."""
    file, argv = take_config(argv)
    parser = Parser(add_help=False)
    parser.add_argument(f"--{name}", nargs="?")
    value = getattr(parser.parse_known_args(argv)[0], name)
    return read_yaml(file).get(name) if value is None and file is not None else value


def find_method(argv: list[str]) -> str:
    """`dpo` or `kto`, which decides what options `iterate` has."""
    method = find_option(argv, "method")
    return method if method in METHODS else METHODS[0]


def refuse_at_once(command: str, argv: list[str]) -> None:
    """Raise `UserError` for what the command line of a training command, or its YAML file, lacks or gets wrong. Other
    commands, and what the table cannot tell, are left to the command itself."""
    if command not in ("iterate", *METHODS) or {"-h", "--help"} & {*argv}:
        return
    method = find_method(argv) if command == "iterate" else command
    if installed_versions() != read_table()["versions"]:
        return
    file, argv = take_config(argv)
    settings = {} if file is None else read_yaml(file)
    settings.pop("env", None)

    parser, launch_parser = make_parser(command if command in METHODS else f"{command} {method}"), make_parser(LAUNCH)
    given, rest = parser.parse_known_args(argv)
    refuse_unknown_keys(settings, parser, launch_parser)
    options = [token for token in rest if token.startswith("--")]
    refuse_unknown(options, parser._option_string_actions, launch_parser._option_string_actions)
    launched = launch_parser.parse_known_args([*rest, "--module", command])[0]
    if launched.training_script != command:
        raise UserError(f"unexpected argument {launched.training_script}: a YAML file is given with --config FILE")

    settings |= vars(given)
    loss_types = settings.get("loss_type", [])
    for loss_type in loss_types if isinstance(loss_types, list) else [loss_types]:
        if isinstance(loss_type, str):
            with user_error(ValueError):
                require_loss_type(loss_type, method, read_table()["loss_types"])
    require_model_name(settings.get("model_name_or_path"))
    if command in METHODS:
        require_data(settings.get("dataset_name") or settings.get("datasets"))


def make_parser(name: str) -> Parser:
    """A parser that takes what the one of that name in the table takes."""
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for option in read_table()["options"]:
        if name not in option["of"]:
            continue
        if option.get("nargs") == 0:
            parser.add_argument(*option["flags"], dest=option["dest"], action="store_true")
        else:
            kind = {"int": int, "float": float}.get(option.get("type"), str)
            names: dict[str, Any] = {"dest": option["dest"]} if option["flags"] else {}
            parser.add_argument(
                *(option["flags"] or [option["dest"]]),
                **names,
                type=kind,
                nargs=option.get("nargs"),
                choices=option.get("choices"),
            )
    return parser


def refuse_unknown(options: Iterable[str], *known: Iterable[str]) -> None:
    """Refuse the first of `options` that none of `known` has. Of another command it is said to be that one's."""
    names = [name for group in known for name in group]
    for option in (token.partition("=")[0] for token in options):
        if option in names:
            continue
        for row in read_table()["options"]:
            if option in row["flags"] and (others := [command for command in COMMANDS if command in row["of"]]):
                raise UserError(f"unknown option {option}: it is one of `trl-rdro {others[0].split()[0]}`")
        near = difflib.get_close_matches(option, names, n=1)
        raise UserError(f"unknown option {option}" + (f", did you mean {near[0]}?" if near else ""))


def refuse_unknown_keys(
    settings: Iterable[str], parser: argparse.ArgumentParser, launch_parser: argparse.ArgumentParser
) -> None:
    """Refuse the first key of a YAML file that is neither the name of an option of `parser` nor a launch flag. The
    other spellings that an option has on the command line (`--learning-rate`, `--no_x`) are none of its name."""
    dests = {action.dest for action in parser._actions}
    flags, launch_flags = parser._option_string_actions, launch_parser._option_string_actions
    unknown = [key for key in settings if key not in dests and f"--{key}" not in launch_flags]
    if {"compute_environment", "distributed_type"} & {*unknown}:
        raise UserError("the file after --config is an accelerate config: give it with --accelerate_config FILE")
    for key in unknown:
        if f"--{key}" in flags:
            name = flags[f"--{key}"].dest
            meant = f", did you mean {name}?" if key.replace("-", "_") == name else f": write `{name}: false`"
            raise UserError(f"unknown key {key}{meant}")
        refuse_unknown([f"--{key}"], flags, launch_flags)
        raise UserError(f"unknown key {key}: write the name of an option, a colon and its value")  # `beta=0.1: 1`


def require_model_name(name: str | None) -> None:
    if name is None:
        raise UserError("no model given: set model_name_or_path to a local directory or a hub id")


def require_data(name: Any) -> None:
    if not name:
        raise UserError("no dataset given: set dataset_name (a hub id, directory or file) or a list of datasets")
