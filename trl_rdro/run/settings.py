"""
What a run was begun with, kept as JSON in its output directory and in each checkpoint, so that it is not continued as
another run by mistake. Everything that training reads counts, but for the few options in `FREE`.
"""

import dataclasses
import enum
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .completeness import measure
from .data_digest import digest_dataset
from .files import read_json
from .secrets import without_secrets


SETTINGS = "run_settings.json"

FREE_FAMILIES = ("logging_", "log_", "save_", "eval_", "hub_", "trackio_", "ddp_timeout")
FREE = {
    # Where things are written and what is said
    *("output_dir", "report_to", "run_name", "project", "plot", "disable_tqdm", "debug", "skip_memory_metrics"),
    *("include_num_input_tokens_seen", "push_to_hub", "enable_jit_checkpoint"),
    # Evaluation, and which checkpoint is the best
    *("per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
    *("bf16_full_eval", "fp16_full_eval", "do_train", "do_eval", "do_predict"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    # Memory and speed, at the same numbers
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("precompute_ref_batch_size", "torch_empty_cache_steps"),
    # How this process was started
    *("local_rank", "resume_from_checkpoint", "resume_with_changes"),
    "restore_callback_states_from_checkpoint",
}

Settings = dict[str, Any]


def is_free(option: str) -> bool:
    """Whether this training option may differ from those of the run that is continued."""
    return option in FREE or option.startswith(FREE_FAMILIES)


def options_of(args: Any) -> Settings:
    """The training options that count, as JSON knows them."""
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if not is_free(field.name)}
    engine = options.get("deepspeed")
    if isinstance(engine, str) and Path(engine).is_file():
        options["deepspeed"] = read_json(Path(engine))
    return plain(options)


def settings_of(
    args: Any,
    model: Any = None,
    ref_model: Any = None,
    train_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    **others: Any,
) -> Settings:
    """
    What a trainer is given, before it does anything with it.

    Args:
        args: a training configuration.
        model, ref_model: modules, hub ids, directories, or None.
        others: further arguments of a trainer, which do not count.
    """
    settings = {
        **options_of(args),
        "processes": PartialState().num_processes,
        "engine": _engine(args),
        "model": describe_model(model),
        "ref_model": describe_model(ref_model),
        "data": None if train_dataset is None else digest_dataset(train_dataset),
        "tokenizer": _describe_tokenizer(processing_class),
    }
    adapters = getattr(model, "peft_config", None) or {}
    for name, config in {**adapters, "adapter": peft_config, "quantization": quantization_config}.items():
        if config is not None:
            settings |= {f"{name}.{key}": value for key, value in _fields_of(config).items()}
    return settings


def _engine(args: Any) -> str:
    """What shards the training, whether it was asked for by the options or by an accelerate config."""
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None:
        return f"ZeRO-{plugin.zero_stage}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return f"FSDP{os.environ.get('FSDP_VERSION', 1)}"
    return "none"


def _fields_of(config: Any) -> Settings:
    """Of an adapter or a quantisation, but for what its library notes about itself."""
    noted = {"peft_version", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "task_type"}
    return {key: value for key, value in plain(config).items() if key not in noted}


def describe_model(model: Any) -> str | None:
    """A hub id as it is; a directory by its name and a checksum of its weights and texts; a module by its class and a
    checksum of some of each frozen or loaded parameter, but not of a new adapter, which is random."""
    if model is None:
        return None
    if isinstance(model, str | Path):
        return f"{Path(model).name} {_digest_folder(Path(model))}" if Path(model).is_dir() else str(model)
    digest = hashlib.blake2b(digest_size=6)
    is_adapted = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        if not (is_adapted and (parameter.requires_grad or "lora_" in name)):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    inner = model.get_base_model() if is_adapted else model
    return f"{type(inner).__name__} {digest.hexdigest()}"


def _digest_folder(folder: Path) -> str:
    paths = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model")]
    noted = ("training_args.bin", "trainer_state.json", "manifest.json", SETTINGS)
    entries = {path.name: measure(path) for path in paths if path.name not in noted}
    return hashlib.blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=6).hexdigest()


def _describe_tokenizer(processing_class: Any) -> str | None:
    """A given one; the model's own is part of the model."""
    if processing_class is None:
        return None
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    facts = [len(tokenizer), getattr(tokenizer, "chat_template", None), plain(tokenizer.special_tokens_map)]
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6)
    return f"{type(tokenizer).__name__} {digest.hexdigest()}"


def plain(value: Any) -> Any:
    """What JSON makes of a value, without tokens and keys and without what differs from process to process."""
    return json.loads(json.dumps(without_secrets(_as_dict(value)), default=_as_dict))


def _as_dict(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return without_secrets(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return without_secrets({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict | list | tuple | str | int | float | None):
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


# Comparison


def differences(begun: Settings, now: Settings) -> list[str]:
    """Each setting that differs, with its old and its new value. One that only one version of the libraries knows and
    that is at its default is not compared."""
    names = [name for name in now if name in begun or "." in name] + [name for name in begun if "." in name]
    changed = [name for name in dict.fromkeys(names) if _text(begun.get(name)) != _text(now.get(name))]
    return [f"`{name}` {_short(begun.get(name))} (now {_short(now.get(name))})" for name in changed]


def _text(value: Any) -> str:
    # NaN is not equal to itself, and 1 is 1.0 in YAML
    return json.dumps(float(value) if type(value) is int else value, sort_keys=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def refusal(place: str | Path, changed: list[str], advice: str) -> str:
    return f"{place} was begun with {', '.join(changed)}. Set that again, give another `output_dir`, or {advice}."


def read_settings(folder: str | Path) -> Settings | None:
    """What the run or the checkpoint in `folder` was begun with, or None where it does not say."""
    try:
        settings = read_json(Path(folder) / SETTINGS)
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None
