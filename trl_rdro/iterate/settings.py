"""What a run was begun with, so that two runs are not mixed in one directory."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from .config import IterateConfig
from .files import Row, read_json
from .prompts import Prompt


# May differ from the run that is continued
FREE_SETTINGS = {"rounds", "keep_rounds"}
TRAINING_SETTINGS = (
    *("loss_type", "beta", "learning_rate", "seed", "max_steps", "num_train_epochs", "max_length"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)


def check_settings(path: Path, config: IterateConfig, args: Any, model_args: Any, prompts: list[Prompt]) -> Row:
    """Returns what this run is begun with; a `UserError` if the file at `path` says that another one was."""
    settings = {key: value for key, value in asdict(config).items() if key not in FREE_SETTINGS}
    settings |= {name: getattr(args, name) for name in TRAINING_SETTINGS}
    settings |= {"model": model_args.model_name_or_path, "prompts": _fingerprint(prompts)}
    begun = read_json(path) if path.exists() else settings
    if changed := sorted(key for key in settings if settings[key] != begun.get(key)):
        before = ", ".join(f"{key}={begun.get(key)!r}" for key in changed)
        raise UserError(f"{path.parent} was begun with {before}. Set that again, or give another `output_dir`.")
    return settings


def _fingerprint(prompts: list[Prompt]) -> str:
    """Short, and different for other prompts."""
    digest = hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
    return f"{len(prompts)} prompts, {digest[:12]}"
