"""Fields about a run as a whole, which all our configurations share."""

import importlib.util
from dataclasses import dataclass, field

from .validation import require_sane_numbers


@dataclass
class RunConfig:
    """
    Fields of the command line's training run.

    Parameters:
        plot (`bool`, *optional*, defaults to `False`):
            Draw the run's curves to `curves.png` in `output_dir` at the end of a run of `trl-rdro dpo` or `trl-rdro
            kto`. Needs matplotlib. `trl-rdro plot` draws the same later.
    """

    plot: bool = field(
        default=False,
        metadata={"help": "Draw the run's curves to `curves.png` in `output_dir` at its end. Needs matplotlib."},
    )

    def _validate_run(self) -> None:
        require_sane_numbers(self)
        if not isinstance(self.plot, bool):
            raise ValueError(f"`plot` must be True or False, got {self.plot!r}.")
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("`plot=True` needs matplotlib: `pip install 'trl-rdro[plot]'`, or set `plot=False`.")
