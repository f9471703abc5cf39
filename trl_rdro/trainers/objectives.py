"""Which function and which options a loss type is: the one place that says so. Testable without a trainer."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .. import losses
from ..configs.density_ratio_config import DensityRatioConfig
from ..losses.density_ratio import Share


class Pairs(NamedTuple):
    """What a loss of pairs may look at."""

    chosen: torch.Tensor  # (n,) log-ratios summed over each completion's tokens, in nats
    rejected: torch.Tensor  # (n,)
    lengths: torch.Tensor  # (2, n) tokens of the chosen and the rejected completions, at least 1
    columns: Mapping[str, torch.Tensor]  # (n,) each: what the rows carry, and under a loss's name what it has learned


# One line for each; a is the `DPOConfig`
_PAIR_LOSSES: dict[str, Callable[[Pairs, Any], torch.Tensor]] = {
    "sigmoid": lambda p, a: losses.sigmoid_loss(p.chosen, p.rejected, a.beta, a.label_smoothing),
    "ipo": lambda p, a: losses.ipo_loss(p.chosen / p.lengths[0], p.rejected / p.lengths[1], a.beta),
    "hinge": lambda p, a: losses.hinge_loss(p.chosen, p.rejected, a.beta),
    "cdpo": lambda p, a: losses.cdpo_loss(p.chosen, p.rejected, a.beta, a.label_smoothing),
    "holder": lambda p, a: losses.holder_loss(p.chosen, p.rejected, a.beta, a.holder_gamma),
    "ropo": lambda p, a: losses.ropo_loss(p.chosen, p.rejected, a.beta, a.ropo_alpha),
    "repo": lambda p, a: losses.repo_loss(p.chosen, p.rejected, p.columns["repo"], a.beta),
    "chipo": lambda p, a: losses.chipo_loss(p.chosen, p.rejected, a.beta, a.chipo_clip),
    "dpop": lambda p, a: losses.dpop_loss(p.chosen, p.rejected, a.beta, a.dpop_lambda),
    "minor": lambda p, a: losses.minor_loss(p.chosen, p.rejected, a.beta),
    "adadpo": lambda p, a: losses.adadpo_loss(
        p.chosen, p.rejected, a.beta, a.adadpo_rho0, a.adadpo_tau_min, a.adadpo_tau_max
    ),
    "gdpo": lambda p, a: losses.gdpo_loss(p.chosen, p.rejected, p.columns["preference_probability"], a.beta),
    "dpopro": lambda p, a: losses.dpopro_loss(
        p.chosen, p.rejected, p.columns["preference_probability"], a.beta, a.dpopro_rho
    ),
    "mrpo": lambda p, a: _mrpo(p, a),
}


def _mrpo(p: Pairs, a: Any) -> torch.Tensor:
    own = torch.stack([p.columns["ref_chosen_logps"], p.columns["ref_rejected_logps"]])
    second = torch.stack([p.columns["second_ref_chosen_logps"], p.columns["second_ref_rejected_logps"]])
    return losses.mrpo_loss(p.chosen, p.rejected, own, second, a.beta, a.mrpo_alpha)


def pair_loss(
    name: str,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    lengths: torch.Tensor,
    args: Any,
    columns: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> torch.Tensor:
    """The pair loss called `name`, by itself or inside a robust loss.

    Args:
        name: an inner loss of `DPOConfig.inner_loss_type`, or a loss type of the family "pair".
        chosen, rejected, lengths, columns: see `Pairs`.
        args: a `DPOConfig`.

    Returns:
        `(n,)` losses.

    Raises:
        `ValueError`: for another name.
    """
    if name not in _PAIR_LOSSES:
        raise ValueError(f"There is no pair loss {name!r}.")
    return _PAIR_LOSSES[name](Pairs(chosen, rejected, lengths, columns), args)


def mixture(name: str, fraction: Share, args: DensityRatioConfig) -> Share:
    """The share of p+ in the reference that the density-ratio loss called `name` assumes: its option, or where that is
    None the preferred `fraction` of the data.

    Raises:
        `ValueError`: for another name.
    """
    options = {"rdro": args.rdro_alpha, "ddro": args.ddro_t}
    if name not in options:
        raise ValueError(f"There is no density-ratio loss {name!r}.")
    given = options[name]
    return fraction if given is None else given


def density_ratio_loss(
    name: str, logratios: torch.Tensor, preferred: torch.Tensor, fraction: Share, args: DensityRatioConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The density-ratio loss called `name`.

    Args:
        logratios: `(n,)` z, in nats.
        preferred: `(n,)`, bool.
        fraction: preferred share of the data, or of each completion's prompt, for options that are None.
        args: a `DPOConfig` or `KTOConfig`.

    Returns:
        `(n,)` losses; and, for a loss with a cap, which completions lie beyond it, `(n,)`, bool.

    Raises:
        `ValueError`: for another name.
    """
    share = mixture(name, fraction, args)
    if name == "rdro":
        return losses.rdro_loss(logratios, preferred, share), None
    beyond_cap = losses.ddro_beyond_cap(logratios, share, args.ddro_cap)
    return losses.ddro_loss(logratios, preferred, share, args.ddro_cap), beyond_cap


def temperature(name: str, args: Any, step_losses: torch.Tensor | None = None) -> float:
    """The temperature at which the robust loss `name` weighs the pairs of an optimiser step, negative where it follows
    the pairs of low loss.

    Args:
        step_losses: `(N,)` of all of them, from which it is solved where their effective sample size is given.

    Raises:
        `ValueError`: for a loss without one.
    """
    if name == "kldpo":
        if args.kldpo_target_ess is None:
            return args.kldpo_tau
        assert step_losses is not None  # the whole step's, which are found before it
        return losses.kldpo_tau(step_losses, args.kldpo_target_ess)
    if name == "drdpo":
        return -args.drdpo_beta
    raise ValueError(f"There is no temperature of {name!r}.")


# What a loss learns beside the policy: see `trl_rdro.trainers.loss_state`


def number_of_a_new_label(name: str, args: Any) -> float:
    """The number that the loss `name` starts from for a label it has not met.

    Raises:
        `ValueError`: for a loss that has none.
    """
    if name == "repo":
        return args.repo_eta
    if name == "grdpo":
        raise ValueError(
            "`grdpo` met a `group` that the training set does not have, so that there is no weight for it. Remove "
            "such rows from the evaluation data, or give them a group of the training set."
        )
    raise ValueError(f"There is no number of {name!r} to start from.")


def numbers_of_pairs(numbers: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
    """What a loss uses of `(k,)` numbers for pairs with `(n,)` labels in 0..k-1, `(n,)`: relative to the labels'
    shares of the training set, where `(k,)` sizes are known."""
    return numbers[labels] if sizes is None else losses.grdpo_weights(numbers, sizes, labels)


def state_statistics(name: str, pairs: Pairs, args: Any) -> torch.Tensor:
    """What each pair says about its label's number, `(n,)`.

    Raises:
        `ValueError`: for a loss without a state.
    """
    if name == "repo":
        return losses.repo_posterior(pairs.chosen, pairs.rejected, pairs.columns["repo"], args.beta)
    if name == "grdpo":
        return _PAIR_LOSSES[args.inner_loss_type](pairs, args)
    raise ValueError(f"There is no state of {name!r}.")


def state_metrics(name: str, of_pairs: torch.Tensor, by_name: dict[str, float]) -> dict[str, torch.Tensor]:
    """What is logged of a state: scalars, from the `(n,)` numbers of a micro-batch's pairs, and from those of the
    labels where their names are known.

    Raises:
        `ValueError`: for a loss without a state.
    """
    if name == "repo":
        return {"repo/eta": of_pairs.mean()}
    if name == "grdpo":
        return {f"grdpo/weight_{group}": of_pairs.new_full((), weight) for group, weight in by_name.items()}
    raise ValueError(f"There is no state of {name!r}.")


def updated_numbers(
    name: str, numbers: torch.Tensor, statistics: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, args: Any
) -> torch.Tensor:
    """The numbers after an optimiser step, `(k,)`.

    Args:
        numbers: `(k,)` before it.
        statistics, labels, weights: `(N,)` of all its pairs; the labels in 0..k-1.

    Raises:
        `ValueError`: for a loss without a state.
    """
    if name == "repo":
        return losses.repo_update(numbers, statistics, labels, args.repo_rate, weights)
    if name == "grdpo":
        return losses.grdpo_update(numbers, statistics, labels, args.grdpo_eta, weights)
    raise ValueError(f"There is no state of {name!r}.")
