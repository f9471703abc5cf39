"""
`trl-rdro dpo` and `trl-rdro kto`: check the arguments here, then train under `accelerate launch`.

The options of `accelerate launch` may stand among the training options, on the command line or in the YAML file.
Parsing builds the configs, so a bad value ends the command before any process is started.
"""

import argparse
import importlib.resources
import os
import signal
import subprocess
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import UserError, user_error
from ..log import get_logger
from ..run.search_path import without_working_directory
from ..run.secrets import HUB_TOKEN_VARIABLE, split_hub_token
from ..run.signals import passing_on_signals
from .launch_settings import check_accelerate_config, check_flags
from .training_options import make_launch_parser, parse


logger = get_logger(__name__)

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
    with user_error(ValueError, OSError):
        args.training_script_args += settle_processes(args)

    # Where a training process fails it has already said why, in a sentence or a traceback.
    returncode = 0
    with passing_on_signals() as received:
        try:
            with without_working_directory(), user_error(ValueError, OSError, ImportError):
                launch_command(args)
        except SignalException as error:  # the launcher of several processes, which has ended them
            received.append(error.sigval)
        except subprocess.CalledProcessError as error:
            returncode = error.returncode
        except ChildFailedError as error:
            returncode = error.get_first_failure()[1].exitcode
    return 128 + received[0] if received else exit_code(returncode)


def settle_processes(args: argparse.Namespace) -> list[str]:
    """
    Say to `accelerate launch` what it would guess and list in six lines, and have it start as many processes as are
    asked for: with `--cpu`, with one device or with a config for one it starts a single process without a word.

    Returns:
        Options for the training command.
    """
    devices = torch.accelerator.device_count()
    on_cpu, options = args.cpu or devices == 0, []
    if args.config_file is None and (args.cpu or not os.path.isfile(default_config_file)):
        config, is_set = None, args.num_processes is not None
        args.num_processes = args.num_processes or (1 if on_cpu else devices)
        args.num_machines, args.mixed_precision = args.num_machines or 1, args.mixed_precision or "no"
        args.dynamo_backend = args.dynamo_backend or "no"
    else:
        config, is_set = load_config_from_file(args.config_file), True
    processes = args.num_processes or (1 if config is None else config.num_processes)
    has_launcher = config is not None and config.distributed_type not in (None, DistributedType.NO)
    launchers = ("multi_gpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "tpu", "mpirun_hostfile")
    if processes > 1 and not has_launcher and not any(getattr(args, name) for name in launchers):
        if not on_cpu and devices < processes and (args.num_machines or 1) == 1:
            raise UserError(f"--num_processes {processes} is more than the {devices} of this machine's devices")
        if not is_set:
            logger.info(f"{processes} processes, one for each device; --num_processes 1 starts one.")
        options = ["--use_cpu"] if args.cpu else []
        args.multi_gpu, args.cpu = True, False  # the launcher of several, on CPUs too
    if on_cpu and args.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        args.num_cpu_threads_per_process = max((psutil.cpu_count(logical=False) or 1) // max(processes, 1), 1)
    return options


def exit_code(returncode: int) -> int:
    """The exit code for a failed process, after saying so if it was killed and could not say anything itself."""
    if returncode >= 0:
        return returncode
    killed_by = signal.Signals(-returncode).name
    hint = ", most likely for lack of memory" if killed_by == "SIGKILL" else ""
    raise UserError(f"the training process was ended by {killed_by}{hint}")
