"""Columns that a row may carry beside its texts, from the data set to the loss: how much it counts, how sure its label
is, and whose it is."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..losses.types import LOSS_TYPES
from .hosts import Host


# Names and dtypes. Labels of any kind become numbers, so that a batch holds nothing but tensors.
COLUMNS = {
    "weight": torch.float32,
    "preference_probability": torch.float32,
    "preferred_fraction": torch.float32,
    "group": torch.int64,
    "annotator": torch.int64,
    "second_ref_chosen_logps": torch.float32,
    "second_ref_rejected_logps": torch.float32,
}
_KEY = "trl_rdro_columns"


def label_id(label: Any) -> int:
    """A number for a group's or annotator's name: the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(str(label).encode(), digest_size=7).digest())


def as_tensor(name: str, values: list[Any]) -> torch.Tensor:
    """The values of a column, `(n,)`."""
    dtype = COLUMNS[name]
    return torch.tensor([label_id(value) for value in values] if dtype == torch.int64 else values, dtype=dtype)


@dataclass
class WithColumns:
    """A collator that lets the given columns through beside what another makes of the rows.

    Parameters:
        collator: the other one. A column that it puts in the batch itself is left to it.
        names: of the columns, each of which a row need not have.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    names: tuple[str, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # Before the other one, which may take its columns out of the rows
        names = [name for name in self.names if name in examples[0]]
        columns = {name: as_tensor(name, [row[name] for row in examples]) for name in names}
        batch = self.collator(examples)
        columns = {name: values for name, values in columns.items() if name not in batch}
        return {**batch, _KEY: columns} if columns else batch


def split_columns(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A micro-batch without the columns that `WithColumns` added; and these, with those that it left to another
    collator, which stay in the micro-batch too."""
    inputs = dict(inputs)
    columns = inputs.pop(_KEY, {})
    return inputs, columns | {name: inputs[name] for name in COLUMNS if name in inputs}


def weighted(values: torch.Tensor, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(n,)` losses times their rows' weights, if the rows have any."""
    return columns["weight"] * values if "weight" in columns else values


def needed_columns(names: tuple[str, ...], config: Any) -> tuple[str, ...]:
    """The columns that these of our losses cannot do without under this `DPOConfig`."""
    needed = [column for name in names for column in LOSS_TYPES[name].columns]
    if "mrpo" in names and config.mrpo_reference is None:
        needed += LOSS_TYPES["mrpo"].optional_columns
    return tuple(dict.fromkeys(needed))


class Columns(Host):
    """Mixin of the trainers, before TRL's class: the columns `_column_names` reach `compute_loss` in the batch."""

    _column_names: tuple[str, ...]  # set before TRL's constructor

    def _set_up_columns(self) -> None:
        self.data_collator = WithColumns(self.data_collator, self._column_names)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        theirs: list[str] = self._signature_columns or []
        self._signature_columns: Any = [*theirs, *(name for name in self._column_names if name not in theirs)]

    def compute_ref_log_probs(self, model, inputs):
        # With the collator's columns where log-probabilities are precomputed for a set that `evaluate` was given
        return super().compute_ref_log_probs(model, split_columns(inputs)[0])
