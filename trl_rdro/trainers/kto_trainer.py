"""TRL's `KTOTrainer`, for labelled completions without pairs, with the density-ratio losses of trl_rdro."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset

from .. import losses
from ..checks.datasets import check_datasets
from ..compat import trl as trl_compat
from ..configs.density_ratio_config import require_cap_above_start_of
from ..configs.kto_config import KTOConfig
from ..log import get_logger
from ..losses.density_ratio import Share
from ..losses.types import LOSS_TYPES
from . import objectives
from .checked_inputs import CheckedInputs
from .columns import Columns, split_columns, weighted
from .common import require_own_config
from .model_cards import ModelCards
from .packed_rows import PackedRows, refuse_before_loading
from .prompt_fractions import (
    COLUMN,
    has_shares,
    preferred_share,
    require_countable,
    require_shares_alone,
    warn_of_shares_in_evaluation_alone,
    warn_of_unequal_shares,
    warn_of_unread_shares,
    with_shares,
)
from .safeguards import Safeguards
from .step import split_step, with_steps
from .throughput import Throughput


logger = get_logger(__name__)


class KTOTrainer(Columns, PackedRows, Throughput, ModelCards, Safeguards, CheckedInputs, trl.KTOTrainer):
    """
    [`trl.KTOTrainer`] whose `loss_type` can also be `"ddro"` or `"rdro"`. Takes the same arguments; runs with TRL's
    own losses are TRL's, to the last bit.

    The objective is E_{p+}[preferred term] + E_{p-}[non-preferred term]. Each sample is weighted by its class, 1/pi or
    1/(1 - pi), with pi the preferred fraction of the training set, so that the estimate is unbiased for every
    composition of a batch, and the result converges to p+ also when the classes are unequal. An evaluation set is
    weighted by its own fraction, so that its loss estimates the same sum; one with one class only by that of the
    training set. A streaming one is read once more for that. Where the fraction differs between prompts, a column
    `preferred_fraction` (or `count_fraction_by_prompt`) gives that of each prompt. There is no KL batch, no KL forward
    pass, and the order of the training set is random.

    Logged beside TRL's metrics: `logratios/chosen` and `logratios/rejected`, the mean log-ratio to the reference model
    per class, in nats; `reference/log_normalisation` (`normalisation.py`), 0 if the reference is the mixture that both
    losses assume; `share/chosen` and `share/rejected`, the share of each class among the completions seen; for
    `ddro` `ddro/capped_chosen` and `ddro/capped_rejected`, the share of completions beyond the cap.

    Attributes:
        preferred_fraction (`float` or `None`): pi; `None` with TRL's losses.

    Raises:
        `ValueError`: for data of the wrong kind, before the model is loaded; for a training set with one class only;
            for a streaming one without `preferred_fraction`.
        `TypeError`: for one of our losses in a plain `trl.KTOConfig`, which lacks their fields.
    """

    args: KTOConfig
    _method = "kto"
    _reference_columns = ("ref_logps",)
    _column_names: tuple[str, ...] = ("weight",)
    _completion_columns = ("completion_ids",)

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *rest,
        **kwargs,
    ):
        if args is None:
            args = KTOConfig(f"{trl_compat.model_name(model)}-KTO")
        ours = [args.loss_type] if args.loss_type in LOSS_TYPES else []
        require_own_config(args, ours, KTOConfig)
        self._choose_columns(args, train_dataset)
        train_dataset, eval_dataset, example = check_datasets(
            self._method, train_dataset, eval_dataset, self._needed_columns, self._column_names
        )
        if self._needed_columns:
            require_shares_alone(args, example)
        elif not ours:
            warn_of_unread_shares(example, args.loss_type)
        elif COLUMN not in self._column_names:
            warn_of_shares_in_evaluation_alone(eval_dataset)
        if ours and example.keys() & {"image", "images"}:
            raise ValueError(f"`{args.loss_type}` is not implemented for unpaired image data. Use `DPOTrainer`.")
        if args.loss_type == "kto":
            _require_text(example)
        self.preferred_fraction: float | None = args.preferred_fraction if ours else None
        is_streaming = isinstance(train_dataset, IterableDataset)
        if ours and self.preferred_fraction is None and is_streaming and not self._needed_columns:
            if not {"chosen", "rejected"} <= example.keys():
                raise ValueError(
                    f"`{args.loss_type}` needs the share of preferred completions, which cannot be counted on a "
                    "streaming `train_dataset`. Set `preferred_fraction`, or load the data set without streaming."
                )
            self.preferred_fraction = 0.5  # pairs
            require_cap_above_start_of(args, args.loss_type, self.preferred_fraction)
        config, processing_class = self._check_model(model, args, processing_class, **kwargs)
        refuse_before_loading(config, args, example, kwargs.get("peft_config"))
        self._ours = ours
        self._describe_in_model_card()
        self._evaluated_fraction = self.preferred_fraction
        self._evaluated: Any = None  # the set that was evaluated last
        with trl_compat.without_kl(args) if ours else nullcontext():
            super().__init__(
                model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, *rest, **kwargs
            )
        self.loss_type = args.loss_type
        self._set_up_safeguards(model, given_reference=ref_model is not None)
        self._set_up_columns()
        self._set_up_packed_rows()
        self._set_up_throughput()
        if ours and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            logger.warning(
                f"`desirable_weight={self.desirable_weight}` and `undesirable_weight={self.undesirable_weight}` "
                f"multiply the class weights of `{self.loss_type}`, which are right already: the result no longer "
                "converges to the distribution of preferred completions. Leave both at 1."
            )

    def _name_for_trl(self, name, dataset_name):
        # Not to advise on class weights, which are not to be set by hand with our losses
        return name if self._ours else super()._name_for_trl(name, dataset_name)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        is_training = not self._training_set_is_prepared
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if is_training and self._ours and isinstance(dataset, Dataset):
            self._count_classes(dataset, args)
            if COLUMN not in self._column_names:
                warn_of_unequal_shares(dataset)
        if COLUMN in self._column_names:
            is_own = not is_training and isinstance(dataset, Dataset)
            fraction = self._fraction_of(dataset) if is_own else self.preferred_fraction
            dataset = with_shares(dataset, args, self._ours[0], fraction)
        return dataset

    def _choose_columns(self, args: KTOConfig, train_dataset: Any) -> None:
        """Read `preferred_fraction` where the training set has it, or where it is counted."""
        if args.loss_type in LOSS_TYPES:
            if has_shares(train_dataset):
                self._needed_columns = (COLUMN,)
            elif args.count_fraction_by_prompt:
                require_countable(train_dataset)
            else:
                return
            self._column_names = ("weight", COLUMN)

    def _count_classes(self, dataset: Dataset, args: KTOConfig) -> None:
        labels, counted = dataset["label"], preferred_share(dataset)
        preferred, total = sum(labels), len(labels)
        if not 0 < counted < 1:
            which = "completions of positive weight" if "weight" in dataset.column_names else f"{total} completions"
            raise ValueError(
                f"All {which} of `train_dataset` are {'' if counted else 'non-'}preferred: a density ratio needs both "
                "classes. Add completions with the other label."
            )
        if self.preferred_fraction is None:
            self.preferred_fraction = counted
            logger.info(f"Preferred fraction {counted:.4f}: {preferred} of {total} training completions.")
        else:
            logger.info(
                f"Preferred fraction {self.preferred_fraction:.4f} as set; {counted:.4f} ({preferred} of {total}) was "
                "counted on the training set."
            )
        # Not that of `args`, which is another while TRL constructs its trainer
        require_cap_above_start_of(args, self._ours[0], self.preferred_fraction)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._note_evaluated(self.eval_dataset[dataset] if isinstance(dataset, str) else dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        self._note_evaluated(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _note_evaluated(self, dataset: Any) -> None:
        """Remember the preferred fraction of the set that is evaluated next."""
        self._evaluated_fraction = self.preferred_fraction
        if self._ours and isinstance(dataset, Dataset | IterableDataset):
            if self._evaluated is not dataset:
                self._evaluated, self._fraction_of_last = dataset, self._fraction_of(dataset)
            self._evaluated_fraction = self._fraction_of_last

    def _fraction_of(self, dataset: Dataset | IterableDataset) -> float | None:
        """Of an evaluation set; that of the training set if only one class, or none, has a weight."""
        share = preferred_share(dataset)
        return share if 0 < share < 1 else self.preferred_fraction

    def _reason_not_to_deal(self) -> str | None:
        if self.calculate_KL:
            return f"`{self.loss_type}` estimates the KL divergence from a micro-batch as a whole"
        return super()._reason_not_to_deal()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batch_samples) > 1 and self._ours:
            batch_samples = with_steps(batch_samples)
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs, columns = split_columns(inputs)
        if not self._ours:
            with trl_compat.reference_pass(self.model):
                if "weight" in columns and "weight" not in inputs:  # which TRL reads itself once it does
                    return trl_compat.unpaired_loss(self, model, inputs, return_outputs, columns["weight"])
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs, step = split_step(inputs)
        preferred = inputs["label"].bool()
        # The reference first: its activations are gone before those of the policy come
        ref_logps = trl_compat.unpaired_reference_logps(self, inputs)
        outputs = trl_compat.policy_forward(self, model, inputs)
        logratios = trl_compat.completion_logps(self, outputs.log_probs, inputs["completion_mask"]) - ref_logps

        mixture, fraction = self._shares(columns)
        values, beyond_cap = objectives.density_ratio_loss(self.loss_type, logratios, preferred, mixture, self.args)
        weights = losses.class_weights(preferred, fraction)
        weights = weights * torch.where(preferred, self.desirable_weight, self.undesirable_weight)
        loss = step.scale * weighted(weights * values, columns).mean()
        in_mixture = losses.mixture_weights(
            preferred, objectives.mixture(self.loss_type, mixture, self.args), fraction
        )
        self._record(
            {self.loss_type: loss},
            {},
            lambda: {"chosen": logratios[preferred], "rejected": logratios[~preferred]},
            len(logratios) // 2,
            self._class_metrics(logratios.detach(), preferred, beyond_cap),
            losses.normalisation_sums(logratios.detach(), weighted(in_mixture, columns)),
        )
        if self.aux_loss_enabled:  # mixture of experts
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss

        outputs = trl_compat.unpaired_metrics(self, model, inputs, outputs, ref_logps, return_outputs)
        trl_compat.drop_metric(self, "kl")  # 0: nothing estimates it
        return (loss, outputs) if return_outputs else loss

    def _shares(self, columns: dict[str, torch.Tensor]) -> tuple[Share, Share]:
        """Of p+ in the reference, unless an option sets it, and of preferred completions in the data."""
        if COLUMN in columns:  # of each completion's prompt
            return columns[COLUMN], columns[COLUMN]
        fraction = self.preferred_fraction if self.model.training else self._evaluated_fraction
        assert self.preferred_fraction is not None and fraction is not None  # given, or counted by `_prepare_dataset`
        # A stream to be evaluated has nothing counted by prompt: as in a table, its own share is that of all prompts
        return fraction if self.args.count_fraction_by_prompt else self.preferred_fraction, fraction

    def _class_metrics(
        self, logratios: torch.Tensor, preferred: torch.Tensor, beyond_cap: torch.Tensor | None
    ) -> dict[str, float]:
        """Means per class over all ranks; a class that is not in the batch adds nothing to the average."""
        columns = {"logratios/{}": logratios}
        if beyond_cap is not None:
            columns[self.loss_type + "/capped_{}"] = beyond_cap.float()
        classes = torch.stack([preferred, ~preferred]).float()  # (2, n)
        rows = torch.stack([torch.ones_like(logratios), *columns.values()])  # (1 + columns, n)
        # Not a matrix product, which TF32 would round to three digits
        of_this_rank = (rows.unsqueeze(1) * classes).sum(dim=2).unsqueeze(0)
        counts, *sums = self.accelerator.gather(of_this_rank).sum(dim=0).tolist()
        metrics = {}
        for i, label in enumerate(("chosen", "rejected")):
            metrics[f"share/{label}"] = counts[i] / sum(counts)
            if counts[i] > 0:
                metrics |= {name.format(label): row[i] / counts[i] for name, row in zip(columns, sums, strict=True)}
        return metrics


def _require_text(example: Mapping[str, Any]) -> None:
    """Refuse rows of tokens alone for TRL's `kto`."""
    if "prompt_ids" in example and not {"completion", "chosen"} & example.keys():
        raise ValueError(
            "`train_dataset` is tokenised already (`prompt_ids`), and the loss `kto` needs the text for its estimate "
            "of the KL divergence. Give the text columns, or use another loss."
        )
