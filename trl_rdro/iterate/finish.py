"""The end of a round, and of a run: what is kept of it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..log import get_logger
from .config import IterateConfig
from .files import partial, write_json
from .report import Figures, best_round
from .report_plot import draw_report


logger = get_logger(__name__)

# Too large to be kept for ever; the rest of a round is a few kilobytes
BULKY = ("samples.jsonl", "judged.jsonl", "train.jsonl", "monitor.jsonl", "model")


def prune(folders: Sequence[Path], reports: list[Figures], keep_rounds: int | None) -> None:
    """Drop what is bulky in rounds that are neither among the last `keep_rounds` nor the best one."""
    if keep_rounds is None:
        return
    kept = {best_round(reports), *range(len(reports) - keep_rounds, len(reports))}
    for number in set(range(len(reports))) - kept:
        for name in BULKY:
            path = folders[number] / name
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)


def result_of(base: Figures, reports: list[Figures], config: IterateConfig) -> Figures:
    """The figures of a whole run, and which round's model is its result."""
    best, has_stopped = best_round(reports), reports[-1]["below_floor"]
    return {
        "base": base,
        "rounds": reports,
        "best_round": best,
        "final_round": best if has_stopped else reports[-1]["round"],
        "stopped": has_stopped,
        "entropy_floor": config.entropy_floor,
    }


def write_result(root: Path, result: Figures, model: Path) -> None:
    """Leave the final model, the report and its curves in the run's directory."""
    final = root / "final"
    shutil.rmtree(partial(final), ignore_errors=True)
    shutil.copytree(model, partial(final))
    shutil.rmtree(final, ignore_errors=True)
    partial(final).rename(final)
    write_json(root / "report.json", result)
    if not draw_report(result, root / "iterate.png"):
        logger.info("No figure: matplotlib is not installed (`pip install 'trl-rdro[plot]'`).")
