"""Losses that weigh the pairs of an optimiser step against one another: kldpo, and whatever has a temperature."""

from typing import Any

import torch

from .. import losses
from ..compat import engines
from ..compat import trl as trl_compat
from ..log import get_logger
from ..losses.types import LOSS_TYPES
from . import objectives
from .columns import split_columns, weighted
from .graphs import value_and_gradient
from .hosts import PairHost
from .noise import NoiseState
from .step import Step, split_step
from .step_weights import StepWeights


logger = get_logger(__name__)


class Reweighting(PairHost):
    """
    Mixin of `DPOTrainer`, before TRL's class.

    The weights span the whole optimiser step, over ranks and accumulated micro-batches. With accumulation they are not
    known before its last micro-batch. Where nothing stands against it the gradients are accumulated with weights up to
    a factor, and divided by that at the step's end (`step_weights.py`). Elsewhere one gradient-free policy forward for
    each micro-batch finds the weights before the step; the forward that is trained on gets the same noise, so that
    they belong to the losses that they multiply.
    """

    def _set_up_reweighting(self) -> None:
        names = self._weighing_losses
        if names and self.args.gradient_accumulation_steps > 1:
            reason = self._reason_to_weigh_before()
            logger.info(
                f"`{names[0]}`: the pairs of a step are weighed "
                + (f"by one more forward of each before it: {reason}." if reason else "in one pass over it.")
            )

    @property
    def _weighing_losses(self) -> list[str]:
        return [name for name in self._ours if LOSS_TYPES[name].temperature]

    def _reason_to_weigh_before(self) -> str | None:
        """Why the weights must be known before the step; `None`: they need not, since all that is in the gradients can
        be divided by one number at the step's end."""
        if "kldpo" in self._weighing_losses and self.args.kldpo_target_ess is not None:
            return "`kldpo_target_ess` asks for the losses of the whole step"
        if len(self.loss_types) > 1:
            return "another loss stands beside it"
        if self.aux_loss_enabled:
            return "the auxiliary loss of a mixture of experts stands beside it"
        if self.accelerator.mixed_precision == "fp16":
            return "fp16 scales the gradients already"
        return engines.reason_not_to_scale_gradients(self.accelerator)

    def _prepare_step(self, batch_samples: list[dict[str, Any]]) -> None:
        """Let the micro-batches of an accumulated step share its weights, if a loss in use weighs its pairs."""
        if not self._weighing_losses:
            return
        if self._reason_to_weigh_before() is None:
            weights = StepWeights(objectives.temperature(self._weighing_losses[0], self.args))
            for batch in batch_samples:
                split_step(batch)[1].weights = weights
        else:
            self._weigh_before(batch_samples)

    def _weigh_before(self, batch_samples: list[dict[str, Any]]) -> None:
        """Let each micro-batch know the losses of all the step's pairs, and the reference log-probabilities that were
        needed to find them."""
        model = self.model_wrapped
        model.train()  # as in the training step that follows
        steps, pair_losses = [], []
        with engines.without_checkpointing(self), self.compute_loss_context_manager():
            for batch in batch_samples:
                inputs, step = split_step(batch)
                inputs, columns = split_columns(self._prepare_inputs(inputs))
                step.ref_logps = trl_compat.pair_reference_logps(self, inputs)
                step.columns = columns = self._complete(columns, inputs, step.ref_logps)
                noise = NoiseState(self.accelerator.device)
                outputs = trl_compat.policy_forward(self, model, inputs)
                step.noise = noise if noise.was_drawn_from() else None
                logratios = self._logratios(outputs.log_probs, inputs, step.ref_logps)
                values = self._pair_loss(self.args.inner_loss_type, logratios, inputs, columns)
                pair_losses.append(weighted(values, columns))
                steps.append(step)
        all_pair_losses = self.accelerator.gather(torch.cat(pair_losses))
        for step, values in zip(steps, pair_losses, strict=True):
            step.pair_losses, step.all_pair_losses = values, all_pair_losses

    def _reweighted(
        self, name: str, pair_losses: torch.Tensor, step: Step, metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The robust loss `name` of `(n,)` pair losses, `(n,)`."""
        # Set by the Trainer from the micro-batches it was handed
        accumulated = self.model.training and getattr(self, "current_gradient_accumulation_steps", 1) > 1
        if accumulated and step.weights is not None:
            return self._weighed_in_one_pass(name, pair_losses, step, step.weights, metrics)
        own, of_step = step.pair_losses, step.all_pair_losses
        if not accumulated:
            own, of_step = pair_losses, self.accelerator.gather(pair_losses.detach())
        elif own is None or of_step is None:
            raise RuntimeError(
                f"`{name}` was given a micro-batch of an accumulated step without the weights of the step, which "
                "`DPOTrainer.get_batch_samples` computes. Train with `DPOTrainer.train()`, or without accumulation."
            )
        tau = objectives.temperature(name, self.args, of_step)
        if name == "kldpo" and self.args.kldpo_target_ess is not None:
            metrics["kldpo/tau"] = of_step.new_tensor(tau)
        _log_weights(name, of_step, tau, metrics)
        log_weights = losses.kldpo_log_weights(own, tau, of_step)
        return losses.kldpo_loss(pair_losses, tau, log_weights)

    def _weighed_in_one_pass(
        self,
        name: str,
        pair_losses: torch.Tensor,
        step: Step,
        weights: StepWeights,
        metrics: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """`(n,)`: with the gradient up to the factor by which `training_step` divides, and with the value of the whole
        step in its last micro-batch, nothing before."""
        factor = weights.take(self.accelerator.gather(pair_losses.detach()))
        if factor != 1:
            engines.scale_gradients(self.model_wrapped, factor)
        value = torch.zeros_like(pair_losses)
        if step.is_last:
            _log_weights(name, weights.all_pair_losses, weights.tau, metrics)
            value += step.count / step.scale * weights.objective
        return value_and_gradient(value, weights.of(pair_losses) * pair_losses)

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = split_step(inputs)[1]
        if step.weights is not None and step.is_last:
            # Before they are clipped
            engines.scale_gradients(model, 1 / step.weights.mean)
        return loss


def _log_weights(name: str, of_step: torch.Tensor, tau: float, metrics: dict[str, torch.Tensor]) -> None:
    relative = losses.kldpo_log_weights(of_step, tau).exp()
    metrics[f"{name}/effective_sample_size"] = 1 / relative.square().mean()
    metrics[f"{name}/max_weight"] = relative.max() / len(relative)
