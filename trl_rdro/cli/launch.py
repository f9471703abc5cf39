"""
`trl-rdro dpo` and `trl-rdro kto`: check the arguments here, then train under `accelerate launch`.

The options of `accelerate launch` may stand among the training options, on the command line or in the YAML file.
Parsing builds the configs, so a bad value ends the command before any process is started.
"""

import importlib.resources
import os
import signal
import subprocess
from pathlib import Path

from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import UserError, user_error
from ..run.secrets import HUB_TOKEN_VARIABLE, split_hub_token
from ..run.signals import passing_on_signals
from .launch_settings import check_accelerate_config, check_flags
from .training_options import make_launch_parser, parse


TRAINING_MODULE = "trl_rdro.cli.train"


def without(argv: list[str], removed: list[str]) -> list[str]:
    """`argv` less the tokens of `removed`, which occur in it in this order."""
    removed = list(removed)
    return [token for token in argv if not (removed and token == removed[0] and removed.pop(0))]


def accelerate_config_file(name: str) -> str:
    """The path of an accelerate config given as a file, or as the name of one that TRL ships."""
    if Path(name).is_file():
        return name
    shipped = importlib.resources.files("trl.accelerate_configs")
    names = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir() if file.name.endswith(".yaml"))
    if name not in names:
        raise UserError(f"no accelerate config {name}: give a file, or one of {', '.join(names)}")
    return str(shipped / f"{name}.yaml")


def launch(method: str, argv: list[str]) -> int:
    """Run the training of `method` with the command line `argv` in the processes it asks for."""
    _, launch_flags, launch_argv = parse(method, argv)
    return launch_module(TRAINING_MODULE, [method, *without(argv, launch_argv)], [*launch_flags, *launch_argv])


def launch_module(module: str, module_argv: list[str], launch_argv: list[str]) -> int:
    """Run a module under `accelerate launch`."""
    module_argv, token = split_hub_token(module_argv)
    if token is not None:
        os.environ[HUB_TOKEN_VARIABLE] = token
    parser = make_launch_parser()
    args = parser.parse_args([*launch_argv, "--module", module, *module_argv])
    if args.training_script != module:
        raise UserError(f"unexpected argument {args.training_script}: a YAML file is given with --config FILE")
    check_flags(args, parser._actions)
    if args.accelerate_config is not None:
        args.config_file = accelerate_config_file(args.accelerate_config)
    if args.config_file is not None:
        check_accelerate_config(args.config_file)
    elif os.path.isfile(default_config_file):  # what `accelerate config` has written
        check_accelerate_config(default_config_file)

    # Where a training process fails it has already said why, in a sentence or a traceback.
    returncode = 0
    with passing_on_signals() as received:
        try:
            with user_error(ValueError, OSError, ImportError):
                launch_command(args)
        except SignalException as error:  # the launcher of several processes, which has ended them
            received.append(error.sigval)
        except subprocess.CalledProcessError as error:
            returncode = error.returncode
        except ChildFailedError as error:
            returncode = error.get_first_failure()[1].exitcode
    return 128 + received[0] if received else exit_code(returncode)


def exit_code(returncode: int) -> int:
    """The exit code for a failed process, after saying so if it was killed and could not say anything itself."""
    if returncode >= 0:
        return returncode
    killed_by = signal.Signals(-returncode).name
    hint = ", most likely for lack of memory" if killed_by == "SIGKILL" else ""
    raise UserError(f"the training process was ended by {killed_by}{hint}")
