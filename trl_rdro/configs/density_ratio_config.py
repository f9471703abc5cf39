"""The fields of the density-ratio losses, shared by `DPOConfig` (pairs) and `KTOConfig` (labelled completions)."""

from dataclasses import dataclass, field
from typing import Any

from ..losses.types import of_family


DENSITY_RATIO_LOSSES = of_family("density_ratio")


@dataclass
class DensityRatioConfig:
    """
    Fields of the `ddro` and `rdro` losses.

    Parameters:
        ddro_t (`float`, *optional*):
            t of DDRO: the share of preferred completions in the reference model, in (0, 1). If `None`, the preferred
            fraction of the training set (1/2 for pairs).
        ddro_cap (`float`, *optional*, defaults to `0.99`):
            Fraction of DDRO's pole at a policy-to-reference ratio of 1/t beyond which its loss goes on linearly, in
            (0, 1). Higher: less bias where preferred completions go beyond it; lower: smaller gradients.
        rdro_alpha (`float`, *optional*):
            α of RDRO: the share of preferred completions in the reference model, in (0, 1). If `None`, the preferred
            fraction of the training set (1/2 for pairs).
    """

    ddro_t: float | None = field(
        default=None,
        metadata={
            "help": "t of DDRO: the share of preferred completions in the reference model, in (0, 1). If `None`, the "
            "preferred fraction of the training set (1/2 for pairs)."
        },
    )
    ddro_cap: float = field(
        default=0.99,
        metadata={
            "help": "Fraction of DDRO's pole at a policy-to-reference ratio of 1/t beyond which its loss goes on "
            "linearly, in (0, 1). Higher: less bias where preferred completions go beyond it; lower: smaller "
            "gradients."
        },
    )
    rdro_alpha: float | None = field(
        default=None,
        metadata={
            "help": "α of RDRO: the share of preferred completions in the reference model, in (0, 1). If `None`, the "
            "preferred fraction of the training set (1/2 for pairs)."
        },
    )


def require_cap_above_start(t: float, cap: float) -> None:
    """Refuse a `ddro_cap` that training would start beyond: the ratio of policy to reference is 1 there, the cap at
    `ddro_cap` / t. For `KTOTrainer` too, once it has counted t."""
    if cap <= t:
        raise ValueError(
            f"`ddro_cap` must be greater than t={t:g}, the share of preferred completions in the reference model, got "
            f"{cap!r}: training would start beyond the cap, where the loss is only its linear continuation. Raise "
            "`ddro_cap`."
        )


def require_cap_above_start_of(args: Any, loss_type: str, preferred_fraction: float | None) -> None:
    """`require_cap_above_start` of a `KTOConfig`, once the preferred fraction is known, which is t unless that is
    set."""
    t = preferred_fraction if args.ddro_t is None else args.ddro_t
    if loss_type == "ddro" and t is not None:
        require_cap_above_start(t, args.ddro_cap)
