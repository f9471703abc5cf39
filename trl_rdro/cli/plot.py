"""
`trl-rdro plot`: the curves of one or several runs as a PNG, from what every run leaves on disk.

A run's `trainer_state.json` has its log history. A finished run has one in its directory, an unfinished one in its
checkpoints; the one that got furthest is taken.
"""

import argparse
import importlib.util
import json
from pathlib import Path

from .errors import UserError, user_error


STATE = "trainer_state.json"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-rdro plot",
        description="Draw the curves of one or several runs: loss, preference accuracy, drift of chosen and rejected "
        "completions from the reference, gradient norm, and the losses' own metrics. Lines are training, dots are "
        "evaluations. `plot: true` in a recipe does it at the end of a run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", metavar="RUN_DIR", nargs="+", help="output directory of a run (finished or not), or one checkpoint"
    )
    parser.add_argument("--output", default="curves.png", help="the PNG to write (default: curves.png)")
    return parser


def read_state(path: Path) -> dict:
    with user_error(OSError, ValueError, prefix=f"cannot read {path}: "):
        state = json.loads(path.read_text())
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise UserError(f"{path} is not the state of a trainer: it has no log_history")
    return state


def log_history(run: str) -> list[dict]:
    """The log history of a run: of its end, or of its last complete checkpoint where that is further."""
    directory = Path(run)
    if not directory.is_dir():
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


def labels(runs: list[str]) -> list[str]:
    """A name for each run: the last part of its path, or the path itself where two runs share that."""
    names = [Path(run).resolve().name for run in runs]
    return [run if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'trl-rdro[plot]'")
    if Path(args.output).suffix.lower() != ".png":
        raise UserError(f"the output is a PNG: give --output a name that ends in .png, not {args.output}")
    histories = dict(zip(labels(args.runs), map(log_history, args.runs), strict=False))

    from ..tools.plotting import MORE_PANELS, PANELS, logged_metrics, plot_run

    drawable = {metric for metrics in (PANELS | MORE_PANELS).values() for metric in metrics}
    for name, history in histories.items():
        if not logged_metrics(history) & drawable:
            raise UserError(f"{name} has logged nothing to draw: it may have ended before its first logging_steps")
    with user_error(OSError):
        print(plot_run(histories if len(histories) > 1 else next(iter(histories.values())), args.output))
    return 0
