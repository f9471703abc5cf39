"""The options of the training commands, from the parsers themselves: what docs.py writes to `options.json`."""

import argparse
import json
from typing import Any

from trl_rdro.cli import iterate, training_options
from trl_rdro.cli.option_table import LAUNCH, METHODS, installed_versions
from trl_rdro.configs.loss_names import LOSSES_OF


def parsers() -> dict[str, argparse.ArgumentParser]:
    """By the names that `trl_rdro.cli.option_table` has for them."""
    made: dict[str, argparse.ArgumentParser] = {LAUNCH: training_options.make_launch_parser()}
    for method in METHODS:
        made[method] = training_options.make_parser(method)
        made[f"iterate {method}"] = iterate.make_parser(method)
    return made


def row_of(action: argparse.Action) -> dict[str, Any]:
    """What must be known of an option to tell whether it is given rightly."""
    kind = action.type if action.type in (int, float) else None
    row = {
        "flags": list(action.option_strings),
        "dest": action.dest,
        "nargs": action.nargs,
        "type": getattr(kind, "__name__", None),
        "choices": [choice if kind else str(choice) for choice in action.choices] if action.choices else None,
    }
    return {key: value for key, value in row.items() if value is not None or key in ("flags", "dest")}


def option_table() -> str:
    """The table as JSON, an option a line."""
    rows: dict[str, list[str]] = {}
    for name, parser in parsers().items():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                rows.setdefault(json.dumps(row_of(action)), []).append(name)
    lines = [f'  {row[:-1]}, "of": {json.dumps(names)}}}' for row, names in rows.items()]
    versions = json.dumps(installed_versions())
    losses = json.dumps(LOSSES_OF)
    options = ",\n".join(lines)
    return f'{{"versions": {versions},\n"loss_types": {losses},\n"options": [\n{options}\n]}}\n'
