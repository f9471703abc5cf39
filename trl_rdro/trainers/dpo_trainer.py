"""TRL's `DPOTrainer` with the losses of trl_rdro."""

from typing import Any

import torch
import trl

from .. import losses
from ..compat import engines
from ..compat import trl as trl_compat
from ..configs.density_ratio_config import DENSITY_RATIO_LOSSES
from ..configs.dpo_config import OUR_DPO_LOSSES, DPOConfig
from .common import (
    STEP_KEY,
    density_ratio_loss,
    describe_in_model_card,
    require_own_config,
    with_step_scales,
)
from .dataset_checks import check_datasets, require_preference_columns
from .input_gradient import FiniteDifferenceStep, input_gradient, perturbed_slopes
from .safeguards import Safeguards


class DPOTrainer(Safeguards, trl.DPOTrainer):
    """
    [`trl.DPOTrainer`] whose `loss_type` can also be `"ddro"`, `"rdro"`, `"kldpo"` or `"wdpo"`, alone or in a weighted
    list with TRL's. Takes the same arguments; runs without any of the four are TRL's own, to the last bit.

    Logged beside TRL's metrics when one of the four is used: `logratios/chosen` and `logratios/rejected`, the mean
    log-ratio to the reference model in nats; for `ddro` `ddro/capped_chosen` and `ddro/capped_rejected`, the share of
    completions beyond the cap; for `kldpo` `kldpo/effective_sample_size` and `kldpo/max_weight`, as fractions of the
    optimiser step's batch and of its total weight; for `wdpo` `wdpo/grad_norm`, `wdpo/penalty`, and in training
    `wdpo/gap`, the relative error of the central difference, and `wdpo/eps`, its relative step.

    KLDPO weighs the pairs of a whole optimiser step, over ranks and accumulated micro-batches. With
    `gradient_accumulation_steps > 1` this costs one gradient-free policy forward per micro-batch. In evaluation the
    weights are those of each evaluation batch. WDPO makes one more forward, a backward to the embeddings, and trains
    on a batch of twice the size (see `input_gradient.py`).

    Raises:
        `ValueError`: for data of the wrong kind, before the model is loaded.
        `TypeError`: for one of our losses in a plain `trl.DPOConfig`, which lacks their fields.
    """

    _reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        *rest,
        **kwargs,
    ):
        if args is None:
            args = DPOConfig(f"{trl_compat.model_name(model)}-DPO")
        requested = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
        ours = [loss_type for loss_type in requested if loss_type in OUR_DPO_LOSSES]
        require_own_config(args, ours, DPOConfig)
        example = check_datasets(require_preference_columns, train_dataset, eval_dataset)
        if "wdpo" in ours and example.keys() & {"image", "images"}:
            raise ValueError("`wdpo` perturbs text embeddings and is not defined for image data.")
        self._ours = ours
        self._unwrapped_of = None, None
        describe_in_model_card(self, ours)
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *rest, **kwargs)
        self._set_up_safeguards(given_reference=ref_model is not None)
        if "wdpo" in ours:
            engines.refuse_fsdp1(self.accelerator, "wdpo")
            self.add_callback(FiniteDifferenceStep)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ours = [pair for pair in zip(self.loss_types, self.loss_weights, strict=True) if pair[0] in OUR_DPO_LOSSES]
        if not ours:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs = dict(inputs)
        step = inputs.pop(STEP_KEY, {"index": 0, "scale": 1.0})
        # The reference first: its activations are gone before those of the policy come
        ref_logps = step["ref_logps"] if "ref_logps" in step else trl_compat.pair_reference_logps(self, inputs)
        grad_norms, metrics = None, {}
        if self._is_penalised(step["index"]):
            outputs, grad_norms = self._forward_with_grad_norms(model, inputs, ref_logps, metrics)
        else:
            outputs = trl_compat.policy_forward(self, model, inputs)
        logratios = self._logratios(outputs.log_probs, inputs, ref_logps)
        by_class = dict(zip(("chosen", "rejected"), logratios.chunk(2), strict=True))
        metrics |= {f"logratios/{label}": values.mean() for label, values in by_class.items()}

        our_losses = {}
        for name, _ in ours:
            if name in DENSITY_RATIO_LOSSES:
                values = self._density_ratio_loss(name, logratios, metrics)
            else:
                values = self._inner_loss(logratios, inputs)
                if name == "kldpo":
                    values = self._kldpo_loss(values, step, metrics)
                elif grad_norms is not None:
                    values = values + self._wdpo_penalty(grad_norms, metrics)
            our_losses[name] = step["scale"] * values.mean()
        means = self._record(our_losses, metrics, by_class)
        if "wdpo/gap" in means and self.args.wdpo_eps is None:
            self._finite_difference_step.adapt(means["wdpo/gap"])

        theirs = [pair for pair in zip(self.loss_types, self.loss_weights, strict=True) if pair not in ours]
        loss = sum(weight * our_losses[name] for name, weight in ours)
        result = trl_compat.pair_loss_and_metrics(self, model, inputs, outputs, ref_logps, theirs, return_outputs)
        return (loss + result[0], result[1]) if return_outputs else loss + result

    def _logratios(self, log_probs, inputs, ref_logps) -> torch.Tensor:
        """z of the completions, `(2n,)`: chosen, then rejected."""
        return trl_compat.completion_logps(self, log_probs, inputs["completion_mask"]) - ref_logps

    def _inner_loss(self, logratios: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The pairwise loss inside kldpo and wdpo, `(n,)`."""
        if self.args.inner_loss_type == "ipo":
            logratios = logratios / inputs["completion_mask"].sum(dim=1).clamp(min=1)
        chosen, rejected = logratios.chunk(2)
        margins = chosen - rejected
        if self.args.inner_loss_type == "ipo":
            return losses.ipo_loss(margins, self.beta)
        if self.args.inner_loss_type == "hinge":
            return losses.hinge_loss(margins, self.beta)
        return losses.sigmoid_loss(margins, self.beta, self.label_smoothing)

    def _density_ratio_loss(self, name: str, logratios: torch.Tensor, metrics: dict[str, torch.Tensor]):
        """ddro and rdro, `(n,)`: a pair is one preferred and one non-preferred completion, so half are preferred."""
        preferred = torch.arange(len(logratios), device=logratios.device) < len(logratios) // 2
        values, beyond_cap = density_ratio_loss(name, self.args, logratios, preferred, preferred_fraction=0.5)
        if beyond_cap is not None:
            chosen, rejected = beyond_cap.float().chunk(2)
            metrics |= {"ddro/capped_chosen": chosen.mean(), "ddro/capped_rejected": rejected.mean()}
        return sum(values.chunk(2))

    # KLDPO: weights over the pairs of the optimiser step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # The Trainer hands over the micro-batches of one optimiser step together
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batch_samples) > 1 and self._ours:
            batch_samples = with_step_scales(batch_samples)
            if "kldpo" in self.loss_types:
                self._weigh_step(batch_samples)
        return batch_samples, num_items_in_batch

    def _weigh_step(self, batch_samples: list[dict[str, Any]]) -> None:
        """Give each micro-batch the KLDPO weights of its pairs in the whole step, and the reference log-probabilities
        that were needed to find them."""
        model = self.model_wrapped
        model.train()  # as in the training step that follows
        pair_losses = []
        with engines.without_checkpointing(self), self.compute_loss_context_manager():
            for batch in batch_samples:
                inputs = self._prepare_inputs({key: value for key, value in batch.items() if key != STEP_KEY})
                ref_logps = trl_compat.pair_reference_logps(self, inputs)
                batch[STEP_KEY]["ref_logps"] = ref_logps
                outputs = trl_compat.policy_forward(self, model, inputs)
                pair_losses.append(self._inner_loss(self._logratios(outputs.log_probs, inputs, ref_logps), inputs))
        step_losses = self.accelerator.gather(torch.cat(pair_losses))
        for batch, values in zip(batch_samples, pair_losses, strict=True):
            batch[STEP_KEY]["log_weights"] = losses.kldpo_log_weights(values, self.args.kldpo_tau, step_losses)
            batch[STEP_KEY]["step_losses"] = step_losses

    def _kldpo_loss(self, pair_losses: torch.Tensor, step: dict[str, Any], metrics: dict[str, torch.Tensor]):
        # Set by the Trainer from the micro-batches it was handed
        accumulated = self.model.training and getattr(self, "current_gradient_accumulation_steps", 1) > 1
        if accumulated and "log_weights" not in step:
            raise RuntimeError(
                "`kldpo` was given a micro-batch of an accumulated step without the weights of the step, which "
                "`DPOTrainer.get_batch_samples` computes. Train with `DPOTrainer.train()`, or without accumulation."
            )
        tau = self.args.kldpo_tau
        step_losses = step["step_losses"] if accumulated else self.accelerator.gather(pair_losses.detach())
        relative = losses.kldpo_log_weights(step_losses, tau).exp()
        metrics["kldpo/effective_sample_size"] = 1 / relative.square().mean()
        metrics["kldpo/max_weight"] = relative.max() / len(relative)
        log_weights = step["log_weights"] if accumulated else losses.kldpo_log_weights(pair_losses, tau, step_losses)
        return losses.kldpo_loss(pair_losses, tau, log_weights)

    # WDPO: the norm of the input gradient

    def _forward_with_grad_norms(self, model, inputs, ref_logps, metrics) -> tuple[Any, torch.Tensor]:
        """The policy's outputs, and the `(n,)` norms of the input gradients of its pairs.

        Values are those of the unperturbed policy. In training both carry the graph of the perturbed forward: the
        outputs through the mean of the two sides, exact to second order in the step, the norms through their slope.
        """

        def pair_loss(log_probs):
            return self._inner_loss(self._logratios(log_probs, inputs, ref_logps), inputs)

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

        relative_step = self.args.wdpo_eps or self._finite_difference_step.relative_step(gradient.dtype)
        doubled = {key: torch.cat([value, value]) for key, value in inputs.items()}
        slopes, log_probs, perturbed = perturbed_slopes(
            lambda: trl_compat.policy_forward(self, model, doubled), embedding, pair_loss, gradient, relative_step
        )
        total = gradient.norms.sum()
        metrics["wdpo/gap"] = (slopes.detach() - gradient.norms).abs().sum() / total.clamp(min=1e-30)
        metrics["wdpo/eps"] = total.new_tensor(relative_step)
        outputs.log_probs = _value_and_gradient(outputs.log_probs, log_probs)
        outputs.aux_loss = perturbed.aux_loss
        return outputs, _value_and_gradient(gradient.norms, slopes)

    def _unwrapped(self, model) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The model without its wrappers, and its input embeddings. Looked up once for each wrapper: accelerate looks
        for installed packages on the disk every time."""
        if self._unwrapped_of[0] is not model:
            unwrapped = self.accelerator.unwrap_model(model), trl_compat.input_embeddings(self)
            self._unwrapped_of = model, unwrapped
        return self._unwrapped_of[1]

    def _is_penalised(self, index: int) -> bool:
        """Whether WDPO's penalty is computed on the micro-batch of this index in the present optimiser step."""
        if "wdpo" not in self.loss_types or self.args.wdpo_rho == 0:
            return False
        micro_batch = self.state.global_step * self.args.gradient_accumulation_steps + index
        return not self.model.training or micro_batch % self.args.wdpo_interval == 0

    def _wdpo_penalty(self, grad_norms: torch.Tensor, metrics: dict[str, torch.Tensor]) -> torch.Tensor:
        kind, mean_square = self.args.wdpo_penalty, None
        if kind == "rms":
            mean_square = self.accelerator.gather(grad_norms.detach().square()).mean()
        penalty = losses.wdpo_penalty(grad_norms, self.args.wdpo_rho, kind, mean_square)
        metrics |= {"wdpo/grad_norm": grad_norms.mean(), "wdpo/penalty": penalty.mean()}
        # Weighs for the micro-batches that are passed over
        return penalty * self.args.wdpo_interval if self.model.training else penalty

    @property
    def _finite_difference_step(self) -> FiniteDifferenceStep:
        # Looked up, because resuming can replace callbacks
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, FiniteDifferenceStep))


def _value_and_gradient(value: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
    """A tensor with the value of one and the gradient of the other."""
    return value.detach() + (graph - graph.detach())
