"""What the paired and the unpaired trainer share."""

from typing import Any

import torch

from .. import losses
from ..configs.density_ratio_config import DensityRatioConfig
from ..losses import papers


# Where a micro-batch carries what was computed for its whole optimiser step
STEP_KEY = "trl_rdro_step"


def require_own_config(args: Any, ours: list[str], config_class: type) -> None:
    """Refuse a plain TRL config with one of our losses: it lacks their fields and was not validated."""
    if ours and not isinstance(args, config_class):
        name = config_class.__name__
        raise TypeError(
            f"`loss_type={ours[0]!r}` needs `trl_rdro.{name}`, got `{type(args).__module__}.{type(args).__name__}`. "
            f"Import `{name}` from trl_rdro."
        )


def describe_in_model_card(trainer: Any, ours: list[str]) -> None:
    """Let model cards name the method and the paper of the loss in use."""
    if ours:
        trainer._paper = papers.PAPERS[ours[0]]
        trainer._name = ours[0].upper()
        trainer._tag_names = [*trainer._tag_names, *ours, "trl-rdro"]


def with_step_scales(batch_samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each micro-batch of an optimiser step its index, and the factor by which its mean enters the step's mean.

    The Trainer averages the means of the micro-batches. Where the last one is shorter, that would let its samples
    count for more; times this factor, every sample of the step counts the same.
    """
    sizes = [len(inputs["input_ids"]) for inputs in batch_samples]
    return [
        {**inputs, STEP_KEY: {"index": i, "scale": len(sizes) * size / sum(sizes)}}
        for i, (inputs, size) in enumerate(zip(batch_samples, sizes, strict=True))
    ]


def density_ratio_loss(
    name: str, args: DensityRatioConfig, logratios: torch.Tensor, preferred: torch.Tensor, preferred_fraction: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ddro` or `rdro` of each completion, `(n,)`, and for ddro which completions lie beyond the cap, `(n,)`."""
    mixture = args.rdro_alpha if name == "rdro" else args.ddro_t
    mixture = preferred_fraction if mixture is None else mixture
    if name == "rdro":
        return losses.rdro_loss(logratios, preferred, mixture), None
    beyond_cap = losses.ddro_beyond_cap(logratios, mixture, args.ddro_cap)
    return losses.ddro_loss(logratios, preferred, mixture, args.ddro_cap), beyond_cap
