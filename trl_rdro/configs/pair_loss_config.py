"""The fields of the losses of a pair, each used where its loss is: as a loss type, or inside a robust loss."""

from dataclasses import dataclass, field


@dataclass
class PairLossConfig:
    """
    Fields of our losses of pairs. All of them take `beta` too, and `cdpo` takes `label_smoothing`.

    Parameters:
        holder_gamma (`float`, *optional*, defaults to `2.0`):
            γ of Hölder-DPO, > 0: larger lets go sooner of pairs that the policy contradicts. Published: 2, tried 1 to
            8, at `beta=0.1`.
        ropo_alpha (`float`, *optional*, defaults to `14.0`):
            α of ROPO, > 0: weight of its bounded part. Small is DPO. Published: 14 (at second hand).
        repo_eta (`float`, *optional*, defaults to `0.9`):
            η of RE-PO at the start, in (0, 1]: the share of labels that are right; of each annotator where the data
            have a column `annotator`. 1 is DPO for ever. Published: 0.9.
        repo_rate (`float`, *optional*, defaults to `0.1`):
            By how much η moves to the mean posterior of each optimiser step, in [0, 1]. 0 keeps it. Published: 0.1.
        chipo_clip (`float`, *optional*, defaults to `1.0`):
            R of χPO, > 0: its scaled difference is clipped to ±2R. Published: 1 to 2, at `beta` 0.05 or 0.005.
        dpop_lambda (`float`, *optional*, defaults to `50.0`):
            λ of DPO-Positive, >= 0: cost of a nat that the chosen completion loses to the reference. 0 is DPO.
            Published: 50 (at second hand).
        adadpo_rho0 (`float`, *optional*, defaults to `0.1`):
            ρ₀ of Ada-DPO, > 0: larger means smaller temperatures; from log 2 on all are `adadpo_tau_min`. Released
            runs: 0.1 at `beta=0.1`.
        adadpo_tau_min (`float`, *optional*, defaults to `0.1`):
            The smallest temperature of a pair, > 0. Released runs: 0.1.
        adadpo_tau_max (`float`, *optional*, defaults to `5.0`):
            The largest temperature of a pair, >= `adadpo_tau_min`. Released runs: 5.
        dpopro_rho (`float`, *optional*, defaults to `0.1`):
            ρ of DPO-PRO, >= 0: radius of the χ² ball around the soft label. 0 is soft-label DPO. Published: tuned.
        mrpo_reference (`str`, *optional*):
            The second reference of MRPO: the path of a model or adapter, or the name of an adapter of the trained
            model. If `None`, the data bring its log-probabilities, summed over each completion's tokens, as the
            columns `second_ref_chosen_logps` and `second_ref_rejected_logps`.
        mrpo_alpha (`float`, *optional*):
            Weight of the second reference in MRPO's harmonic mean, in [0, 1]. If `None`, its share of the two
            references' own margins on each pair. Released runs: adaptive.
    """

    holder_gamma: float = field(
        default=2.0,
        metadata={
            "help": "γ of Hölder-DPO, > 0: larger lets go sooner of pairs that the policy contradicts. Published: 2."
        },
    )
    ropo_alpha: float = field(
        default=14.0, metadata={"help": "α of ROPO, > 0: weight of its bounded part. Small is DPO. Published: 14."}
    )
    repo_eta: float = field(
        default=0.9,
        metadata={
            "help": "η of RE-PO at the start, in (0, 1]: the share of labels that are right (of each annotator where "
            "the data have a column `annotator`). Published: 0.9."
        },
    )
    repo_rate: float = field(
        default=0.1,
        metadata={
            "help": "By how much η of RE-PO moves to the mean posterior of each optimiser step, in [0, 1]. Published: "
            "0.1."
        },
    )
    chipo_clip: float = field(
        default=1.0,
        metadata={"help": "R of χPO, > 0: its scaled difference is clipped to plus or minus 2R. Published: 1 to 2."},
    )
    dpop_lambda: float = field(
        default=50.0,
        metadata={
            "help": "λ of DPO-Positive, >= 0: cost of a nat that the chosen completion loses to the reference. 0 is "
            "DPO. Published: 50."
        },
    )
    adadpo_rho0: float = field(
        default=0.1,
        metadata={
            "help": "ρ₀ of Ada-DPO, > 0: larger means smaller temperatures; from log 2 on all are `adadpo_tau_min`."
        },
    )
    adadpo_tau_min: float = field(
        default=0.1, metadata={"help": "The smallest temperature of a pair in Ada-DPO, > 0."}
    )
    adadpo_tau_max: float = field(
        default=5.0, metadata={"help": "The largest temperature of a pair in Ada-DPO, >= `adadpo_tau_min`."}
    )

    dpopro_rho: float = field(
        default=0.1,
        metadata={"help": "ρ of DPO-PRO, >= 0: radius of the χ² ball around the soft label. 0 is soft-label DPO."},
    )

    mrpo_reference: str | None = field(
        default=None,
        metadata={
            "help": "The second reference of MRPO: the path of a model or adapter, or the name of an adapter of the "
            "trained model. If `None`, the data bring its log-probabilities as the columns `second_ref_chosen_logps` "
            "and `second_ref_rejected_logps`."
        },
    )
    mrpo_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the second reference in MRPO's harmonic mean, in [0, 1]. If `None`, its share of the "
            "two references' own margins on each pair."
        },
    )

    def _validate_pair_losses(self) -> None:
        """What is more than the range of one field."""
        if self.adadpo_tau_max < self.adadpo_tau_min:
            raise ValueError(
                f"`adadpo_tau_max` must be a number >= `adadpo_tau_min` ({self.adadpo_tau_min}), got "
                f"{self.adadpo_tau_max!r}."
            )
        if self.mrpo_reference == "":
            raise ValueError("`mrpo_reference` must be a path or a name, or None, got ''.")
