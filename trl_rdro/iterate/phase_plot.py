"""The regimes of iterated training over a and b lam as a PNG; see `trl_rdro.iterate.dynamics`."""

from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .dynamics import REGIMES


COLOURS = ("#d5e8d4", "#f8cecc", "#dae8fc")  # in the order of `REGIMES`


def plot_phase_diagram(
    diagram: dict[str, np.ndarray],
    a: np.ndarray,
    b_lam: np.ndarray,
    path: str | Path,
    here: tuple[float, float] | None = None,
) -> Path:
    """
    Draw the regimes, and the line up to which the sufficient condition holds.

    Args:
        diagram: of `dynamics.phase_diagram` for these `a` and `b_lam`.
        path: the PNG to write.
        here: (a, b lam) to mark.

    Returns:
        `Path`: the file written.
    """
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    last = len(REGIMES) - 1
    axes.pcolormesh(a, b_lam, diagram["regime"], cmap=ListedColormap(COLOURS), vmin=0, vmax=last, shading="nearest")
    axes.contour(a, b_lam, diagram["margin"], levels=[0], colors="black", linestyles="--")
    legend: list[Artist] = [Patch(color=colour, label=name) for name, colour in zip(REGIMES, COLOURS, strict=True)]
    legend.append(Line2D([], [], color="black", linestyle="--", label="margin 0"))
    if here is not None:
        legend += axes.plot(*here, "k*", markersize=11, label="this loop", linestyle="", clip_on=False)
    axes.set(xlabel="a: how far the reference follows", ylabel="b lam: step times share of own answers")
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), fontsize="small", frameon=False)
    path = Path(path)
    FigureCanvasAgg(figure).print_png(path)
    return path
