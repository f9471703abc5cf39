"""Which function and which options a loss type is: the one place that says so. Testable without a trainer."""

from typing import Any

import torch

from .. import losses
from ..configs.density_ratio_config import DensityRatioConfig


def pair_loss(
    name: str, chosen: torch.Tensor, rejected: torch.Tensor, lengths: torch.Tensor, args: Any
) -> torch.Tensor:
    """The pair loss called `name`, by itself or inside a robust loss.

    Args:
        name: an inner loss of `DPOConfig.inner_loss_type`, or a loss type of the family "pair".
        chosen, rejected: `(n,)` log-ratios summed over each completion's tokens, in nats.
        lengths: `(2, n)` tokens of the chosen and the rejected completions, at least 1.
        args: a `DPOConfig`.

    Returns:
        `(n,)` losses.

    Raises:
        `ValueError`: for another name.
    """
    if name == "sigmoid":
        return losses.sigmoid_loss(chosen, rejected, args.beta, args.label_smoothing)
    if name == "ipo":
        return losses.ipo_loss(chosen / lengths[0], rejected / lengths[1], args.beta)
    if name == "hinge":
        return losses.hinge_loss(chosen, rejected, args.beta)
    raise ValueError(f"There is no pair loss {name!r}.")


def density_ratio_loss(
    name: str, logratios: torch.Tensor, preferred: torch.Tensor, fraction: float, args: DensityRatioConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The density-ratio loss called `name`.

    Args:
        logratios: `(n,)` z, in nats.
        preferred: `(n,)`, bool.
        fraction: preferred share of the data, for options that are None.
        args: a `DPOConfig` or `KTOConfig`.

    Returns:
        `(n,)` losses; and, for a loss with a cap, which completions lie beyond it, `(n,)`, bool.

    Raises:
        `ValueError`: for another name.
    """
    if name == "rdro":
        return losses.rdro_loss(logratios, preferred, fraction if args.rdro_alpha is None else args.rdro_alpha), None
    if name == "ddro":
        t = fraction if args.ddro_t is None else args.ddro_t
        beyond_cap = losses.ddro_beyond_cap(logratios, t, args.ddro_cap)
        return losses.ddro_loss(logratios, preferred, t, args.ddro_cap), beyond_cap
    raise ValueError(f"There is no density-ratio loss {name!r}.")


def temperature(name: str, args: Any) -> float:
    """The temperature at which the robust loss `name` weighs the pairs of an optimiser step.

    Raises:
        `ValueError`: for a loss without one.
    """
    if name == "kldpo":
        return args.kldpo_tau
    raise ValueError(f"There is no temperature of {name!r}.")
