"""
The log history of a run, from what every run leaves on disk.

A run's `trainer_state.json` has it. A finished run has one in its directory, an unfinished one in its checkpoints; the
one that got furthest is taken.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError, user_error


STATE = "trainer_state.json"


def is_number(value: Any) -> bool:
    """Whether a logged value can be drawn: a float, or a whole number that one can hold."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) or (is_whole and abs(value) < 2**63)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a trainer. Raises `UserError` for a file that is none, or whose log cannot be drawn."""
    with user_error(OSError, ValueError, RecursionError, prefix=f"cannot read {path}: "):
        state = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise UserError(f"{path} is not the state of a trainer: it has no log_history")
    if not is_number(state.get("global_step", 0)):
        raise UserError(f"{path} is not the state of a trainer: its global_step is {state['global_step']!r}")
    for number, entry in enumerate(state["log_history"]):
        if not isinstance(entry, dict) or not is_number(entry.get("step")):
            raise UserError(f"{path}: entry {number} of its log_history is not a mapping with a number for `step`")
    return state


def log_history(run: str) -> list[dict]:
    """The log history of a run: of its end, or of its last complete checkpoint where that is further."""
    directory = Path(run)
    if not os.path.isdir(run):
        raise UserError(f"no such directory: {run}")
    states = [read_state(directory / STATE)] if (directory / STATE).exists() else []
    reached = states[0].get("global_step", 0) if states else -1
    numbers = [path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*")]
    if any(number.isdigit() and int(number) > reached for number in numbers):
        from ..trainers.safeguards import last_complete_checkpoint

        if checkpoint := last_complete_checkpoint(run):
            states.append(read_state(Path(checkpoint) / STATE))
    if not states:
        raise UserError(f"no {STATE} in {run} or in a complete checkpoint there: is it the output_dir of a run?")
    return max(states, key=lambda state: state.get("global_step", 0))["log_history"]


def labels(runs: Iterable[str]) -> list[str]:
    """A name for each run: the last part of its path, or the path itself where two runs share that."""
    runs = list(runs)
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    return [run if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
