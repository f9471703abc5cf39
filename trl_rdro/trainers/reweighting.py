"""Losses that weigh the pairs of an optimiser step against one another: kldpo, and whatever has a temperature."""

from typing import Any

import torch

from .. import losses
from ..compat import engines
from ..compat import trl as trl_compat
from ..losses.types import LOSS_TYPES
from . import objectives
from .columns import split_columns, weighted
from .hosts import PairHost
from .noise import NoiseState
from .step import Step, split_step


class Reweighting(PairHost):
    """
    Mixin of `DPOTrainer`, before TRL's class.

    The weights span the whole optimiser step, over ranks and accumulated micro-batches. With accumulation one
    gradient-free policy forward for each micro-batch finds them before the step; the forward that is trained on gets
    the same noise, so that the weights belong to the losses that they multiply.
    """

    def _prepare_step(self, batch_samples: list[dict[str, Any]]) -> None:
        """Let each micro-batch of an accumulated step know the losses of all its pairs, if a loss in use weighs them,
        and the reference log-probabilities that were needed to find them."""
        if not any(LOSS_TYPES[name].temperature for name in self._ours):
            return
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
        own, of_step = step.pair_losses, step.all_pair_losses
        if not accumulated:
            own, of_step = pair_losses, self.accelerator.gather(pair_losses.detach())
        elif own is None or of_step is None:
            raise RuntimeError(
                f"`{name}` was given a micro-batch of an accumulated step without the weights of the step, which "
                "`DPOTrainer.get_batch_samples` computes. Train with `DPOTrainer.train()`, or without accumulation."
            )
        tau = objectives.temperature(name, self.args)
        relative = losses.kldpo_log_weights(of_step, tau).exp()
        metrics[f"{name}/effective_sample_size"] = 1 / relative.square().mean()
        metrics[f"{name}/max_weight"] = relative.max() / len(relative)
        log_weights = losses.kldpo_log_weights(own, tau, of_step)
        return losses.kldpo_loss(pair_losses, tau, log_weights)
