"""TRL's `KTOConfig` with our density-ratio losses."""

from dataclasses import dataclass, field

import trl

from .choices import require_loss_type
from .density_ratio_config import DENSITY_RATIO_LOSSES, DensityRatioConfig, require_cap_above_start
from .loss_names import LOSSES_OF
from .packing_config import PackingConfig
from .ranges import RANGES
from .run_config import RunConfig
from .structures import validate_structures
from .trl_losses import ABOVE_ZERO, refuse_combinations, refuse_kl_losses
from .unused_options import warn_of_unused_options
from .validation import require, validate_fields


_TRL_FIELDS = trl.KTOConfig.__dataclass_fields__


@dataclass
class KTOConfig(DensityRatioConfig, PackingConfig, RunConfig, trl.KTOConfig):
    r"""
    Configuration class for the [`KTOTrainer`]: [`trl.KTOConfig`] and the fields of our losses.

    `loss_type` takes, beside TRL's, `"ddro"` and `"rdro"`. They have no beta: it only scales their logged rewards.

    Parameters:
        ddro_t, ddro_cap, rdro_alpha:
            See [`DensityRatioConfig`].
        preferred_fraction (`float`, *optional*):
            Share of the training completions whose label is True, in (0, 1). It sets the class weights of `ddro` and
            `rdro` and, unless given, `ddro_t` and `rdro_alpha`. If `None`, counted on the prepared training set;
            needed for a streaming one, which cannot be counted.
        count_fraction_by_prompt (`bool`, defaults to `False`):
            Use, in place of one preferred fraction, that of each prompt, counted where a prompt has four labelled
            completions or more. A column `preferred_fraction` of the data gives it for all prompts.
        train_sampling_strategy (`str`, *optional*):
            If `None`, `"random"` for `ddro` and `rdro`, and TRL's default `"sequential"`, which its estimate of the KL
            divergence needs, for the other losses.
        padding_free, balance_tokens:
            See [`PackingConfig`].
        plot, resume_with_changes:
            See [`RunConfig`].
    """

    loss_type: str = field(
        default="kto",
        metadata={
            "help": f"Type of loss to use: {', '.join(f'`{name}`' for name in LOSSES_OF['kto'])}.",
        },
    )
    preferred_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training completions whose label is True, in (0, 1), for `ddro` and `rdro`. If "
            "`None`, counted on the prepared training set; needed for a streaming one."
        },
    )
    count_fraction_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Use, in place of one preferred fraction, that of each prompt, counted where a prompt has four "
            "labelled completions or more, for `ddro` and `rdro`."
        },
    )
    train_sampling_strategy: str | None = field(  # type: ignore[assignment]  # None until the loss is known
        default=None,
        metadata={
            "help": "Sampler of the training set. If `None`, `random` for `ddro` and `rdro`, `sequential` for the "
            "losses that estimate the KL divergence.",
            "choices": _TRL_FIELDS["train_sampling_strategy"].metadata["choices"],
        },
    )

    def __post_init__(self):
        require_loss_type(self.loss_type, "kto", LOSSES_OF)
        validate_fields(self, RANGES)
        validate_structures(self)
        self._validate_run()
        self._validate_packing()
        if self.loss_type not in DENSITY_RATIO_LOSSES:
            require("beta", self.beta, (float,), ABOVE_ZERO)
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError(
                "`desirable_weight` and `undesirable_weight` must not both be 0, got 0 and 0: nothing would be "
                "trained. The default of both is 1."
            )
        for name in ("rdro_alpha", "ddro_t"):
            if self.count_fraction_by_prompt and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` is one share for all prompts, and "
                    "`count_fraction_by_prompt=True` counts one for each. Leave one of them out."
                )
        t = self.preferred_fraction if self.ddro_t is None else self.ddro_t
        if self.loss_type == "ddro" and t is not None:
            require_cap_above_start(t, self.ddro_cap)
        if self.train_sampling_strategy is None:
            self.train_sampling_strategy = "random" if self.loss_type in DENSITY_RATIO_LOSSES else "sequential"
        refuse_combinations(self)
        if self.loss_type == "kto":
            refuse_kl_losses(self)
        super().__post_init__()
        warn_of_unused_options(self, [self.loss_type])
