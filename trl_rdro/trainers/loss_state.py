"""What a loss learns beside the policy, once per optimiser step and from all its pairs, such as the reliability of
labels (repo)."""

from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..losses.types import LOSS_TYPES
from . import objectives


class LossState(TrainerCallback, ExportableState):
    """
    A number for each label of a column (an annotator, a group), for each loss that learns them. The same on all ranks.

    It is a callback in order that it is updated at the end of each optimiser step, and saved with each checkpoint: a
    resumed run goes on with the same numbers.
    """

    def __init__(self):
        self.values: dict[str, dict[str, float]] = {}  # by loss, then by label
        self._seen: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def numbers(self, name: str, labels: torch.Tensor, config: Any) -> torch.Tensor:
        """The numbers of `(n,)` labels, `(n,)`."""
        known = self.values.setdefault(name, {})
        keys = [str(label) for label in labels.tolist()]
        values = [known[key] if key in known else objectives.number_of_a_new_label(name, config) for key in keys]
        return torch.tensor(values, device=labels.device)

    def observe(self, name: str, labels: torch.Tensor, statistics: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in what `(n,)` pairs of the present optimiser step say about their labels' numbers."""
        self._seen[name] += zip(labels.tolist(), statistics.tolist(), weights.tolist(), strict=True)

    def on_step_end(self, args, state, control, **kwargs):
        for name, seen in self._seen.items():
            rows = gather_object(seen)
            known = {str(label): None for label, _, _ in rows} | self.values[name]
            known = {
                key: objectives.number_of_a_new_label(name, args) if value is None else value
                for key, value in known.items()
            }
            index = {key: i for i, key in enumerate(known)}
            labels = torch.tensor([index[str(label)] for label, _, _ in rows])
            numbers, statistics, weights = (
                torch.tensor(values, dtype=torch.float64)
                for values in (list(known.values()), [row[1] for row in rows], [row[2] for row in rows])
            )
            updated = objectives.updated_numbers(name, numbers, statistics, labels, weights, args)
            self.values[name] = dict(zip(known, updated.tolist(), strict=True))
        self._seen.clear()

    def state(self) -> dict:
        return {"args": {}, "attributes": {"values": self.values}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._seen.clear()  # of a run that was broken off
        # The Trainer restores callbacks only with `restore_callback_states_from_checkpoint`
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved:
            self.values = saved["attributes"]["values"]


class StatefulLosses:
    """Mixin of `DPOTrainer`, before TRL's class: gives the losses in use their learned numbers, and learns them."""

    _used: tuple[str, ...]  # our losses in use, inside a robust one too

    def _set_up_loss_state(self) -> None:
        self._stateful = [name for name in self._used if LOSS_TYPES[name].state]
        if self._stateful:
            self.add_callback(LossState)

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
            metrics |= objectives.state_metrics(name, pairs.columns[name])
            if self.model.training:
                labels = self._labels(name, pairs.columns, pairs.chosen)
                weights = pairs.columns.get("weight", torch.ones_like(pairs.chosen))
                with torch.no_grad():
                    statistics = objectives.state_statistics(name, pairs, self.args)
                self._loss_state.observe(name, labels, statistics, weights)

    @staticmethod
    def _labels(name: str, columns: dict[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The labels of the pairs, `(n,)`: one for all where the data have none."""
        labels = columns.get(LOSS_TYPES[name].state)
        return torch.zeros_like(like, dtype=torch.long) if labels is None else labels

    @property
    def _loss_state(self) -> LossState:
        # Looked up, because resuming can replace callbacks
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, LossState))
