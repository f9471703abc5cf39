"""What the tests must know of each loss type: one line each. Every test that is about all losses iterates over it.

A loss type that lacks a line here, a section in docs/losses.md, a paper or a plot title fails in test_every_loss.py.
"""

import math
from dataclasses import dataclass, field
from typing import Any


LOG2 = math.log(2)


@dataclass(frozen=True)
class LossCase:
    """
    Parameters:
        constant: the loss of a pair where the policy equals the reference; with wdpo its penalty comes on top. None
            where it depends on more than the policy and its reference.
        settings: config fields with which the loss differs visibly from plain DPO in a tiny run.
        metrics: what is logged under the loss's name.
        learning_rate: of SGD, at which a tiny model learns with it in a few steps.
        adamw_learning_rate: of AdamW, at which 40 steps teach a tiny model what holds of other pairs too. A small one
            for losses of the log-ratios themselves, which have no beta.
        mixture: the option of a density-ratio loss for the share of p+ in the reference.
        coupled: further settings under which the samples of a micro-batch are coupled, so that a step depends on how
            it is split. None of them: every split gives the same step.
    """

    constant: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    learning_rate: float = 0.1
    adamw_learning_rate: float = 3e-3
    mixture: str = ""
    coupled: dict[str, Any] = field(default_factory=dict)


CAPPED = ("capped_chosen", "capped_rejected")
WEIGHTS = ("effective_sample_size", "max_weight")

LOSS_CASES = {
    "ddro": LossCase(2 * LOG2, metrics=CAPPED, learning_rate=0.01, adamw_learning_rate=5e-4, mixture="ddro_t"),
    "rdro": LossCase(2 * LOG2, adamw_learning_rate=1e-3, mixture="rdro_alpha"),
    "kldpo": LossCase(LOG2, {"kldpo_tau": 0.05}, WEIGHTS),
    "wdpo": LossCase(LOG2, {"wdpo_rho": 0.1}, ("grad_norm", "penalty", "gap", "eps"), coupled={"wdpo_penalty": "rms"}),
    "drdpo": LossCase(LOG2, {"drdpo_beta": 0.05}, WEIGHTS),
    "grdpo": LossCase(LOG2, {"grdpo_eta": 1.0}, ("weight_men", "weight_women")),
    "cdpo": LossCase(LOG2, {"label_smoothing": 0.1}),
    "holder": LossCase(-0.5),
    "ropo": LossCase(56 / 225 * (LOG2 + 7)),
    "repo": LossCase(LOG2, metrics=("eta",)),
    "chipo": LossCase(LOG2),
    "dpop": LossCase(LOG2),
    "minor": LossCase(LOG2),
    "adadpo": LossCase(0.01),
    "gdpo": LossCase(LOG2),
    "dpopro": LossCase(LOG2, {"dpopro_rho": 0.5}),
    "mrpo": LossCase(None, {"mrpo_alpha": 0.3}),
}

# What asks something of its own of a model or an engine: all of the matrix is run with these, one cell with the others
ENGINE_LOSSES = ("ddro", "rdro", "kldpo", "wdpo")
# Losses of pairs differ in one function only, which other tests look at: one stands for all, in tests that are about
# models, adapters, precision or checkpoints
KINDS = (*ENGINE_LOSSES, "grdpo", "repo")
