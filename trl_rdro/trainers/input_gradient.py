"""WDPO's input-gradient norms, differentiable with respect to the parameters without second derivatives.

Fused LM heads, FlashAttention, reentrant checkpointing, ZeRO-3 and FSDP2 have no double backward. But for the unit
vector v along g = grad_e l (e: the embeddings of a pair's two sequences)

    grad_theta ||g||  =  grad_theta ( v . grad_e l )  ~=  grad_theta [ l(e + h v) - l(e - h v) ] / (2 h)

with v fixed, needs first derivatives only. The slope on the right must itself equal ||g||, which is known exactly: the
gap between the two measures the error of every step, and the size of h is adapted by it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


@contextmanager
def hooked(module: nn.Module, hook: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Pass the module's output through `hook`. Unlike `inputs_embeds`, this works in every wrapper and engine."""
    handle = module.register_forward_hook(lambda _module, _args, output: hook(output))
    try:
        yield
    finally:
        handle.remove()


class InputGradient(NamedTuple):
    """The gradient of each pair's loss with respect to its embeddings."""

    norms: torch.Tensor  # (n,) ||g||, over all positions and dimensions of both sequences
    direction: torch.Tensor  # (2n, length, dim) v = g / ||g||
    embedding_norms: torch.Tensor  # (n,) ||e||, without padding
    dtype: torch.dtype  # what the model computes in


def _pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Norm of each pair of a batch [chosen, rejected]: (2n, length, dim) -> (n,)."""
    chosen, rejected = x.float().flatten(1).square().sum(dim=1).chunk(2)
    return (chosen + rejected).sqrt()


def input_gradient(
    forward: Callable[[], Any],
    embedding: nn.Module,
    pair_loss: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor,
) -> tuple[Any, InputGradient]:
    """One forward and one backward to the embeddings only.

    Args:
        forward: makes the forward pass and returns its output, which has `log_probs`.
        embedding: the module whose output is e.
        pair_loss: maps `log_probs` to the `(n,)` losses of the pairs.
        mask: `(2n, length)`, 0 at padding.

    Returns:
        The output, whose values belong to the unperturbed model, and the gradients.
    """
    captured: list[Any] = []  # the embeddings and the dtype of the forward

    def capture(output: torch.Tensor) -> torch.Tensor:
        device = output.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype
        captured[:] = output.detach().requires_grad_(), dtype
        return captured[0]

    with torch.enable_grad(), hooked(embedding, capture):
        outputs = forward()
        total = pair_loss(outputs.log_probs).sum()
        embeddings, dtype = captured
        (gradient,) = torch.autograd.grad(total, embeddings)
    norms = _pair_norms(gradient)
    direction = gradient.float() / norms.clamp(min=torch.finfo(norms.dtype).tiny).repeat(2).view(-1, 1, 1)
    embedding_norms = _pair_norms(embeddings.detach() * mask.unsqueeze(-1))
    return outputs, InputGradient(norms, direction, embedding_norms, dtype)


def perturbed_slopes(
    forward: Callable[[], Any],
    embedding: nn.Module,
    pair_loss: Callable[[torch.Tensor], torch.Tensor],
    gradient: InputGradient,
    step: float,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Central differences along the gradient, with their graph, in one forward of the doubled batch: the wrappers of
    distributed training expect one forward for one backward.

    Args:
        forward: makes the forward pass of [e + h v, e - h v], `(4n, length)`.
        step: h relative to ||e|| of the pair.

    Returns:
        The `(n,)` slopes, the `(2n, length - 1)` mean of the log-probabilities at the two points, and the output.
    """
    h = step * gradient.embedding_norms
    shift = gradient.direction * h.repeat(2).view(-1, 1, 1)
    shift = torch.cat([shift, -shift])
    with hooked(embedding, lambda output: output + shift.to(output.dtype)):
        outputs = forward()
    plus, minus = outputs.log_probs.chunk(2)
    slopes = (pair_loss(plus) - pair_loss(minus)) / (2 * h)
    return slopes, (plus + minus) / 2, outputs


class FiniteDifferenceStep(TrainerCallback, ExportableState):
    """The step of the central difference relative to ||e||, found by the gap it leaves.

    Too large a step is wrong by the loss's curvature, too small a one by rounding, so neither direction is right in
    advance: the step is halved until that makes the gap worse, then doubled, and so on. It is a callback in order that
    it is saved with each checkpoint, and a resumed run continues with the same steps.
    """

    DEFAULTS = {torch.float16: 1e-2, torch.bfloat16: 1e-2}  # others: 1e-3
    GOOD_GAP = 0.02
    SMALLEST, LARGEST = 2.0**-8, 2.0**4

    def __init__(self):
        self.scale = 1.0
        self.factor = 0.5
        self.last_gap = None

    def relative_step(self, dtype: torch.dtype) -> float:
        """h / ||e|| for a model that computes in `dtype`."""
        return self.scale * self.DEFAULTS.get(dtype, 1e-3)

    def adapt(self, gap: float) -> None:
        """Take in the relative gap that the present step has left. The same on every rank."""
        if gap <= self.GOOD_GAP:
            return
        if self.last_gap is not None and gap > self.last_gap:
            self.factor = 1 / self.factor
        self.last_gap = gap
        self.scale = min(max(self.scale * self.factor, self.SMALLEST), self.LARGEST)

    def state(self) -> dict:
        return {"args": {}, "attributes": dict(vars(self))}

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer restores callbacks only with `restore_callback_states_from_checkpoint`
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved:
            vars(self).update(saved["attributes"])
