"""How sharply kldpo and drdpo weigh the pairs of a step, said before the run starts."""

import math
from typing import Any

from ..log import get_logger
from ..losses.types import LOSS_TYPES


logger = get_logger(__name__)

SHARES = (0.99, 0.8, 0.5)


def say_how_sharp(names: list[str], args: Any) -> None:
    """Log at which spreads of the losses the temperature of each of `names` gives which effective sample sizes:
    exp(-s^2 / tau^2) of the step for normal losses with standard deviation s."""
    for name in names:
        option = LOSS_TYPES[name].temperature
        if option is None or getattr(args, f"{name}_target_ess", None) is not None:
            continue
        tau = getattr(args, option)
        spreads = [tau * math.sqrt(-math.log(share)) for share in SHARES]
        # Where log sigma is nearly straight, a pair's loss moves by beta / 2 for each nat of its margin
        margins = f" (margins by {2 * spreads[1] / args.beta:.2g} nats)" if args.inner_loss_type == "sigmoid" else ""
        logger.info(
            f"`{name}` with `{option}={tau:g}`: the effective sample size of a step is 99 % where its losses spread "
            f"by {spreads[0]:.2g}, 80 % by {spreads[1]:.2g}{margins}, 50 % by {spreads[2]:.2g} (standard deviations). "
            "At the start they are all equal, and it is DPO."
        )
