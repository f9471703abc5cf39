"""WDPO's passes: the one loss that needs more of the model than its log-probabilities."""

from typing import Any

import torch

from .. import losses
from ..compat import engines
from ..compat import trl as trl_compat
from .graphs import value_and_gradient
from .hosts import PairHost
from .input_gradient import FiniteDifferenceStep, input_gradient, perturbed_slopes
from .noise import NoiseState


class InputGradientPenalty(PairHost):
    """Mixin of `DPOTrainer`, before TRL's class: the norm of the gradient of each pair's loss with respect to its
    embeddings, and the penalty on it. See `input_gradient.py` for the mathematics."""

    def _set_up_input_gradient_penalty(self) -> None:
        self._unwrapped_of: tuple[Any, Any] = None, None
        if "wdpo" in self._ours:
            engines.refuse_fsdp1(self.accelerator, "wdpo")
            self.add_callback(FiniteDifferenceStep)

    def _is_penalised(self, index: int) -> bool:
        """Whether the penalty is computed on the micro-batch of this index in the present optimiser step."""
        if "wdpo" not in self._ours or self.args.wdpo_rho == 0:
            return False
        micro_batch = self.state.global_step * self.args.gradient_accumulation_steps + index
        return not self.model.training or micro_batch % self.args.wdpo_interval == 0

    def _forward_with_grad_norms(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        ref_logps: torch.Tensor,
        columns: dict[str, torch.Tensor],
        metrics: dict[str, torch.Tensor],
    ) -> tuple[Any, torch.Tensor]:
        """The policy's outputs, and the `(n,)` norms of the input gradients of its pairs.

        Values are those of the unperturbed policy. In training both carry the graph of the perturbed forward: the
        outputs through the mean of the two sides, exact to second order in the step, the norms through their slope.
        """

        def pair_loss(log_probs):
            logratios = self._logratios(log_probs, inputs, ref_logps)
            return self._pair_loss(self.args.inner_loss_type, logratios, inputs, columns)

        noise = NoiseState(self.accelerator.device)
        bare_model, embedding = self._unwrapped(model)  # bare: no gradient is to be reduced for its forward
        with engines.non_reentrant_checkpointing(self), engines.frozen_head(bare_model):
            outputs, gradient = input_gradient(
                lambda: trl_compat.policy_forward(self, bare_model, inputs),
                embedding,
                pair_loss,
                inputs["attention_mask"],
            )
        if not torch.is_grad_enabled():
            return outputs, gradient.norms

        if noisy := noise.was_drawn_from():
            engines.refuse_two_forwards(self, "wdpo")
        relative_step = self.args.wdpo_eps or self._finite_difference_step.relative_step(gradient.dtype)
        slopes, log_probs, outputs.aux_loss = perturbed_slopes(
            lambda copies: trl_compat.policy_forward(
                self, model, {key: torch.cat([value] * copies) for key, value in inputs.items()}
            ),
            embedding,
            pair_loss,
            gradient,
            relative_step,
            noise if noisy else None,
        )
        total = gradient.norms.sum()
        metrics["wdpo/gap"] = (slopes.detach() - gradient.norms).abs().sum() / total.clamp(min=1e-30)
        metrics["wdpo/eps"] = total.new_full((), relative_step)
        outputs.log_probs = value_and_gradient(outputs.log_probs, log_probs)
        return outputs, value_and_gradient(gradient.norms, slopes)

    def _unwrapped(self, model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The model without its wrappers, and its input embeddings. Looked up once for each wrapper: accelerate looks
        for installed packages on the disk every time."""
        if self._unwrapped_of[0] is not model:
            unwrapped = self.accelerator.unwrap_model(model), trl_compat.input_embeddings(self)
            self._unwrapped_of = model, unwrapped
        return self._unwrapped_of[1]

    def _penalty(
        self, grad_norms: torch.Tensor, columns: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The penalty of each pair, `(n,)`. It is of squares, so that a pair's weight enters the norm by its root."""
        kind, mean_square = self.args.wdpo_penalty, None
        metrics["wdpo/grad_norm"] = grad_norms.mean()
        if "weight" in columns:
            grad_norms = grad_norms * columns["weight"].sqrt()
        if kind == "rms":
            mean_square = self.accelerator.gather(grad_norms.detach().square()).mean()
        penalty = losses.wdpo_penalty(grad_norms, self.args.wdpo_rho, kind, mean_square)
        metrics["wdpo/penalty"] = penalty.mean()
        # Weighs for the micro-batches that are passed over
        return penalty * self.args.wdpo_interval if self.model.training else penalty

    def _adapt_finite_difference(self, means: dict[str, float]) -> None:
        """Let the step of the central difference follow the gap it left, unless it was set by hand."""
        if "wdpo/gap" in means and self.args.wdpo_eps is None:
            self._finite_difference_step.adapt(means["wdpo/gap"])

    @property
    def _finite_difference_step(self) -> FiniteDifferenceStep:
        # Looked up, because resuming can replace callbacks
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, FiniteDifferenceStep))
