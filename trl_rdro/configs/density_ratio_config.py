"""The fields of the density-ratio losses, shared by `DPOConfig` (pairs) and `KTOConfig` (labelled completions)."""

from dataclasses import dataclass, field

from ..losses.types import of_family
from .validation import require_in_range


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

    def _validate_density_ratio(self) -> None:
        for name in ("ddro_t", "rdro_alpha"):
            value = getattr(self, name)
            if value is not None:
                require_in_range(
                    name,
                    value,
                    0,
                    1,
                    "a number between 0 and 1, both excluded, or None",
                    "Leave it None to use the preferred fraction of the training set.",
                )
        require_in_range(
            "ddro_cap", self.ddro_cap, 0, 1, "a number between 0 and 1, both excluded", "The default is 0.99."
        )
