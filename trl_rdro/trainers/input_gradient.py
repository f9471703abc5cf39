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

from ..packing.attention import CURRENT
from .noise import NoiseState


@contextmanager
def hooked(module: nn.Module, hook: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Pass the module's output through `hook`. Unlike `inputs_embeds`, this works in every wrapper and engine.

    The hook sees and returns a padded batch, `(rows, length, dim)`, also where the model forwards a packed row.
    """

    def padded_hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        layout = CURRENT.get()
        return hook(output) if layout is None else layout.pack(hook(layout.pad(output)))

    handle = module.register_forward_hook(padded_hook)
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


def pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Norm of each pair of a batch [chosen, rejected]: (2n, length, dim) -> (n,)."""
    chosen, rejected = x.float().flatten(1).square().sum(dim=1).chunk(2)
    return (chosen + rejected).sqrt()


def normalised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair's part of `(2n, length, dim)` divided by its norm, or 0 where that is 0; and the `(n,)` norms."""
    norms = pair_norms(x)
    return x.float() / norms.clamp(min=torch.finfo(norms.dtype).tiny).repeat(2).view(-1, 1, 1), norms


def model_dtype(output: torch.Tensor) -> torch.dtype:
    """What a model computes in, by the output of its embeddings and the context."""
    device = output.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype


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
        captured[:] = output.detach().requires_grad_(), model_dtype(output)
        return captured[0]

    with torch.enable_grad(), hooked(embedding, capture):
        outputs = forward()
        embeddings, dtype = captured
        (slopes,) = torch.autograd.grad(pair_loss(outputs.log_probs).sum(), outputs.log_probs, retain_graph=True)
        scales = _power_of_two_scales(slopes)
        (scaled,) = torch.autograd.grad(
            outputs.log_probs, embeddings, grad_outputs=slopes * scales.repeat(2).unsqueeze(1)
        )
    direction, scaled_norms = normalised(scaled)
    embedding_norms = pair_norms(embeddings.detach() * mask.unsqueeze(-1))
    return outputs, InputGradient(scaled_norms / scales, direction, embedding_norms, dtype)


def _power_of_two_scales(slopes: torch.Tensor) -> torch.Tensor:
    """Factors `(n,)` that bring the largest of each pair's `(2n, length - 1)` slopes to between .05 and .1, exactly.

    Without them the squares of a pair with a large margin vanish in float32, and its direction with them, and with a
    small beta the gradient itself vanishes in float16 on its way to the embeddings.
    """
    chosen, rejected = slopes.abs().amax(dim=1).float().chunk(2)
    largest = torch.maximum(chosen, rejected)
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(0.1 / largest)).clamp(-100, 100)), 1.0)


def adding(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook for `hooked` that adds `shift`, `(rows, length, dim)`."""
    return lambda output: output + shift.to(output.dtype)


def perturbed_slopes(
    forward: Callable[[int], Any],
    embedding: nn.Module,
    pair_loss: Callable[[torch.Tensor], torch.Tensor],
    gradient: InputGradient,
    step: float,
    noise: NoiseState | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Central differences along the gradient, with their graph.

    Without noise in one forward of the doubled batch [e + h v, e - h v]: the wrappers of distributed training expect
    one forward for one backward. With noise in two, each with that of the forward that gave the gradient: a doubled
    batch would draw other masks for its second half.

    Args:
        forward: makes the forward pass of so many copies of the batch, `(copies * 2n, length)`.
        step: h relative to ||e|| of the pair.
        noise: the state before the forward that gave `gradient`, if that drew from it.

    Returns:
        The `(n,)` slopes, the `(2n, length - 1)` mean of the log-probabilities at the two points, and the mean of the
        outputs' `aux_loss`, if they have one.
    """
    h = step * gradient.embedding_norms
    shift = gradient.direction * h.repeat(2).view(-1, 1, 1)
    sides = [torch.cat([shift, -shift])] if noise is None else [shift, -shift]
    outputs = []
    for side in sides:
        if noise is not None:
            noise.restore()
        with hooked(embedding, adding(side)):
            outputs.append(forward(2 // len(sides)))
    plus, minus = torch.cat([output.log_probs for output in outputs]).chunk(2)
    slopes = (pair_loss(plus) - pair_loss(minus)) / (2 * h)
    aux_losses = [output.aux_loss for output in outputs if output.aux_loss is not None]
    return slopes, (plus + minus) / 2, sum(aux_losses) / len(aux_losses) if aux_losses else None


class FiniteDifferenceStep(TrainerCallback, ExportableState):
    """The step of the central difference relative to ||e||, found by the gap it leaves.

    Too large a step is wrong by the loss's curvature, too small a one by rounding, so neither direction is right in
    advance: the step is halved until that makes the gap worse, then doubled, and so on. It never gets above
    `LARGEST_STEP`: the gradient of the base loss is read from the same two points, and is off by three times the gap.
    It is a callback in order that it is saved with each checkpoint, and a resumed run continues with the same steps.
    """

    DEFAULTS = {torch.float16: 5e-3, torch.bfloat16: 5e-3}  # others: 1e-3
    LARGEST_STEP = 2e-2
    GOOD_GAP = 0.02
    SMALLEST, LARGEST = 2.0**-8, 2.0**5
    SHARE_RATE = 0.3

    def __init__(self):
        self.scale = 1.0
        self.factor = 0.5
        self.last_gap = None
        self.share: float | None = None  # k of a one-sided difference (`one_sided.py`)

    def relative_step(self, dtype: torch.dtype) -> float:
        """h / ||e|| for a model that computes in `dtype`."""
        return min(self.scale * self.DEFAULTS.get(dtype, 1e-3), self.LARGEST_STEP)

    def adapt(self, gap: float) -> None:
        """Take in the relative gap that the present step has left. The same on every rank."""
        if gap <= self.GOOD_GAP:
            return
        if self.last_gap is not None and gap > self.last_gap:
            self.factor = 1 / self.factor
        self.last_gap = gap
        self.scale = min(max(self.scale * self.factor, self.SMALLEST), self.LARGEST)

    def adapt_share(self, step: float, wanted: float) -> None:
        """Bring the relative step of a one-sided difference, the one just taken, nearer to the wanted one. Slowly: it
        follows the norms of gradients, which are different from pair to pair."""
        if self.share is not None and step > 0:
            self.share *= (step / wanted) ** self.SHARE_RATE

    def state(self) -> dict:
        return {"args": {}, "attributes": dict(vars(self))}

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer restores callbacks only with `restore_callback_states_from_checkpoint`
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved:
            vars(self).update(saved["attributes"])
