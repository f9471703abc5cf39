"""WDPO's passes: the one loss that needs more of the model than its log-probabilities."""

from collections.abc import Callable
from typing import Any

import torch

from .. import losses
from ..compat import engines
from ..compat import trl as trl_compat
from .graphs import value_and_gradient
from .hosts import PairHost
from .input_gradient import FiniteDifferenceStep, InputGradient, input_gradient, perturbed_slopes
from .noise import NoiseState
from .one_sided import first_pass, kept_from_1, second_pass, signs
from .step import Step


class InputGradientPenalty(PairHost):
    """Mixin of `DPOTrainer`, before TRL's class: the norm of the gradient of each pair's loss with respect to its
    embeddings, and the penalty on it. See `input_gradient.py` and `one_sided.py` for the mathematics."""

    def _set_up_input_gradient_penalty(self) -> None:
        self._unwrapped_of: tuple[Any, Any] = None, None
        if "wdpo" in self._ours:
            engines.refuse_fsdp1(self.accelerator, "wdpo")
            if self.args.wdpo_difference == "one_sided":
                self._refuse_two_backwards()
            self.add_callback(FiniteDifferenceStep)

    def _refuse_two_backwards(self) -> None:
        reason = engines.reason_for_one_backward(self.accelerator)
        if self.aux_loss_enabled:
            reason = "the auxiliary loss of a mixture of experts would be in the gradient that the step is taken along"
        if reason:
            raise ValueError(
                f"`wdpo_difference='one_sided'` cannot be used here: {reason}. Set `wdpo_difference='central'`."
            )

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
        step: Step,
        metrics: dict[str, torch.Tensor],
    ) -> tuple[Any, torch.Tensor]:
        """The policy's outputs, and the `(n,)` norms of the input gradients of its pairs.

        Values are those of the unperturbed policy. In training with a central difference both carry the graph of the
        perturbed forward: the outputs through the mean of the two sides, exact to second order in the step, the norms
        through their slope. With a one-sided one the norms alone do, and what else is in the gradient was added to it.
        """

        def pair_loss(log_probs):
            logratios = self._logratios(log_probs, inputs, ref_logps)
            return self._pair_loss(self.args.inner_loss_type, logratios, inputs, columns)

        one_sided = self.args.wdpo_difference == "one_sided" and torch.is_grad_enabled()
        if one_sided and (share := self._finite_difference_step.share) is not None:
            return self._one_sided(share, model, inputs, pair_loss, columns, step, metrics)
        noise = NoiseState(self.accelerator.device)
        outputs, gradient = self._input_gradient(model, inputs, pair_loss)
        if not torch.is_grad_enabled():
            return outputs, gradient.norms
        if one_sided:  # for the first time
            share = self._finite_difference_step.share = self._first_share(gradient)
            if noise.was_drawn_from():
                noise.restore()
            # Any k will do where no pair has a gradient: none is moved
            return self._one_sided(share or 1.0, model, inputs, pair_loss, columns, step, metrics)

        if noisy := noise.was_drawn_from():
            engines.refuse_two_forwards(self, "wdpo")
        relative_step = self._relative_step(gradient)
        slopes, log_probs, outputs.aux_loss = perturbed_slopes(
            lambda copies: trl_compat.policy_forward(
                self, model, {key: torch.cat([value] * copies) for key, value in inputs.items()}
            ),
            self._unwrapped(model)[1],
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

    def _input_gradient(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        pair_loss: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[Any, InputGradient]:
        """The policy's outputs, and the gradients of its pairs' losses at the embeddings."""
        bare_model, embedding = self._unwrapped(model)  # bare: no gradient is to be reduced for its forward
        with engines.non_reentrant_checkpointing(self), engines.frozen_head(bare_model):
            return input_gradient(
                lambda: trl_compat.policy_forward(self, bare_model, inputs),
                embedding,
                pair_loss,
                inputs["attention_mask"],
            )

    def _one_sided(
        self,
        share: float,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        pair_loss: Callable[[torch.Tensor], torch.Tensor],
        columns: dict[str, torch.Tensor],
        step: Step,
        metrics: dict[str, torch.Tensor],
    ) -> tuple[Any, torch.Tensor]:
        """`_forward_with_grad_norms` by a one-sided difference. `share` is its k, as it was adapted so far."""

        def forward() -> Any:
            return trl_compat.policy_forward(self, model, inputs)

        embedding, mask = self._unwrapped(model)[1], inputs["attention_mask"]
        share = kept_from_1(share)
        seed = self.args.seed * 1_000_003 + self.state.global_step
        sides = signs(inputs["input_ids"], mask, seed).float()
        # As the pairs' losses enter what the Trainer makes of the micro-batch's loss
        weights = (1 - share * sides) * self.loss_weights[0] * step.scale / len(sides)
        weights = weights / getattr(self, "current_gradient_accumulation_steps", 1)
        if "weight" in columns:
            weights = weights * columns["weight"]
        noise = NoiseState(self.accelerator.device)
        with engines.without_gradient_sync(self.accelerator, model):
            outputs, losses, gradient = first_pass(
                forward, embedding, pair_loss, weights, engines.backward(self.accelerator), mask
            )
        if noise.was_drawn_from():
            noise.restore()
        eps = 2 * self._coefficient(gradient.norms, columns) / share * sides
        moved = second_pass(forward, embedding, pair_loss, gradient, eps)
        lengths = sides * (eps.abs() * gradient.norms).clamp(min=1e-30)
        slopes = (moved.detach() - losses) / lengths
        metrics["wdpo/gap"] = (slopes - gradient.norms).abs().sum() / gradient.norms.sum().clamp(min=1e-30)
        # Of the pairs that were moved: a weight of 0 or a hinge that is met leaves others where they are
        embeddings = (gradient.embedding_norms * (gradient.norms > 0)).sum()
        metrics["wdpo/eps"] = (eps.abs() * gradient.norms).sum() / embeddings.clamp(min=1e-30)
        self._wanted_step = self._relative_step(gradient)
        return outputs, value_and_gradient(gradient.norms, moved / lengths)

    def _first_share(self, gradient: InputGradient) -> float | None:
        """k with which a step of the wanted length is taken, of gradients like these; `None` where all are 0."""
        moved = gradient.norms > 0
        scalars = {"norm": gradient.norms.mean(), "embeddings": (gradient.embedding_norms * moved).mean()}
        means = trl_compat.mean_over_ranks(self, scalars)
        norm = means["norm"]
        if norm == 0:
            return None
        eps = self._relative_step(gradient) * means["embeddings"] / norm
        return 2 * float(self._coefficient(torch.tensor([norm]), {})) / eps

    def _coefficient(self, norms: torch.Tensor, columns: dict[str, torch.Tensor]) -> float | torch.Tensor:
        """c of the penalty's gradient, that of c ||g||^2 with c constant."""
        rho = self.args.wdpo_rho * self.args.wdpo_interval
        if self.args.wdpo_penalty == "squared":
            return rho
        return rho / (2 * self._mean_square(norms, columns).sqrt().clamp(min=1e-18))

    def _relative_step(self, gradient: InputGradient) -> float:
        return self.args.wdpo_eps or self._finite_difference_step.relative_step(gradient.dtype)

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
        kind = self.args.wdpo_penalty
        metrics["wdpo/grad_norm"] = grad_norms.mean()
        mean_square = self._mean_square(grad_norms, columns) if kind == "rms" else None
        if "weight" in columns:
            grad_norms = grad_norms * columns["weight"].sqrt()
        penalty = losses.wdpo_penalty(grad_norms, self.args.wdpo_rho, kind, mean_square)
        metrics["wdpo/penalty"] = penalty.mean()
        # Weighs for the micro-batches that are passed over
        return penalty * self.args.wdpo_interval if self.model.training else penalty

    def _mean_square(self, grad_norms: torch.Tensor, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        """Over the pairs of all ranks, by their weights."""
        squares = grad_norms.detach().square()
        return self.accelerator.gather(columns["weight"] * squares if "weight" in columns else squares).mean()

    def _adapt_finite_difference(self, means: dict[str, float]) -> None:
        """Let the step of the difference follow the gap it left, unless it was set by hand."""
        if "wdpo/gap" not in means:
            return
        if self.args.wdpo_difference == "one_sided":
            self._finite_difference_step.adapt_share(means["wdpo/eps"], self._wanted_step)
        if self.args.wdpo_eps is None:
            self._finite_difference_step.adapt(means["wdpo/gap"])

    @property
    def _finite_difference_step(self) -> FiniteDifferenceStep:
        # Looked up, because resuming can replace callbacks
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, FiniteDifferenceStep))
