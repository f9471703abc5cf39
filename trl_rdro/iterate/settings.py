"""What a run was begun with, so that two runs are not mixed in one directory."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..log import get_logger
from ..run.files import Row, read_json
from ..run.settings import differences, plain, refusal, settings_of
from .config import IterateConfig
from .judges import Judge
from .prompts import Prompt


logger = get_logger(__name__)

# May differ from the run that is continued; the model is told apart by its content
FREE_SETTINGS = {"rounds", "keep_rounds", "sample_only", "model_name_or_path", "vllm_gpu_memory_utilization"}


def check_settings(
    path: Path, config: IterateConfig, args: Any, model_args: Any, judge: Judge, prompts: list[Prompt]
) -> Row:
    """Returns what this run is begun with; a `UserError` if the file at `path` says that another one was."""
    fields = plain(asdict(config) | asdict(model_args))
    settings = {key: value for key, value in fields.items() if key not in FREE_SETTINGS}
    settings |= settings_of(args, model=model_args.model_name_or_path)
    settings |= {"prompts": _fingerprint(prompts), "judge": judge.source()}
    changed = differences(read_json(path), settings) if path.exists() else []
    if changed and not args.resume_with_changes:
        raise UserError(refusal(path.parent, changed, "accept the change with `resume_with_changes=True`"))
    if changed:
        logger.warning(f"{path.parent} was begun with {', '.join(changed)}, and goes on with the new settings.")
    return settings


def require_last_model(root: Path, folder: Path, config: IterateConfig) -> None:
    """With fewer rounds than there are, the model of the last of them (in `folder`) may have been dropped."""
    if (folder / "report.json").exists() and not (folder / "model").exists():
        done = len(list(root.glob("round_*/report.json")))
        raise UserError(
            f"`rounds={config.rounds}`, but {root} has {done}, and the model of round {config.rounds} was dropped "
            f"(`keep_rounds={config.keep_rounds}`). Set `rounds` to {done} or more."
        )


def _fingerprint(prompts: list[Prompt]) -> str:
    """Short, and different for other prompts."""
    digest = hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
    return f"{len(prompts)} prompts, {digest[:12]}"
