"""What a loss learns beside the policy, once per optimiser step and from all its pairs, such as the reliability of
labels (repo), the weights of groups (grdpo)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..checks.datasets import evaluation_sets
from ..losses.types import LOSS_TYPES
from . import objectives
from .columns import label_id
from .hosts import Host


class LossState(TrainerCallback, ExportableState):
    """
    A number for each label of a column (an annotator, a group), for each loss that learns them. The same on all ranks.

    It is a callback in order that it is updated at the end of each optimiser step, and saved with each checkpoint: a
    resumed run goes on with the same numbers.
    """

    def __init__(self):
        self.values: dict[str, dict[str, float]] = {}  # by loss, then by label
        self.sizes: dict[str, dict[str, float]] = {}  # of the labels in the training set, where a loss needs them
        self._seen: dict[str, list[tuple[torch.Tensor, ...]]] = defaultdict(list)

    def numbers(self, name: str, labels: torch.Tensor, config: Any) -> torch.Tensor:
        """The numbers of `(n,)` pairs by their labels, `(n,)`."""
        known, index = self._lookup(name, labels.tolist(), config)
        sizes = torch.tensor([self.sizes[name][key] for key in known]) if name in self.sizes else None
        return objectives.numbers_of_pairs(torch.tensor(list(known.values())), index, sizes).to(labels.device)

    def observe(self, name: str, labels: torch.Tensor, statistics: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in what `(n,)` pairs of the present optimiser step say about their labels' numbers."""
        self._seen[name].append((labels, statistics, weights))  # read at the end of the step, all at once

    def on_step_end(self, args, state, control, **kwargs):
        for name, seen in self._seen.items():
            of_this_rank = (torch.cat(column).tolist() for column in zip(*seen, strict=True))
            labels, *columns = zip(*gather_object(list(zip(*of_this_rank, strict=True))), strict=True)
            known, index = self._lookup(name, labels, args)
            numbers, statistics, weights = (
                torch.tensor(values, dtype=torch.float64) for values in (list(known.values()), *columns)
            )
            updated = objectives.updated_numbers(name, numbers, statistics, index, weights, args)
            self.values[name] = dict(zip(known, updated.tolist(), strict=True))
        self._seen.clear()

    def _lookup(self, name: str, labels: Iterable[int], config: Any) -> tuple[dict[str, float], torch.Tensor]:
        """The numbers by label, with those of new labels; and the place in it of each of `labels`, `(n,)`."""
        keys = [str(label) for label in labels]
        known = dict(self.values[name])
        for key in keys:
            if key not in known:
                known[key] = objectives.number_of_a_new_label(name, config)
        known = dict(sorted(known.items()))  # as in a checkpoint: the last digit of a sum depends on the order
        places = {key: place for place, key in enumerate(known)}
        return known, torch.tensor([places[key] for key in keys], dtype=torch.long)

    def state(self) -> dict:
        return {"args": {}, "attributes": {"values": self.values, "sizes": self.sizes}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._seen.clear()  # of a run that was broken off
        # The Trainer restores callbacks only with `restore_callback_states_from_checkpoint`
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved:
            self.values = saved["attributes"]["values"]


class StatefulLosses(Host):
    """Mixin of `DPOTrainer`, before TRL's class: gives the losses in use their learned numbers, and learns them."""

    def _set_up_loss_state(self) -> None:
        self._stateful = [name for name in self._used if LOSS_TYPES[name].state]
        if self._stateful:
            self.add_callback(LossState)
            self._loss_state.values = {name: {} for name in self._stateful}
        self._label_names: dict[str, dict[str, str]] = {}  # by loss, then by label, where its labels are known before
        for name in self._stateful:
            column = LOSS_TYPES[name].state
            if column in LOSS_TYPES[name].columns:
                self._count_labels(name, column)

    def _count_labels(self, name: str, column: str) -> None:
        """Let the loss's state know the labels of the training set, with their sizes, and start from equal numbers."""
        rows: Any = self.train_dataset
        sizes = label_sizes(rows, column)
        counted = sum(size > 0 for size in sizes.values())  # the others have rows of weight 0 alone, which are none
        ids = {str(label_id(label)): label for label in sorted(sizes)}
        self._label_names[name] = ids
        self._loss_state.sizes[name] = {key: sizes[label] for key, label in ids.items()}
        self._loss_state.values[name] = {key: 1 / counted if sizes[label] > 0 else 0.0 for key, label in ids.items()}

    def _with_numbers(self, columns: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns, and under the name of each loss with a state the numbers of its pairs, `(n,)`.

        Args:
            like: `(n,)`, for the number of pairs and their device.
        """
        numbers = {
            name: self._loss_state.numbers(name, self._labels(name, columns, like), self.args)
            for name in self._stateful
        }
        return columns | numbers

    def _observe(self, pairs: objectives.Pairs, metrics: dict[str, torch.Tensor]) -> None:
        """Log the numbers; in training, let the state take in what the pairs say about them."""
        for name in self._stateful:
            names = self._label_names.get(name, {})
            by_name = {label: self._loss_state.values[name][key] for key, label in names.items()}
            metrics |= objectives.state_metrics(name, pairs.columns[name], by_name)
            if self.model.training:
                labels = self._labels(name, pairs.columns, pairs.chosen)
                weights = pairs.columns.get("weight", torch.ones_like(pairs.chosen))
                with torch.no_grad():
                    statistics = objectives.state_statistics(name, pairs, self.args)
                self._loss_state.observe(name, labels, statistics, weights)

    @staticmethod
    def _labels(name: str, columns: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The labels of the pairs, `(n,)`: one for all where the data have none."""
        labels = columns.get(LOSS_TYPES[name].state or "")
        return torch.zeros_like(like, dtype=torch.long) if labels is None else labels

    @property
    def _loss_state(self) -> LossState:
        # Looked up, because resuming can replace callbacks
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, LossState))


def label_sizes(rows: Dataset, column: str) -> dict[str, float]:
    """The number of rows with each label of a column, or the sum of their weights."""
    labels = rows[column]
    weights = rows["weight"] if "weight" in rows.column_names else [1] * len(labels)
    sizes: dict[str, float] = defaultdict(float)
    for label, weight in zip(labels, weights, strict=True):
        sizes[str(label)] += weight
    return dict(sizes)


def require_known_groups(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse data on which groups cannot be counted, and evaluation data with groups that training gives no weight."""
    if not isinstance(train_dataset, Dataset):
        raise ValueError(
            "`grdpo` needs the sizes of the groups, which cannot be counted on a streaming `train_dataset`. Load the "
            "data set without streaming."
        )
    sizes = label_sizes(train_dataset, "group")
    known = _of_positive_size(sizes)
    for name, dataset in evaluation_sets(eval_dataset).items():
        if isinstance(dataset, Dataset) and (new := sorted(_of_positive_size(label_sizes(dataset, "group")) - known)):
            without = " with a weight above 0" if new[0] in sizes else ""
            raise ValueError(
                f"The group {new[0]!r} of `{name}` is not in "
                f"`train_dataset`{without}, whose groups are {', '.join(sorted(known)[:10])}: `grdpo` has no weight "
                "for it. Remove these rows, or give them a group of the training set."
            )


def _of_positive_size(sizes: dict[str, float]) -> set[str]:
    return {label for label, size in sizes.items() if size > 0}
