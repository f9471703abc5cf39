"""TRL's `DPOTrainer` with the losses of trl_rdro."""

from contextlib import nullcontext
from typing import Any

import torch
import trl

from .. import losses
from ..checks.datasets import check_datasets
from ..compat import trl as trl_compat
from ..configs.dpo_config import DPOConfig
from ..losses.types import LOSS_TYPES, column_names, in_use, of_family
from . import objectives
from .checked_inputs import CheckedInputs
from .columns import Columns, needed_columns, split_columns, weighted
from .common import require_own_config
from .input_gradient_penalty import InputGradientPenalty
from .loss_state import StatefulLosses, require_known_groups
from .model_cards import ModelCards
from .packed_rows import PackedRows, is_asked_for, refuse_before_loading
from .prompt_fractions import refuse_beside_pairs
from .reweighting import Reweighting
from .safeguards import Safeguards
from .second_reference import SecondReference
from .sharpness import say_how_sharp
from .step import Step, split_step, with_steps
from .throughput import Throughput


# TRL's losses that are no means over pairs: they sort them, or count tokens of the micro-batch
BATCH_LOSSES = ("aot", "aot_unpaired", "sft")


class DPOTrainer(
    Reweighting,
    InputGradientPenalty,
    StatefulLosses,
    SecondReference,
    Columns,
    PackedRows,
    Throughput,
    ModelCards,
    Safeguards,
    CheckedInputs,
    trl.DPOTrainer,
):
    """
    [`trl.DPOTrainer`] whose `loss_type` can also be one of ours (`trl_rdro.losses.types.LOSS_TYPES`), alone or in a
    weighted list with TRL's. Takes the same arguments; runs without any of ours are TRL's own, to the last bit.

    Logged beside TRL's metrics when one of ours is used: `logratios/chosen` and `logratios/rejected`, the mean
    log-ratio to the reference model in nats; for `ddro` and `rdro` `reference/log_normalisation` (`normalisation.py`),
    0 if the reference is the mixture that they assume; for `ddro` `ddro/capped_chosen` and `ddro/capped_rejected`, the
    share of completions beyond the cap; for `kldpo` and `drdpo` `effective_sample_size` and `max_weight`, as fractions
    of the optimiser step's batch and of its total weight, and `kldpo/tau` where that is solved; for `wdpo`
    `wdpo/grad_norm`, `wdpo/penalty`, and in training `wdpo/gap`, the relative error of the central difference, and
    `wdpo/eps`, its relative step; for `repo` `repo/eta` and for `grdpo` `grdpo/weight_GROUP`, what they have learned.

    The column `weight` of the data counts rows, for every loss, TRL's included. Further columns are read by the losses
    that need them (`docs/losses.md`).

    KLDPO and Dr. DPO weigh the pairs of a whole optimiser step, over ranks and accumulated micro-batches. With
    `gradient_accumulation_steps > 1` this costs one gradient-free policy forward per micro-batch where the gradients
    cannot be divided at the step's end, such as with DeepSpeed (see `reweighting.py`). In evaluation the weights are
    those of each evaluation batch. WDPO makes one more forward, a backward to the embeddings, and trains
    on a batch of twice the size (see `input_gradient.py`).

    Raises:
        `ValueError`: for data of the wrong kind, before the model is loaded.
        `TypeError`: for one of our losses in a plain `trl.DPOConfig`, which lacks their fields.
    """

    args: DPOConfig
    _method = "dpo"
    _reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    _completion_columns = ("chosen_ids", "rejected_ids")

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
            args = DPOConfig(f"{trl_compat.model_name(model)}-DPO")
        requested = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
        ours = [loss_type for loss_type in requested if loss_type in LOSS_TYPES]
        require_own_config(args, ours, DPOConfig)
        self._used = in_use(requested, args.inner_loss_type) if ours else ()
        self._column_names = column_names(self._used)
        self._needed_columns = needed_columns(self._used, args)
        train_dataset, eval_dataset, example = check_datasets(
            self._method, train_dataset, eval_dataset, self._needed_columns, self._column_names
        )
        if "wdpo" in ours and example.keys() & {"image", "images"}:
            raise ValueError("`wdpo` perturbs text embeddings and is not defined for image data.")
        if set(ours) & set(of_family("density_ratio")):
            refuse_beside_pairs(example)
        if "grdpo" in ours:
            require_known_groups(train_dataset, eval_dataset)
        if "weight" in example and (sorting := {"aot", "aot_unpaired"}.intersection(requested)):
            raise ValueError(
                f"The column `weight` cannot be combined with `{sorting.pop()}`, which sorts the pairs of a batch, so "
                "that a weight belongs to no pair. Remove the column, or use another loss."
            )
        config, processing_class = self._check_model(model, args, processing_class, **kwargs)
        refuse_before_loading(config, args, example, kwargs.get("peft_config"))
        self._ours = ours
        self._describe_in_model_card()
        with trl_compat.padding_free_is_ours() if is_asked_for(args) else nullcontext():
            super().__init__(
                model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, *rest, **kwargs
            )
        self._set_up_safeguards(model, given_reference=ref_model is not None)
        self._set_up_columns()
        self._set_up_reweighting()
        self._set_up_input_gradient_penalty()
        self._set_up_loss_state()
        self._set_up_second_reference()
        self._set_up_packed_rows()  # the last: it prepares every model that is called
        self._set_up_throughput()
        say_how_sharp(ours, args)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # The Trainer hands over the micro-batches of one optimiser step together
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batch_samples) > 1 and self._ours:
            batch_samples = with_steps(batch_samples)
            self._prepare_step(batch_samples)
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ours = [pair for pair in zip(self.loss_types, self.loss_weights, strict=True) if pair[0] in LOSS_TYPES]
        theirs = [pair for pair in zip(self.loss_types, self.loss_weights, strict=True) if pair not in ours]
        inputs, columns = split_columns(inputs)
        their_weights = None if "weight" in inputs else columns.get("weight")  # TRL's, once it reads them itself
        if not ours and their_weights is None:
            with trl_compat.reference_pass(self.model):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs, step = split_step(inputs)
        # The reference first: its activations are gone before those of the policy come
        ref_logps = trl_compat.pair_reference_logps(self, inputs) if step.ref_logps is None else step.ref_logps
        columns = self._complete(columns, inputs, ref_logps) if step.columns is None else step.columns
        if step.noise is not None:
            step.noise.restore()
        grad_norms, metrics = None, dict[str, torch.Tensor]()
        if self._is_penalised(step.index):
            outputs, grad_norms = self._forward_with_grad_norms(model, inputs, ref_logps, columns, step, metrics)
        else:
            outputs = trl_compat.policy_forward(self, model, inputs)
        logratios = self._logratios(outputs.log_probs, inputs, ref_logps)
        by_class = dict(zip(("chosen", "rejected"), logratios.chunk(2), strict=True))
        metrics |= {f"logratios/{label}": values.mean() for label, values in by_class.items()}

        self._observe(self._pairs(logratios, inputs, columns), metrics)

        our_losses = {}
        for name, _ in ours:
            family = LOSS_TYPES[name].family
            if family == "density_ratio":
                values = weighted(self._density_ratio_loss(name, logratios, metrics), columns)
            elif family == "pair":
                values = weighted(self._pair_loss(name, logratios, inputs, columns), columns)
            else:
                inner = weighted(self._pair_loss(self.args.inner_loss_type, logratios, inputs, columns), columns)
                values = self._robust_loss(name, inner, step, grad_norms, columns, metrics)
            our_losses[name] = step.scale * values.mean()
        if ours:
            log_sums = self._log_sums(logratios, columns)
            means = self._record(our_losses, metrics, lambda: by_class, len(logratios) // 2, log_sums=log_sums)
            self._adapt_finite_difference(means)

        loss = sum(weight * our_losses[name] for name, weight in ours)
        result = trl_compat.pair_loss_and_metrics(
            self, model, inputs, outputs, ref_logps, theirs, return_outputs, their_weights
        )
        if return_outputs:
            return loss + step.scale * result[0], result[1]
        return loss + step.scale * result

    def _robust_loss(
        self,
        name: str,
        inner: torch.Tensor,
        step: Step,
        grad_norms: torch.Tensor | None,
        columns: dict[str, Any],
        metrics: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The robust loss called `name` over the `(n,)` losses of pairs that stand inside it, `(n,)`."""
        if LOSS_TYPES[name].temperature:
            return self._reweighted(name, inner, step, metrics)
        if LOSS_TYPES[name].state:
            return columns[name] * inner
        return inner if grad_norms is None else inner + self._penalty(grad_norms, columns, metrics)

    def _reason_not_to_share(self) -> str | None:
        if not self.args.share_prompt:
            return "`share_prompt=False`"
        if "wdpo" in self._ours:
            return "`wdpo` tells the gradients of a pair's two prompts apart"
        if self.aux_loss_enabled:
            return "the auxiliary loss of a mixture of experts counts the tokens of both"
        return None

    def _reason_not_to_deal(self) -> str | None:
        whole_batch = [name for name in self.loss_types if name in BATCH_LOSSES]
        if whole_batch:
            return f"`{whole_batch[0]}` depends on which pairs are in a micro-batch together"
        if "wdpo" in self._ours and (self.args.wdpo_penalty == "rms" or self.args.wdpo_interval > 1):
            return "`wdpo` with `rms` or an interval depends on which pairs are in a micro-batch together"
        return super()._reason_not_to_deal()

    def _logratios(self, log_probs: torch.Tensor, inputs: dict[str, Any], ref_logps: torch.Tensor) -> torch.Tensor:
        """z of the completions, `(2n,)`: chosen, then rejected."""
        return trl_compat.completion_logps(self, log_probs, inputs["completion_mask"]) - ref_logps

    def _pair_loss(
        self, name: str, logratios: torch.Tensor, inputs: dict[str, Any], columns: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The pair loss called `name`, `(n,)`, of `(2n,)` log-ratios."""
        pairs = self._pairs(logratios, inputs, columns)
        return objectives.pair_loss(name, *pairs[:3], self.args, pairs.columns)

    def _complete(
        self, columns: dict[str, torch.Tensor], inputs: dict[str, Any], ref_logps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The columns, with all else that the losses in use look at."""
        columns = self._with_numbers(columns, like=ref_logps.chunk(2)[0])
        return self._with_references(columns, inputs, ref_logps)

    def _pairs(
        self, logratios: torch.Tensor, inputs: dict[str, Any], columns: dict[str, torch.Tensor]
    ) -> objectives.Pairs:
        lengths = inputs["completion_mask"].sum(dim=1).clamp(min=1).view(2, -1)
        chosen, rejected = logratios.chunk(2)
        return objectives.Pairs(chosen, rejected, lengths, columns)

    def _density_ratio_loss(
        self, name: str, logratios: torch.Tensor, metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """`(n,)`: a pair is one preferred and one non-preferred completion, so half are preferred."""
        preferred = _chosen(logratios)
        values, beyond_cap = objectives.density_ratio_loss(name, logratios, preferred, 0.5, self.args)
        if beyond_cap is not None:
            chosen, rejected = beyond_cap.float().chunk(2)
            metrics |= {f"{name}/capped_chosen": chosen.mean(), f"{name}/capped_rejected": rejected.mean()}
        of_chosen, of_rejected = values.chunk(2)
        return of_chosen + of_rejected

    def _log_sums(self, logratios: torch.Tensor, columns: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """What says whether the reference is the mixture that a density-ratio loss in use assumes."""
        name = next((name for name in self._ours if LOSS_TYPES[name].family == "density_ratio"), None)
        if name is None:
            return None
        weights = losses.mixture_weights(_chosen(logratios), objectives.mixture(name, 0.5, self.args), 0.5)
        if "weight" in columns:
            weights = weights * columns["weight"].repeat(2)
        return losses.normalisation_sums(logratios.detach(), weights)


def _chosen(logratios: torch.Tensor) -> torch.Tensor:
    """Which of `(2n,)` completions are the chosen ones: the first half."""
    return torch.arange(len(logratios), device=logratios.device) < len(logratios) // 2
