"""TRL's `DPOConfig` with our losses."""

from dataclasses import dataclass, field

import trl

from ..log import get_logger
from ..losses.types import LOSS_TYPES, in_use, of_family
from .choices import require_choice, require_loss_type
from .density_ratio_config import DENSITY_RATIO_LOSSES, DensityRatioConfig, require_cap_above_start
from .loss_names import DPO_LOSS_TYPE_HELP, LOSSES_OF
from .packing_config import PackingConfig
from .pair_loss_config import PairLossConfig
from .ranges import RANGES
from .run_config import RunConfig
from .structures import validate_structures
from .trl_losses import ABOVE_ZERO, FLIPPED, refuse_combinations, refuse_pair_losses
from .unused_options import warn_of_unused_options
from .validation import require, require_reverse_kl, validate_fields


logger = get_logger(__name__)

ROBUST_LOSSES = of_family("robust")
PAIR_LOSSES = of_family("pair")
OUR_DPO_LOSSES = tuple(LOSS_TYPES)
# TRL's that stand in `trl_rdro.losses` too, and our losses of a pair
INNER_LOSSES = ("sigmoid", "ipo", "hinge", *PAIR_LOSSES)
WDPO_PENALTIES = ("squared", "rms")
WDPO_DIFFERENCES = ("central", "one_sided")
TRL_SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}
SMOOTHED_INNER_LOSSES = {"sigmoid", "cdpo"}

# Density ratios and likelihoods are of the log-ratio itself; for them beta only scales the logged rewards
LOSSES_WITHOUT_BETA = {*DENSITY_RATIO_LOSSES, "sft"}

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class DPOConfig(DensityRatioConfig, PairLossConfig, PackingConfig, RunConfig, trl.DPOConfig):
    r"""
    Configuration class for the [`DPOTrainer`]: [`trl.DPOConfig`] and the fields of our losses.

    `loss_type` takes, beside all of TRL's, those of `trl_rdro.losses.types.LOSS_TYPES`, alone or in a list with
    `loss_weights`. `beta` and `label_smoothing` are those of a loss of pairs, or of the inner loss of a robust one;
    `ddro` and `rdro` have no beta, it only scales their logged rewards.

    Parameters:
        ddro_t, ddro_cap, rdro_alpha:
            See [`DensityRatioConfig`]. On pairs, half of the completions are preferred.
        holder_gamma, ropo_alpha, repo_eta, repo_rate, chipo_clip, dpop_lambda, adadpo_rho0, adadpo_tau_min,
        adadpo_tau_max, dpopro_rho, mrpo_reference, mrpo_alpha:
            See [`PairLossConfig`].
        kldpo_tau (`float`, *optional*, defaults to `1.0`):
            τ of KLDPO, > 0: temperature of the weights softmax(loss / τ) over the pairs of an optimiser step. Large is
            DPO, small is the worst pair only. Published runs: 0.5 to 5 at `beta=0.1`, 0.005 to 0.05 at `beta=0.01`.
        kldpo_target_ess (`float`, *optional*):
            In place of `kldpo_tau`: the effective sample size of KLDPO's weights, as a share of the optimiser step, in
            (0, 1). τ is then solved for each step, and logged as `kldpo/tau`. With accumulation the step's losses are
            found before it.
        drdpo_beta (`float`, *optional*, defaults to `1.0`):
            b of Dr. DPO (its β'), > 0: temperature of the weights softmax(-loss / b) over the pairs of an optimiser
            step, of which it needs two or more. Large is DPO, small is the best pair only. Published: 1 at `beta=0.1`.
        grdpo_eta (`float`, *optional*, defaults to `0.01`):
            η of group-robust DPO, >= 0: after each optimiser step a group's weight is multiplied by exp(η times its
            mean loss). 0 leaves all groups equal. Their released code takes 5e-7 times the size of the training set.
        wdpo_rho (`float`, *optional*, defaults to `0.001`):
            ρ of WDPO, >= 0: weight of the input-gradient penalty. It means something only together with `beta`: what
            counts is their product, and the default keeps the published one (ρ 0.005 to 0.01 at β 0.01) at TRL's
            default `beta` of 0.1. 0 is DPO.
        wdpo_penalty (`str`, *optional*, defaults to `"squared"`):
            `"squared"` (the mean of the squared gradient norms, what the authors ran) or `"rms"` (its square root over
            the micro-batch of all ranks, the paper's Algorithm 1).
        wdpo_interval (`int`, *optional*, defaults to `1`):
            Compute WDPO's penalty on every `wdpo_interval`-th micro-batch only, with as many times its weight:
            unbiased, cheaper, noisier.
        wdpo_difference (`str`, *optional*, defaults to `"central"`):
            `"central"`, or `"one_sided"`: two passes in place of three and the memory of one DPO batch, for a
            difference that is less accurate in a single step and as accurate in the mean, since the side is drawn for
            each pair. It needs two backward passes for a micro-batch, which DeepSpeed and fp16 do not have, and no
            other loss beside it.
        wdpo_eps (`float`, *optional*):
            Step of WDPO's difference relative to the norm of a pair's embeddings, > 0; of a one-sided one in the mean.
            If `None`, chosen by the dtype and adapted to the logged gap `wdpo/gap`.
        inner_loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            The loss of a pair inside a robust loss: `"sigmoid"` (with `label_smoothing`), `"ipo"`, `"hinge"`, or one
            of our losses of pairs.
        padding_free, balance_tokens:
            See [`PackingConfig`].
        share_prompt (`bool`, *optional*, defaults to `True`):
            With `padding_free`, forward the prompt of a pair once. Not done for `wdpo`, whose penalty tells the two
            rows' prompts apart, nor for a mixture of experts with an auxiliary loss, which counts their tokens.
        plot, resume_with_changes:
            See [`RunConfig`].
    """

    loss_type: list[str] | str = field(  # type: ignore[assignment]  # a name becomes a list of one
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": DPO_LOSS_TYPE_HELP
            + " With trl_rdro also: "
            + ", ".join(f"`'{name}'` ({loss.summary})" for name, loss in LOSS_TYPES.items())
            + "."
        },
    )
    kldpo_tau: float = field(
        default=1.0,
        metadata={
            "help": "τ of KLDPO, > 0: temperature of the weights softmax(loss / τ) over the pairs of an optimiser "
            "step. Large is DPO, small is the worst pair only."
        },
    )
    kldpo_target_ess: float | None = field(
        default=None,
        metadata={
            "help": "In place of `kldpo_tau`: the effective sample size of KLDPO's weights, as a share of the "
            "optimiser step, in (0, 1). τ is then solved for each step."
        },
    )
    drdpo_beta: float = field(
        default=1.0,
        metadata={
            "help": "b of Dr. DPO, > 0: temperature of the weights softmax(-loss / b) over the pairs of an optimiser "
            "step. Large is DPO, small is the best pair only."
        },
    )
    grdpo_eta: float = field(
        default=0.01,
        metadata={
            "help": "η of group-robust DPO, >= 0: after each optimiser step a group's weight is multiplied by exp(η "
            "times its mean loss). 0 leaves all groups equal."
        },
    )
    wdpo_rho: float = field(
        default=0.001,
        metadata={
            "help": "ρ of WDPO, >= 0: weight of the input-gradient penalty; it means something only together with "
            "`beta`. 0 is DPO."
        },
    )
    wdpo_penalty: str = field(
        default="squared",
        metadata={
            "help": "`squared` (mean of the squared input-gradient norms) or `rms` (the square root of that mean).",
            "choices": list(WDPO_PENALTIES),
        },
    )
    wdpo_interval: int = field(
        default=1,
        metadata={
            "help": "Compute WDPO's penalty on every `wdpo_interval`-th micro-batch only, with as many times its "
            "weight: unbiased, cheaper, noisier."
        },
    )
    wdpo_difference: str = field(
        default="central",
        metadata={
            "help": "`central`, or `one_sided`: cheaper, less accurate in a single step, not in the mean. Not with "
            "DeepSpeed, fp16 or another loss beside it.",
            "choices": list(WDPO_DIFFERENCES),
        },
    )
    wdpo_eps: float | None = field(
        default=None,
        metadata={
            "help": "Step of WDPO's difference relative to the norm of a pair's embeddings, > 0. If `None`, chosen by "
            "the dtype and adapted to the logged gap `wdpo/gap`."
        },
    )
    inner_loss_type: str = field(
        default="sigmoid",
        metadata={
            "help": f"The loss of a pair inside {', '.join(f'`{name}`' for name in ROBUST_LOSSES)}. `sigmoid` takes "
            "`label_smoothing`.",
            "choices": list(INNER_LOSSES),
        },
    )

    share_prompt: bool = field(
        default=True,
        metadata={
            "help": "With `padding_free`, forward the prompt of a pair once. Not done for `wdpo`, nor for a mixture "
            "of experts with an auxiliary loss."
        },
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._validate_loss_types()
        validate_fields(self, RANGES)
        validate_structures(self)
        require_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        self._validate_run()
        self._validate_packing()
        self._validate_loss_weights()
        if not {*self.loss_type} <= LOSSES_WITHOUT_BETA:
            require("beta", self.beta, (float,), ABOVE_ZERO)
        self._validate_pair_losses()
        self._validate_ours()
        refuse_combinations(self)
        refuse_pair_losses(self)
        super().__post_init__()
        self._refuse_a_step_of_too_few_pairs()
        if "cdpo" in self.loss_type and self.label_smoothing == 0:
            logger.warning(
                "`cdpo` with `label_smoothing=0` is DPO. Set it to the share of flipped labels that you expect; the "
                "published value is 0.1."
            )
        warn_of_unused_options(
            self, list(dict.fromkeys([*self.loss_type, *in_use(self.loss_type, self.inner_loss_type)]))
        )

    def _validate_loss_types(self) -> None:
        if not isinstance(self.loss_type, (list, tuple)) or not self.loss_type:
            raise ValueError(f"`loss_type` must be a name or a list of names, got {self.loss_type!r}.")
        for loss_type in self.loss_type:
            require_loss_type(loss_type, "dpo", LOSSES_OF)

    def _validate_loss_weights(self) -> None:
        weights = self.loss_weights
        if weights is None:
            return
        if len(weights) != len(self.loss_type):
            raise ValueError(
                f"`loss_weights` must have one weight for each of the {len(self.loss_type)} in "
                f"`loss_type={self.loss_type!r}`, got {weights!r}. Add or remove weights, or leave it None for equal "
                "ones."
            )
        if not any(weights):
            raise ValueError(f"`loss_weights` must not all be 0, got {weights!r}: nothing would be trained.")

    def _validate_ours(self) -> None:
        ours = [loss_type for loss_type in self.loss_type if loss_type in OUR_DPO_LOSSES]
        density_ratio = [loss_type for loss_type in ours if loss_type in DENSITY_RATIO_LOSSES]
        if ours:
            require_reverse_kl(ours, self.f_divergence_type)
        if density_ratio and self.ld_alpha is not None:
            raise ValueError(
                f"`ld_alpha={self.ld_alpha}` cannot be combined with {' and '.join(density_ratio)}: with "
                "down-weighted tokens the log-ratio is no longer that of the completion, and the loss no longer "
                "estimates a density ratio. Set `ld_alpha=None`."
            )
        if ours and self.use_weighting:
            raise ValueError(
                f"`use_weighting=True` cannot be combined with {' and '.join(ours)}: WPO's weights change the "
                "distribution that these losses take their expectations over, reweight or perturb. Set "
                "`use_weighting=False`."
            )
        if "wdpo" in ours and self.wdpo_difference == "one_sided" and len(self.loss_type) > 1:
            raise ValueError(
                f"`wdpo_difference='one_sided'` cannot be combined with other losses, got loss_type={self.loss_type}: "
                "their gradient would be in the one that the step is taken along. Set `wdpo_difference='central'`."
            )
        if "ddro" in ours:
            require_cap_above_start(0.5 if self.ddro_t is None else self.ddro_t, self.ddro_cap)
        # The losses of pairs in use: by themselves, and inside a robust loss
        pairwise = [name for name in ours if name in PAIR_LOSSES]
        if not set(ours).isdisjoint(ROBUST_LOSSES):
            pairwise.append(self.inner_loss_type)
        if not SMOOTHED_INNER_LOSSES.isdisjoint(pairwise):
            require("label_smoothing", self.label_smoothing, (float,), FLIPPED)
        elif pairwise and self.label_smoothing and TRL_SMOOTHED_LOSSES.isdisjoint(self.loss_type):
            raise ValueError(
                f"`label_smoothing={self.label_smoothing}` has no effect with {' and '.join(map(repr, pairwise))}. "
                "Set it to 0, or use 'cdpo', alone or as `inner_loss_type`."
            )

    def _refuse_a_step_of_too_few_pairs(self) -> None:
        pairs = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        wanted = self.kldpo_target_ess if "kldpo" in self.loss_type else None
        if wanted is not None and wanted * pairs < 1:
            raise ValueError(
                f"`kldpo_target_ess={wanted}` is less than one of the {pairs} pairs in an optimiser step. Set it "
                f"above {1 / pairs:.3g}, or raise `per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
        if wanted is not None and self.kldpo_tau != type(self).kldpo_tau:
            raise ValueError(
                f"`kldpo_tau={self.kldpo_tau}` and `kldpo_target_ess={wanted}` are two ways to say the same. Remove "
                "one of them."
            )
        if "drdpo" in self.loss_type and pairs == 1:
            raise ValueError(
                "`drdpo` with one pair in an optimiser step is DPO: it weighs the step's pairs against one another. "
                "Raise `per_device_train_batch_size` or `gradient_accumulation_steps` (both now 1), or use `sigmoid`."
            )
