"""
What `accelerate launch` is told, by flags and by an accelerate config, checked before a process is started.

accelerate hands most of it on as environment variables: a word that it does not know is found by each of the processes
that it starts, in a traceback, or by none.
"""

import argparse
import difflib
import os
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType, DynamoBackend, PrecisionType
from accelerate.utils.constants import (
    DEEPSPEED_MULTINODE_LAUNCHERS,
    FSDP_AUTO_WRAP_POLICY,
    FSDP_BACKWARD_PREFETCH,
    FSDP_SHARDING_STRATEGY,
    FSDP_STATE_DICT_TYPE,
)

from ..configs.choices import require_choice
from ..configs.validation import Range, alternatives, require
from ..errors import UserError, user_error
from ..tools.yaml_files import read_yaml


DEVICES = ("none", "cpu", "nvme")
# By the names of the flags; a config's sections hold the same ones
CHOICES: dict[str, tuple[str, ...]] = {
    "mixed_precision": tuple(PrecisionType.list()),
    "dynamo_backend": tuple(backend.lower() for backend in DynamoBackend.list()),
    "zero_stage": ("0", "1", "2", "3"),
    "offload_optimizer_device": DEVICES,
    "offload_param_device": DEVICES,
    "deepspeed_multinode_launcher": tuple(DEEPSPEED_MULTINODE_LAUNCHERS),
    "fsdp_version": ("1", "2"),
    "fsdp_auto_wrap_policy": tuple(FSDP_AUTO_WRAP_POLICY),
    "fsdp_backward_prefetch": tuple(FSDP_BACKWARD_PREFETCH),
    "fsdp_state_dict_type": tuple(FSDP_STATE_DICT_TYPE),
    "fsdp_sharding_strategy": (*FSDP_SHARDING_STRATEGY, *map(str, range(1, len(FSDP_SHARDING_STRATEGY) + 1))),
    "fsdp_reshard_after_forward": (*FSDP_SHARDING_STRATEGY, "true", "false"),
    "compute_environment": tuple(environment.value for environment in ComputeEnvironment),
    "distributed_type": tuple(kind.value for kind in DistributedType),
}
COUNT = Range("[1, inf)")
RANGES = {
    **dict.fromkeys(("num_machines", "num_cpu_threads_per_process", "gradient_accumulation_steps"), COUNT),
    "num_processes": Range("[1, inf)", also=-1),  # accelerate's own for "not given"
    **dict.fromkeys(("machine_rank", "max_restarts", "gradient_clipping"), Range("[0, inf)")),
    "main_process_port": Range("[0, 65535]"),
    "monitor_interval": Range("(0, inf)"),
    "fsdp_min_num_params": Range("[0, inf)"),
}
ANYTHING = Range("(-inf, inf)")
# Sections of a config, and what their keys begin with among the flags
SECTIONS = {
    "deepspeed_config": "",
    "fsdp_config": "fsdp_",
    "fp8_config": "fp8_",
    "dynamo_config": "dynamo_",
    "megatron_lm_config": "megatron_lm_",
    "mpirun_config": "mpirun_",
    "parallelism_config": "parallelism_config_",
}
# Keys that accelerate reads and has no flag of the name for
WITHOUT_FLAG = {"mpirun_ccl", "fsdp_transformer_layer_cls_to_wrap", "megatron_lm_other_args"}
SWITCHES = {
    *("downcast_bf16", "debug", "use_cpu", "same_network", "enable_cpu_affinity", "tpu_use_cluster", "tpu_use_sudo"),
    *("zero3_init_flag", "zero3_save_16bit_model"),
}
AUTO = ("gradient_accumulation_steps", "gradient_clipping")  # may be DeepSpeed's "auto" too
TRUTHS = ("true", "false", "yes", "no", "1", "0")


def check_flags(args: argparse.Namespace, flags: Iterable[argparse.Action]) -> None:
    """Refuse flags of `accelerate launch` with a value that no process could be started with."""
    with user_error(ValueError):
        for flag in flags:
            value = getattr(args, flag.dest, None)
            if value is not None and value != flag.default:
                _check_value(f"--{flag.dest}", flag.dest, value, flag)


def check_accelerate_config(path: str) -> dict[str, Any]:
    """The settings of an accelerate config. A `UserError` for one that accelerate itself, or a process that it starts,
    would die of."""
    settings = read_yaml(path)
    hints = typing.get_type_hints(ClusterConfig) | {"dynamo_backend": str, "fp16": bool}
    if settings.get("compute_environment") == ComputeEnvironment.AMAZON_SAGEMAKER.value:
        hints |= typing.get_type_hints(SageMakerConfig)
    flags = {action.dest: action for action in launch_command_parser()._actions}
    with user_error(ValueError, prefix=f"the accelerate config {path}: "):
        for name, value in settings.items():
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                raise UserError(f"the accelerate config {path} has the unknown key {name}" + _did_you_mean(near))
            if value is None:
                continue
            if name in SECTIONS:
                _check_section(name, value, flags)
            elif name in SWITCHES or name in CHOICES:
                _check_value(name, name, value)
            else:
                require(name, value, alternatives(hints[name]), RANGES.get(name, ANYTHING))
        _check_together(settings)
    return settings


def _did_you_mean(near: list[str]) -> str:
    return f", did you mean {near[0]}?" if near else ""


def _check_section(section: str, settings: Any, flags: Mapping[str, argparse.Action]) -> None:
    if not isinstance(settings, Mapping):
        raise ValueError(f"`{section}` must be a mapping, got {settings!r}.")
    prefix = SECTIONS[section]
    for key, value in settings.items():
        flag = key if str(key).startswith(prefix) else f"{prefix}{key}"
        if flag not in flags and flag not in WITHOUT_FLAG:
            known = [name for name in flags if name.startswith(prefix or ("zero", "offload", "grad", "deepspeed"))]
            near = difflib.get_close_matches(flag, known, n=1)
            raise ValueError(f"`{section}` has the unknown key {key!r}{_did_you_mean(near)}")
        if value is None or flag in WITHOUT_FLAG:
            continue
        if isinstance(value, list | dict) and flag != "fp8_override_linear_precision":
            raise ValueError(f"`{section}.{key}` must be a single value, got {value!r}.")
        _check_value(f"{section}.{key}", flag, value, flags[flag])


def _check_value(shown: str, name: str, value: Any, flag: argparse.Action | None = None) -> None:
    """Look at a value by the name of its flag, and by the flag itself for what argparse has not looked at."""
    listed = flag.choices if flag is not None else None
    if name in SWITCHES or (flag is not None and flag.default in ("true", "false") and name not in CHOICES):
        listed = TRUTHS
    if name in CHOICES or listed is not None:
        choices = CHOICES.get(name) or tuple(map(str, listed or ()))
        if value is False and name == "distributed_type":
            return  # a bare `NO`, which is meant
        text = str(value)
        text = next((choice for choice in choices if choice.lower() == text.lower()), text)
        if value is False and "no" in choices and text not in choices:
            raise ValueError(f"`{shown}` is false, as which YAML reads a bare `no`: put it in quotes.")
        require_choice(shown, value if isinstance(value, float) else text, choices)
    elif name in AUTO and value == "auto":
        return
    elif name == "deepspeed_config_file" and not os.path.isfile(value):
        raise ValueError(f"`{shown}` must be a file of DeepSpeed's settings, got {value!r}, which is no file here.")
    elif flag is not None and flag.type in (int, float):
        require(shown, value, (flag.type,), RANGES.get(name, ANYTHING))


def _check_together(settings: Mapping[str, Any]) -> None:
    machines, rank = settings.get("num_machines") or 1, settings.get("machine_rank") or 0
    if rank >= machines:
        raise ValueError(f"`machine_rank` must be below `num_machines={machines}`, got {rank}.")
    if "distributed_type" not in settings:
        kinds = ", ".join(CHOICES["distributed_type"])
        raise ValueError(f"it has no `distributed_type`. Add one of {kinds}.")
