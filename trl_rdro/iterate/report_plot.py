"""The curves of a run, from its reports."""

import importlib.util
from pathlib import Path

from .report import Figures


# Title, and the figures of each panel
PANELS = {
    "reward": ("reward",),
    "win rate against the start": ("win_rate",),
    "entropy (nats per completion)": ("entropy",),
    "distance (nats)": ("distance_to_base", "distance_to_previous", "distance_to_two_rounds_ago"),
    "stability margin (negative: may be unstable)": ("margin",),
    "largest norm of P - 1/2": ("preference_norm",),
}


def draw_report(result: Figures, path: Path) -> bool:
    """Draw the curves of a run, or do nothing without matplotlib. Returns whether they were drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 7.2), layout="constrained")
    points = [{**result["base"], "round": -1}, *result["rounds"]]
    for axes, (title, names) in zip(figure.subplots(2, 3).ravel(), PANELS.items(), strict=True):
        for name in names:
            found = [(point["round"] + 1, point[name]) for point in points if point.get(name) is not None]
            if not found:
                continue
            rounds, values = zip(*found, strict=True)
            if isinstance(values[0], dict):
                heights = [value["largest" if "largest" in value else "mean"] for value in values]
                errors = [value.get("standard_error", 0.0) for value in values]
            else:
                heights, errors = list(values), [0.0] * len(values)
            label = name.replace("distance_", "").replace("_", " ")
            axes.errorbar(rounds, heights, yerr=errors, marker="o", capsize=3, label=label)
        if title.startswith("entropy"):
            floor = result["entropy_floor"] * result["base"]["entropy"]["mean"]
            axes.axhline(floor, color="0.5", linestyle="--", label="floor")
        axes.set(title=title, xlabel="rounds of training")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not known", ha="center", va="center", transform=axes.transAxes)
    FigureCanvasAgg(figure).print_png(path)
    return True
