"""The losses: pure functions of log-ratios that return one value per sample. No TRL, no trainer, no state.

The caller reduces: a mean over pairs, or a mean with `class_weights` over labelled samples.
"""

from .density_ratio import class_weights, ddro_beyond_cap, ddro_loss, rdro_loss
from .displacement import chipo_loss, dpop_loss, minor_loss
from .groups import grdpo_update, grdpo_weights
from .noise import cdpo_loss, holder_loss, repo_loss, repo_posterior, repo_update, ropo_loss
from .normalisation import log_normalisation, mixture_weights, normalisation_sums
from .pairwise import hinge_loss, ipo_loss, sigmoid_loss
from .references import mrpo_loss, mrpo_reference
from .robust import kldpo_log_weights, kldpo_loss, kldpo_tau, wdpo_penalty
from .scaling import adadpo_loss
from .soft_labels import dpopro_loss, gdpo_loss


__all__ = [
    "adadpo_loss",
    "cdpo_loss",
    "chipo_loss",
    "class_weights",
    "ddro_beyond_cap",
    "ddro_loss",
    "dpop_loss",
    "dpopro_loss",
    "gdpo_loss",
    "grdpo_update",
    "grdpo_weights",
    "hinge_loss",
    "holder_loss",
    "ipo_loss",
    "kldpo_log_weights",
    "kldpo_loss",
    "kldpo_tau",
    "log_normalisation",
    "minor_loss",
    "mixture_weights",
    "mrpo_loss",
    "mrpo_reference",
    "normalisation_sums",
    "rdro_loss",
    "repo_loss",
    "repo_posterior",
    "repo_update",
    "ropo_loss",
    "sigmoid_loss",
    "wdpo_penalty",
]
