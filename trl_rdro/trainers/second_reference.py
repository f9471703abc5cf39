"""The second reference of mrpo: another model, an adapter of the trained one, or log-probabilities in the data."""

from typing import Any

import torch

from ..compat import second_reference as compat
from ..losses.types import LOSS_TYPES
from .hosts import Host


class SecondReference(Host):
    """Mixin of `DPOTrainer`, before TRL's class."""

    def _set_up_second_reference(self) -> None:
        self._second_reference = None
        if "mrpo" in self._used and self.args.mrpo_reference is not None:
            self._second_reference = compat.second_reference(self, self.args.mrpo_reference)

    def _with_references(
        self, columns: dict[str, torch.Tensor], inputs: dict[str, Any], ref_logps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The columns, and the log-probabilities of the chosen and rejected completions under both references, `(n,)`
        each, where mrpo is in use."""
        if "mrpo" not in self._used:
            return columns
        if self._second_reference is not None:
            second = compat.second_reference_logps(self, self._second_reference, inputs)
            columns = columns | dict(zip(LOSS_TYPES["mrpo"].optional_columns, second.chunk(2), strict=True))
        return columns | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref_logps.chunk(2), strict=True))
