"""Fields whose values are structures: mappings with keys of their own, files of them, and texts of several words.

accelerate, DeepSpeed, PyTorch and transformers read them, once the model is loaded or in the first step; a key that
they do not know is passed over in silence or ends in a `TypeError`. Each check raises `ValueError` with one sentence.
"""

import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.utils import DynamoBackend, GradientAccumulationPlugin
from accelerate.utils.constants import FSDP2_STATE_DICT_TYPE, FSDP_AUTO_WRAP_POLICY, FSDP_STATE_DICT_TYPE
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption

from ..log import get_logger
from .choices import require_choice
from .validation import Range, alternatives, require


logger = get_logger(__name__)

LARGEST = 10_000_000  # bytes of a file of options
COUNT, NOT_NEGATIVE = Range("[1, inf)"), Range("[0, inf)")

# Keys of `fsdp_config`, as transformers documents them, with their types
FSDP_KEYS: dict[str, Any] = {
    "version": int,
    "reshard_after_forward": bool | str,
    "cpu_offload": bool,
    "activation_checkpointing": bool,
    "cpu_ram_efficient_loading": bool,
    "sync_module_states": bool,
    "use_orig_params": bool,
    "limit_all_gathers": bool,
    "forward_prefetch": bool | str,
    "backward_prefetch": str,
    "state_dict_type": str,
    "auto_wrap_policy": str,
    "transformer_layer_cls_to_wrap": str | list[str] | None,
    "min_num_params": int,
    "xla": bool,
    "xla_fsdp_v2": bool,
    "xla_fsdp_settings": dict,
    "xla_fsdp_grad_ckpt": bool,
}
FSDP_CHOICES = {
    "auto_wrap_policy": FSDP_AUTO_WRAP_POLICY,
    "state_dict_type": [*dict.fromkeys([*FSDP2_STATE_DICT_TYPE, *FSDP_STATE_DICT_TYPE])],
}
# Of `torch.utils.checkpoint.checkpoint`; its `context_fn` is a function, which no file has
CHECKPOINTING_KEYS: dict[str, Any] = {
    "use_reentrant": bool,
    "preserve_rng_state": bool,
    "determinism_check": str,
    "debug": bool,
    "early_stop": bool,
    "context_fn": object,
}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FILES_OF_OPTIONS = ("accelerator_config", "fsdp_config", "deepspeed")  # text is JSON, or the name of a file of it


def validate_structures(config: Any) -> None:
    """Check the fields of a training configuration that are structures. Raises `ValueError` for the first one."""
    for name in [field.name for field in dataclasses.fields(config) if field.name.endswith("_kwargs")]:
        read_mapping(name, getattr(config, name))
    _check_accelerator(read_mapping("accelerator_config", config.accelerator_config))
    _check_fsdp(read_mapping("fsdp_config", config.fsdp_config), config)
    _check_deepspeed(read_mapping("deepspeed", config.deepspeed))
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        settings = read_mapping(name, getattr(config, name, None))
        require_keys(name, settings, CHECKPOINTING_KEYS)
        if "determinism_check" in settings:
            require_choice(f"{name}.determinism_check", settings["determinism_check"], ("default", "none"))
    _check_words("debug", config.debug, [option.value for option in DebugOption])
    _check_words("fsdp", config.fsdp, ["true", "false", *(option.value for option in FSDPOption)])
    _check_words("include_for_metrics", config.include_for_metrics, ["inputs", "loss"])
    _check_optim_args(config.optim_args)
    if config.torch_compile_mode is not None:
        require_choice("torch_compile_mode", config.torch_compile_mode, COMPILE_MODES)
    if config.torch_compile_backend is not None:
        backends = [backend.value.lower() for backend in DynamoBackend]
        require_choice("torch_compile_backend", config.torch_compile_backend.lower(), backends)


def read_mapping(name: str, value: Any) -> Mapping[str, Any]:
    """The mapping that a field holds as it is, as JSON text or as the name of a file; empty for None."""
    if value is None:
        return {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, str | os.PathLike):
        value = _parsed(name, os.fspath(value))
    if odd := [key for key in value if not isinstance(key, str)]:
        raise ValueError(f"`{name}` must have text for keys, got the key {odd[0]!r}. Correct it.")
    return value


def _parsed(name: str, text: str) -> Mapping[str, Any]:
    origin = "as JSON text" if name not in FILES_OF_OPTIONS else "as JSON text or a file"
    source = text
    if name in FILES_OF_OPTIONS and not text.startswith("{"):
        try:
            if not os.path.isfile(text):
                raise ValueError(
                    f"`{name}` must be a mapping, JSON text or a file, got {text!r}, which is no file here. Correct "
                    "the name or leave it None."
                )
            with open(text, encoding="utf-8") as file:
                source = file.read(LARGEST)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"`{name}` is the file {text!r}, which cannot be read ({error}). Correct it.") from error
    try:
        parsed = json.loads(source)
    except (ValueError, RecursionError) as error:
        parsed = error
    if not isinstance(parsed, dict):
        why = f" ({parsed})" if isinstance(parsed, Exception) else ""
        raise ValueError(
            f"`{name}` must be a mapping, or one {origin}, got {text!r}{why}. As text it is written "
            "'{\"name\": value}'."
        )
    return parsed


def require_keys(
    name: str,
    settings: Mapping[str, Any],
    kinds: Mapping[str, Any],
    ranges: Mapping[str, Range] = {},  # noqa: B006  # only read
    choices: Mapping[str, Iterable[str]] = {},  # noqa: B006
) -> None:
    """Refuse keys that are not among `kinds`, and values of other types, outside of their range or not listed."""
    for key, value in settings.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`{name}` has no key {key!r}.{hint} It has {', '.join(kinds)}.")
        if kinds[key] is object:
            continue
        if key in choices:
            require_choice(f"{name}.{key}", value, list(choices[key]))
        else:
            require(f"{name}.{key}", value, alternatives(kinds[key]), ranges.get(key, NOT_NEGATIVE))


def _check_accelerator(settings: Mapping[str, Any]) -> None:
    name, hints = "accelerator_config", typing.get_type_hints(AcceleratorConfig)
    require_keys(name, settings, hints)
    accumulation = settings.get("gradient_accumulation_kwargs") or {}
    kinds = typing.get_type_hints(GradientAccumulationPlugin)
    require_keys(f"{name}.gradient_accumulation_kwargs", accumulation, kinds, {"num_steps": COUNT})


def _check_fsdp(settings: Mapping[str, Any], config: Any) -> None:
    settings = {key.removeprefix("fsdp_"): value for key, value in settings.items()}
    require_keys("fsdp_config", settings, FSDP_KEYS, choices=FSDP_CHOICES)
    if settings.get("version", 2) not in (1, 2):
        raise ValueError(f"`fsdp_config.version` must be 1 or 2, got {settings['version']!r}. Remove it for 2.")
    if settings and not config.fsdp:
        logger.warning("`fsdp_config` has no effect without `fsdp=True`.")


def _check_deepspeed(settings: Mapping[str, Any]) -> None:
    """The part that decides what is sharded; DeepSpeed's other hundred options are its own to check."""
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f"`deepspeed.zero_optimization` must be a mapping, got {zero!r}. Write {{'stage': 2}}.")
    if "stage" in zero and (isinstance(zero["stage"], bool) or zero["stage"] not in (0, 1, 2, 3)):
        raise ValueError(f"`deepspeed.zero_optimization.stage` must be 0, 1, 2 or 3, got {zero['stage']!r}.")
    for part in ("offload_optimizer", "offload_param"):
        device = zero[part].get("device", "none") if isinstance(zero.get(part), Mapping) else "none"
        require_choice(f"deepspeed.zero_optimization.{part}.device", device, ("none", "cpu", "nvme"))


def _check_words(name: str, value: Any, words: list[str]) -> None:
    """A text of words, or a list of them."""
    for word in value.split() if isinstance(value, str) else value if isinstance(value, list) else []:
        require_choice(name, getattr(word, "value", word), words)


def _check_optim_args(value: str | None) -> None:
    for part in value.replace(" ", "").split(",") if value else []:
        key, equals, number = part.partition("=")
        if not (key and equals and number) or "=" in number:
            raise ValueError(
                f"`optim_args` must be text of the form 'name=value,name=value', got {value!r}. Write it so, for "
                "example 'momentum=0.9', or leave it None."
            )
