"""What a micro-batch knows of the optimiser step that it is part of. It travels in the batch."""

from dataclasses import dataclass
from typing import Any

import torch

from .noise import NoiseState
from .step_weights import StepWeights


_KEY = "trl_rdro_step"


@dataclass
class Step:
    """One micro-batch's place in its optimiser step, and what was computed for the step as a whole.

    Parameters:
        index: of the micro-batch in the step.
        count: of the step's micro-batches.
        scale: by which its mean enters the step's mean.
        noise: before the forward that `pair_losses` come from, if that forward drew random numbers.
        ref_logps: `(2n,)` reference log-probabilities, where they had to be known before.
        columns: what the losses look at beside log-ratios, where it had to be known before.
        pair_losses: `(n,)` losses of its pairs before the step, without graph, where a loss weighs the step's pairs.
        all_pair_losses: `(N,)` those of all micro-batches and ranks.
        weights: what the step's micro-batches share, where a loss weighs its pairs without knowing them before.
    """

    index: int = 0
    count: int = 1
    scale: float = 1.0
    noise: NoiseState | None = None
    ref_logps: torch.Tensor | None = None
    columns: dict[str, torch.Tensor] | None = None
    pair_losses: torch.Tensor | None = None
    all_pair_losses: torch.Tensor | None = None
    weights: StepWeights | None = None

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def with_steps(batch_samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each micro-batch of an optimiser step its `Step`.

    The Trainer averages the means of the micro-batches. Where the last one is shorter, that would let its samples
    count for more; times `scale`, every sample of the step counts the same.
    """
    sizes = [len(inputs["input_ids"]) for inputs in batch_samples]
    return [
        {**inputs, _KEY: Step(i, len(sizes), len(sizes) * size / sum(sizes))}
        for i, (inputs, size) in enumerate(zip(batch_samples, sizes, strict=True))
    ]


def split_step(inputs: dict[str, Any]) -> tuple[dict[str, Any], Step]:
    """A micro-batch without its step, and that step: a step of its own where it was given none."""
    inputs = dict(inputs)
    return inputs, inputs.pop(_KEY, None) or Step()
