"""Fields about a run as a whole, which all our configurations share."""

import importlib.util
from dataclasses import dataclass, field

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from .choices import require_choice


_NEVER_LISTED = {"azure_ml", "flyte"}  # among the trackers that transformers finds; it does not look for them always


@dataclass
class RunConfig:
    """
    Fields about the run.

    Parameters:
        plot (`bool`, *optional*, defaults to `False`):
            Draw the run's curves to `curves.png` in `output_dir` at the end of a run of `trl-rdro dpo` or `trl-rdro
            kto`. Needs matplotlib. `trl-rdro plot` draws the same later.
        resume_with_changes (`bool`, *optional*, defaults to `False`):
            Resume from a checkpoint that was begun with other settings (another loss, option, model, data set, seed,
            batch size or number of processes), which is otherwise refused.
    """

    plot: bool = field(
        default=False,
        metadata={"help": "Draw the run's curves to `curves.png` in `output_dir` at its end. Needs matplotlib."},
    )
    resume_with_changes: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint that was begun with other settings (another loss, option, model, data "
            "set, seed, batch size or number of processes), which is otherwise refused."
        },
    )

    def _validate_run(self) -> None:
        self._name_checkpointing()
        self._validate_trackers(vars(self)["report_to"])  # TRL's field
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("`plot=True` needs matplotlib: `pip install 'trl-rdro[plot]'`, or set `plot=False`.")
        if vars(self)["use_liger_kernel"] and not is_liger_kernel_available():  # transformers' field
            raise ValueError(
                "`use_liger_kernel=True` needs Liger: `pip install liger-kernel`, or set `use_liger_kernel=False`."
            )

    def _name_checkpointing(self) -> None:
        """TRL switches it on under the name that transformers deprecates, and warns of its own default."""
        fields = vars(self)
        if fields["activation_checkpointing"] is None and fields["gradient_checkpointing"] is True:
            fields["activation_checkpointing"] = True

    def _validate_trackers(self, report_to: str | list[str] | None) -> None:
        """What the Trainer says of `report_to` once the model is loaded."""
        names = [report_to] if isinstance(report_to, str) else report_to or []
        if names in (["none"], ["all"]):
            return
        for name in names:
            require_choice("report_to", name, [*INTEGRATION_TO_CALLBACK])
        missing = {*names} - {*get_available_reporting_integrations()} - _NEVER_LISTED
        if missing:
            raise ValueError(
                f"`report_to={report_to!r}` needs {' and '.join(sorted(missing))}, which is not installed. "
                "Install it, or set `report_to='none'`."
            )
