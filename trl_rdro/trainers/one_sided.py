"""WDPO's gradient by a step to one side: two ordinary passes over a micro-batch, and the memory of one of DPO's.

    grad [ l + c ||g||^2 ]  =  grad l + 2 c (d^2 l / d theta d e) g                          g = grad_e l
                           ~=  (1 - k) grad l(e) + k grad l(e + eps g)                       k = 2 c / eps

with g fixed, as in `input_gradient.py`. k is chosen before the first pass: its one backward, to the parameters and to
the embeddings e, then adds its part of the gradient and yields g, and eps = 2 c / k follows. The error is of first
order in eps. With k and eps of either sign, drawn for each pair, its mean is that of a central difference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .input_gradient import InputGradient, adding, hooked, model_dtype, normalised, pair_norms


# The rest of the first pass is 1 - k times its gradient, from which g is read
NOT_NEAR_1 = 0.5, 2.0
SMALLEST_SHARE = 1e-12


def kept_from_1(share: float) -> float:
    """k, or the nearest that leaves the first pass a gradient."""
    low, high = NOT_NEAR_1
    if low < share < high:
        return low if share < 1 else high
    return max(share, SMALLEST_SHARE)


def signs(input_ids: torch.Tensor, attention_mask: torch.Tensor, seed: int) -> torch.Tensor:
    """1 or -1 for each pair of a batch [chosen, rejected], `(n,)`: drawn by its tokens and the seed, so that it does
    not depend on how a step is split, and a resumed run draws the same."""
    places = _mixed(torch.arange(input_ids.size(1), device=input_ids.device) + seed)
    rows = ((input_ids + 1) * attention_mask * places).sum(dim=1)  # int64 wraps round
    chosen, rejected = rows.chunk(2)
    return 1 - 2 * (_mixed(chosen + _mixed(rejected)) >> 40 & 1)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, with its constants as signed numbers."""
    x = (x ^ x >> 30) * -4658895280553007687
    x = (x ^ x >> 27) * -7723592293110705685
    return x ^ x >> 31


def first_pass(
    forward: Callable[[], Any],
    embedding: nn.Module,
    pair_loss: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
    backward: Callable[[torch.Tensor], None],
    mask: torch.Tensor,
) -> tuple[Any, torch.Tensor, InputGradient]:
    """
    Forward a batch, and add the gradient of its pairs' weighted losses to the parameters'.

    Args:
        forward, embedding, pair_loss, mask: as of `input_gradient`.
        weights: `(n,)`, of the pairs' losses.
        backward: adds the gradient of a scalar.

    Returns:
        The output, with `log_probs` detached; the pairs' losses, `(n,)`; and their gradients at the embeddings.
    """
    captured: list[Any] = []  # the embeddings, what the model computes in; then the embeddings' gradient

    def capture(output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        captured[:] = output.detach(), model_dtype(output)
        output.register_hook(captured.append)
        return output

    with hooked(embedding, capture):
        outputs = forward()
    losses = pair_loss(outputs.log_probs)
    backward((weights * losses).sum())
    embeddings, dtype, weighted = captured
    outputs.log_probs = outputs.log_probs.detach()
    shares = torch.where(weights == 0, 0, 1 / weights).repeat(2).view(-1, 1, 1)
    direction, norms = normalised(weighted.float() * shares)
    embedding_norms = pair_norms(embeddings * mask.unsqueeze(-1))
    return outputs, losses.detach(), InputGradient(norms, direction, embedding_norms, dtype)


def second_pass(
    forward: Callable[[], Any],
    embedding: nn.Module,
    pair_loss: Callable[[torch.Tensor], torch.Tensor],
    gradient: InputGradient,
    steps: torch.Tensor,
) -> torch.Tensor:
    """The losses of the pairs, `(n,)`, at e + eps g, with their graph. `steps`, `(n,)`, are eps."""
    shift = gradient.direction * (steps * gradient.norms).repeat(2).view(-1, 1, 1)
    with hooked(embedding, adding(shift)):
        return pair_loss(forward().log_probs)
