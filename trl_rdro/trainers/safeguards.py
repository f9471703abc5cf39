"""What keeps a run from going wrong in silence: finite losses, guard rails, a known reference."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset

from ..compat import engines
from ..compat import trl as trl_compat
from ..errors import NotFinite
from ..log import get_logger
from .checkpoints import Checkpoints, non_finite_parameters
from .guard_rails import GuardRails
from .noise import NoiseState
from .normalisation import Normalisation, completions, over_ranks
from .start import distance_from_reference, first_step_sentence, require_trainable, share_that_cannot_move


logger = get_logger(__name__)

MANY_STUCK = 0.5  # of the trained parameters


class Safeguards(Checkpoints):
    """Mixin of the trainers, before TRL's class."""

    # Whether a run that is not resumed starts with the policy equal to the reference
    _starts_at_reference = True
    _rate_was_looked_at = False

    def _set_up_safeguards(self, model: Any, given_reference: bool) -> None:
        require_trainable(self.model)
        self._guard_rails = GuardRails(self.args)
        self._normalisation = Normalisation()
        self._starts_at_reference = self._starts_at_reference and not given_reference
        self._evaluation_prefix = "eval"
        logger.info(f"Reference model: {self._describe_reference(model, given_reference)}.")
        if self._ours and (adapters := engines.full_precision_adapters(self)):  # with TRL's losses they are as TRL's
            logger.info(f"Adapters of the quantised model: {adapters}.")
        if self._ours and trl_compat.overrides_compute_loss(self):
            logger.warning(
                f"`{type(self).__name__}._compute_loss` is not called with {' and '.join(self._ours)}: override "
                "`compute_loss`, which TRL documents."
            )

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self._ours:
            engines.full_precision_outputs(self.accelerator)

    # Metrics

    def _record(
        self,
        losses: dict[str, torch.Tensor],
        metrics: dict[str, torch.Tensor],
        logratios: Callable[[], dict[str, torch.Tensor]],
        pairs: int,
        totals: dict[str, float] | None = None,
        log_sums: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Log metrics as their means over the ranks, and look at them.

        Args:
            losses: the scalar of each of our losses, to be checked only: TRL logs their sum.
            metrics: scalars to log.
            logratios: gives the samples' log-ratios by class, for the message.
            pairs: in this process's micro-batch, or completions of each class.
            totals: metrics over all ranks already.
            log_sums: `normalisation_sums` of the micro-batch, with a density-ratio loss.

        Returns:
            The metrics' means.

        Raises:
            `FloatingPointError`: in training, on every rank at once, if a loss or a metric is not finite.
        """
        prefix = "loss of "
        scalars = {**{prefix + name: loss for name, loss in losses.items()}, **metrics}
        means, sums_of_ranks = trl_compat.means_and_more(self, scalars, log_sums)
        bad = [name.removeprefix(prefix) for name, value in means.items() if not math.isfinite(value)]
        step = self.state.global_step + 1
        if bad:
            samples = "; ".join(f"{label} {values.tolist()}" for label, values in logratios().items())
            sentence = f"`{'`, `'.join(losses)}` at step {step}: {', '.join(bad)} not finite. " + self._why_not_finite(
                f"Log-ratios of this process's samples: {samples}. "
            )
            if self.model.training:
                raise NotFinite(sentence)
            self._guard_rails.warn_once("not finite", sentence)
        means = {name: value for name, value in means.items() if not name.startswith(prefix)} | (totals or {})
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)  # set by the Trainer
        if log_sums is not None:
            sums = over_ranks(sums_of_ranks)
            if self.model.training:
                means |= self._normalisation.of_step(step, sums, micro_batches)
            else:
                self._normalisation.of_evaluation(sums)
        trl_compat.log_metrics(self, means)
        if self.model.training:
            pairs *= self.accelerator.num_processes
            self._guard_rails.watch(step, means, pairs * micro_batches, pairs)
        return means

    def training_step(self, *args, **kwargs):
        is_first = self.state.global_step == 0 and self._starts_at_reference and self._resumed_from is None
        noise = NoiseState(self.accelerator.device) if is_first else None
        loss = super().training_step(*args, **kwargs)
        # Ours were looked at before the backward pass, and of TRL's beside them the gradient is, but for these
        is_mixed = len(getattr(self, "loss_types", self._ours)) > len(self._ours)
        is_unseen = not self._ours or (is_mixed and (self.args.fp16 or self.is_deepspeed_enabled))
        if is_unseen and not math.isfinite(trl_compat.mean_over_ranks(self, {"loss": loss})["loss"]):
            raise NotFinite(f"The loss at step {self.state.global_step + 1} is not finite. " + self._why_not_finite())
        if noise is not None:
            self._starts_at_reference = False  # looked at once
            if not noise.was_drawn_from():
                self._look_at_the_start()
        if not self._rate_was_looked_at:
            self._rate_was_looked_at = True
            self._look_at_the_rate()
        return loss

    def _look_at_the_start(self) -> None:
        metrics = {name: values[-1] for name, values in self._metrics["train"].items() if values}
        dtype = torch.bfloat16 if self.args.bf16 or self.args.fp16 else next(self.model.parameters()).dtype
        if distance := distance_from_reference(metrics, self.beta, dtype):
            has_columns = self._brings_reference(self.train_dataset)
            self._guard_rails.warn_once("first step", first_step_sentence(distance, has_columns))

    def _look_at_the_rate(self) -> None:
        stuck = share_that_cannot_move(self.model, self.args.learning_rate)
        if stuck > MANY_STUCK and not self.is_deepspeed_enabled:  # which trains float32 copies
            self._guard_rails.warn_once(
                "stuck",
                f"{stuck:.0%} of the trained parameters cannot move at `learning_rate={self.args.learning_rate}`: the "
                f"update is less than half of their last digit in half precision. Load the model in float32 "
                "(`dtype: float32`, with `bf16: true` for the computation), or raise the rate.",
            )

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # With a loss scale an overflow is a step that the scaler passes over
        if not self.args.fp16 and norm is not None and not math.isfinite(norm):
            raise NotFinite(
                f"The gradient norm at step {self.state.global_step + 1} is not finite. " + self._why_not_finite()
            )
        return norm

    def _why_not_finite(self, samples: str = "") -> str:
        """What to look at: the parameters, where they are not finite themselves."""
        if bad := non_finite_parameters(self.model, trained_only=False):
            origin = f"the checkpoint {self._resumed_from}" if self._resumed_from else "the model as it was loaded"
            return (
                f"{samples}{len(bad)} of the model's parameters are not finite themselves, {bad[0]} first. The run "
                f"began with {origin}: look at the parameters there, and go on from an older checkpoint."
            )
        if self.ref_model is not None and (bad := non_finite_parameters(self.ref_model, trained_only=False)):
            return (
                f"{samples}{len(bad)} of the reference model's parameters are not finite, {bad[0]} first: load it "
                "anew, or give another."
            )
        return (
            f"{samples}Look at the samples and at the precision: float16 overflows where bfloat16 does not. The "
            "model's parameters are finite."
        )

    # Several evaluation sets

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._evaluation_prefix = metric_key_prefix
        self._normalisation.begin_evaluation()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics, sums = self._normalisation.evaluated()
        trl_compat.log_metrics(self, metrics)
        self._guard_rails.watch_reference(metrics, completions(sums), f"In `{metric_key_prefix}`")
        return output

    def log(self, logs, start_time=None):
        if not self.model.training and self._evaluation_prefix != "eval":
            # TRL would call them all "eval_...", and each set's would take the place of the last one's
            means = trl_compat.take_metrics(self)
            logs |= {f"{self._evaluation_prefix}_{name}": value for name, value in means.items()}
        super().log(logs, start_time)

    # Reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self._brings_reference(dataset):
            logger.info(f"Reference log-probabilities of the {name} data set: taken from its columns.")
            return dataset
        with trl_compat.precise_precompute_key(self):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        with trl_compat.reference_pass(self.model):
            return super().compute_ref_log_probs(model, inputs)

    def _brings_reference(self, dataset: Any) -> bool:
        return set(self._reference_columns) <= set(dataset.column_names or ())

    def _describe_reference(self, model: Any, given: bool) -> str:
        if self.precompute_ref_logps:
            return "log-probabilities computed before training or brought by the data set"
        if self._brings_reference(self.train_dataset):
            logger.warning(
                f"The columns {' and '.join(self._reference_columns)} of the training set are not used. Set "
                "`precompute_ref_log_probs=True` to take the reference log-probabilities from them."
            )
        if given:
            return "the given `ref_model`"
        if not is_peft_model(self.model):
            name = trl_compat.model_name(self.model)
            if isinstance(model, str):
                return f"a copy of {name} as it is before training"
            return f"{name}, loaded again from where it came from: changes made to the model in memory are not in it"
        if "ref" in self.model.peft_config:
            return "a frozen copy of the given adapter"
        return "the base model, with the adapter switched off"
