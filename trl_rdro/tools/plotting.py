"""
Curves of a run as a PNG, from the log history that every `transformers` trainer keeps. No tracker needed.

    plot_log_history(trainer.state.log_history, "curves.png")
    plot_log_history({"rdro": history, "ddro": other_history}, "curves.png")
    plot_run({"rdro": history, "ddro": other_history}, "curves.png")  # with panels for all else that was logged
"""

import re
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..losses.types import LOSS_TYPES
from .run_logs import is_number


# Title and, as in the trainers' logs, the metrics of each panel. Those of evaluations have a prefix.
PANELS = {
    "loss": ("loss",),
    "log-ratio to the reference (nats)": ("logratios/chosen", "logratios/rejected"),
    "preference accuracy": ("rewards/accuracies",),
}
# Of the metrics that carry a loss's name: what a panel shows of the loss
LOSS_PANELS = {
    "share beyond the cap": ("capped_chosen", "capped_rejected"),
    "weights in the batch": ("effective_sample_size", "max_weight"),
    "reliability of the labels": ("eta",),
    "input gradient": ("grad_norm",),
    "penalty": ("penalty",),
    "error of the central difference": ("gap",),
}
# Of the metrics that carry a loss's name and something of the data's: what a panel shows, and how their names begin
LABEL_PANELS = {"weights of the groups": "weight_"}
# Drawn by `plot_run` only, where they were logged
MORE_PANELS = {
    "log mean of policy / reference (0: it is the mixture)": (
        "reference/log_normalisation",
        "reference/log_normalisation_recent",
    ),
    "reward (beta times log-ratio)": ("rewards/chosen", "rewards/rejected"),
    "gradient norm": ("grad_norm",),
    **{
        f"{name}: {title}": tuple(f"{name}/{metric}" for metric in metrics)
        for name in LOSS_TYPES
        for title, metrics in LOSS_PANELS.items()
    },
}
COLUMNS = 3
LINE_STYLES = ("-", "--", ":", "-.")  # of a panel's first, second, ... metric
MARKERS = ("o", "s", "^", "D", "v")  # of the first, second, ... evaluation set
LogHistory = list[dict[str, Any]]


def plot_log_history(
    log_history: LogHistory | Mapping[str, LogHistory],
    path: str | Path,
    panels: Mapping[str, tuple[str, ...]] = PANELS,
) -> Path:
    """
    Draw loss, log-ratios of chosen and rejected completions, and preference accuracy over the steps.

    Lines are what was logged in training, dots are evaluations. The log-ratios say where a falling loss comes from:
    chosen completions becoming likelier, rejected ones less likely, or both drifting from the reference.

    Args:
        log_history (`list[dict]` or mapping of `str` to `list[dict]`): `trainer.state.log_history`, or one for each
            label of a legend. A panel shows the metrics that were logged, and says so when there are none.
        path (`str` or `Path`): the PNG to write; its folder is made.
        panels (mapping of `str` to `tuple[str, ...]`): other panels, each a title and its metrics.

    Returns:
        `Path`: the file written.
    """
    histories = log_history if isinstance(log_history, Mapping) else {"": log_history}
    # A figure of its own, not pyplot's: no global state, no display, and nothing to close
    columns = 2 if len(panels) == 4 else min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, (title, metrics) in zip(all_axes, panels.items(), strict=False):
        for index, (label, history) in enumerate(histories.items()):
            for style, metric in zip(cycle(LINE_STYLES), metrics, strict=False):
                colour = f"C{index}" if len(histories) > 1 else f"C{metrics.index(metric)}"
                name = metric.rpartition("/")[2] if len(metrics) > 1 else ""
                _draw(axes, history, metric, colour, style, " ".join(filter(None, (label, name))))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path


def plot_run(log_history: LogHistory | Mapping[str, LogHistory], path: str | Path) -> Path:
    """As `plot_log_history`, with every metric of interest that was logged: also the gradient norm and our losses' own
    metrics, and the rewards where no log-ratios were logged (TRL's losses)."""
    logged = logged_metrics(log_history)
    of_labels = {
        f"{name}: {title}": tuple(sorted(metric for metric in logged if metric.startswith(f"{name}/{start}")))
        for name in LOSS_TYPES
        for title, start in LABEL_PANELS.items()
    }
    panels = {
        title: metrics
        for title, metrics in {**PANELS, **MORE_PANELS, **of_labels}.items()
        if logged & set(metrics) and not (metrics[0] == "rewards/chosen" and "logratios/chosen" in logged)
    }
    return plot_log_history(log_history, path, panels or PANELS)


def is_drawable(log_history: LogHistory) -> bool:
    """Whether a run has logged anything that `plot_run` draws."""
    drawn = {metric for metrics in (PANELS | MORE_PANELS).values() for metric in metrics}
    return bool(logged_metrics(log_history) & drawn)


def logged_metrics(log_history: LogHistory | Mapping[str, LogHistory]) -> set[str]:
    """The metrics in one or several histories, those of evaluations without their prefix."""
    histories = log_history.values() if isinstance(log_history, Mapping) else [log_history]
    return {
        key.removeprefix(prefix)
        for history in histories
        for prefix in _evaluations(history)
        for row in history
        for key, value in row.items()
        if is_number(value)
    }


def _evaluations(history: LogHistory) -> dict[str, str]:
    """The prefixes of evaluation metrics, and what a legend calls them: of one set, and of each of several, which has
    its name in the prefix. Each evaluation logs its `runtime`, which tells a name from the beginning of a metric."""
    found = (re.fullmatch(r"eval_(.+)_runtime", key) for row in history for key in row)
    return {"eval_": "held-out", **{f"eval_{match[1]}_": f"held-out ({match[1]})" for match in found if match}}


def _draw(axes, history: LogHistory, metric: str, colour: str, style: str, label: str) -> None:
    """One metric of one run: a line for training, dots for evaluation."""
    dots: list[tuple[str, str, dict[str, Any]]] = [
        (prefix + metric, name, {"linestyle": "", "marker": marker, "markersize": 6})
        for (prefix, name), marker in zip(_evaluations(history).items(), cycle(MARKERS), strict=False)
    ]
    for key, kind, look in ((metric, "train", {"linestyle": style}), *dots):
        points = [(row["step"], row[key]) for row in history if is_number(row.get(key))]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=f"{label} {kind}".strip(), **look)
