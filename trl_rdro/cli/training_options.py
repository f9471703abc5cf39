"""
The options of a training run, from the command line and a YAML file.

It takes the flags and the YAML format of TRL's own scripts, with this package's configs. It is stricter: TRL ignores
what it does not know and takes over whatever value a file holds, and here a misspelt key or a value of another kind
ends the run before anything is loaded.
"""

import os
from typing import Any

from accelerate.commands.launch import launch_command_parser
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

import trl_rdro

from ..configs.choices import require_choice
from ..configs.ranges import RANGES
from ..configs.validation import validate_fields
from ..errors import UserError, user_error
from ..tools.yaml_files import read_yaml
from .field_values import converted, field_hints, require_mappings
from .option_table import refuse_unknown, refuse_unknown_keys, require_data, require_model_name
from .parsing import Parser, SentenceErrors, take_config


class TrainingParser(SentenceErrors, TrlParser):
    """TRL's parser of dataclasses, without abbreviations: with them a misspelt option or a flag of `accelerate launch`
    could pass for one of ours."""

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)


def make_parser(method: str) -> TrainingParser:
    """The parser of `trl-rdro <method>`; also what any other command needs to read a training YAML."""
    return TrainingParser(
        (ScriptArguments, getattr(trl_rdro, f"{method.upper()}Config"), ModelConfig, DatasetMixtureConfig),
        prog=f"trl-rdro {method}",
        usage="%(prog)s [--config FILE] [--accelerate_config NAME_OR_FILE] [--OPTION VALUE ...]",
        description="Train with TRL's options and ours. FILE is a YAML file of any of them, which the command line "
        "overrides. NAME_OR_FILE is an accelerate config: your own, or one that TRL ships (single_gpu, multi_gpu, "
        "zero1, zero2, zero3, fsdp1, fsdp2). The options of `accelerate launch` may be given too, in either place.",
    )


def make_launch_parser() -> Parser:
    """The parser of `accelerate launch`, plus `--accelerate_config`."""
    parser = Parser(parents=[launch_command_parser()], add_help=False)
    parser.add_argument("--accelerate_config", "--accelerate-config")
    return parser


def parse_strictly(parser: TrainingParser, argv: list[str]) -> tuple[list, list[str], list[str]]:
    """
    Parse the command line and its YAML file, and refuse what neither `parser` nor `accelerate launch` knows.

    Returns:
        What `parser` makes of it; the launch flags found in the YAML file; and those found on the command line (in
        their order there).
    """
    file, argv = take_config(argv)
    settings = {} if file is None else read_yaml(file)
    launch_parser = make_launch_parser()
    hints = field_hints(parser.dataclass_types)
    refuse_unknown_keys((name for name in settings if name != "env"), parser, launch_parser)
    settings = {name: converted(name, settings[name], hints.get(name, Any)) for name in settings}
    _set_environment(settings.pop("env", {}))
    from_file = parser.set_defaults_with_config(**settings)
    launch_actions = launch_parser._option_string_actions
    options = [token for token in parser.parse_known_args(argv)[1] if token.startswith("--")]
    refuse_unknown(options, parser._option_string_actions, launch_actions)
    with user_error(ValueError, TypeError, OSError, ImportError):
        for action in parser._actions:
            if action.dest in settings and action.choices is not None:  # argparse does not look at defaults
                value = settings[action.dest]
                for item in value if isinstance(value, list) else [value]:
                    require_choice(action.dest, item, list(action.choices))
        *parsed, from_command_line = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        require_mappings(parsed)
        for arguments in parsed:
            validate_fields(arguments, RANGES)

    # A switch in YAML is a boolean, on the command line it stands alone.
    launch_flags = []
    for option, value in zip(from_file[::2], from_file[1::2], strict=True):
        if launch_actions[option].nargs != 0:
            launch_flags += [option, value]
        elif value == "True":
            launch_flags += [option]
        elif value != "False":
            raise UserError(f"{option} is a switch: it must be true or false, got {value!r}")
    return parsed, launch_flags, from_command_line


def _set_environment(variables: Any) -> None:
    """Set the environment variables of a YAML file, as TRL does."""
    if not isinstance(variables, dict) or any(isinstance(value, (dict, list)) for value in variables.values()):
        raise UserError(f"`env` must be a mapping of environment variables to their values, got {variables!r}")
    with user_error(ValueError, prefix="`env` holds what cannot be an environment variable: "):
        os.environ.update({str(name): str(value) for name, value in variables.items()})


def parse(method: str, argv: list[str]) -> tuple[tuple, list[str], list[str]]:
    """
    Parse the command line and its YAML file for a training run.

    Returns:
        The script, training, model and dataset arguments; and the launch flags of `parse_strictly`.
    """
    parsed, launch_flags, from_command_line = parse_strictly(make_parser(method), argv)
    script_args, training_args, model_args, dataset_args = parsed
    refuse_stray(from_command_line)
    require_model_name(model_args.model_name_or_path)
    require_data(script_args.dataset_name or dataset_args.datasets)
    return (script_args, training_args, model_args, dataset_args), launch_flags, from_command_line


def refuse_launch_flags(unused: list[str]) -> None:
    """Refuse flags of `accelerate launch` where nothing is launched any more: in a process that was."""
    if unused:
        raise UserError(f"{unused[0]} is not an option of the script: flags of `accelerate launch` go before its name")


def refuse_stray(unused: list[str]) -> None:
    """Refuse what is no option, where flags of `accelerate launch` may stand and mean nothing."""
    if unused and not unused[0].startswith("--"):
        raise UserError(f"unexpected argument {unused[0]}: a YAML file is given with --config FILE")
