"""The losses: pure functions of log-ratios that return one value per sample. No TRL, no trainer, no state.

The caller reduces: a mean over pairs, or a mean with `class_weights` over labelled samples.
"""

from .density_ratio import class_weights, ddro_beyond_cap, ddro_loss, rdro_loss
from .pairwise import hinge_loss, ipo_loss, sigmoid_loss
from .robust import kldpo_log_weights, kldpo_loss, wdpo_penalty


__all__ = [
    "class_weights",
    "ddro_beyond_cap",
    "ddro_loss",
    "hinge_loss",
    "ipo_loss",
    "kldpo_log_weights",
    "kldpo_loss",
    "rdro_loss",
    "sigmoid_loss",
    "wdpo_penalty",
]
