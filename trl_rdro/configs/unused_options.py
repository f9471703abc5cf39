"""Options of losses that are not in use: a warning, since one file of options may serve several losses."""

import dataclasses
from typing import Any

from ..log import get_logger
from ..losses.types import LOSS_TYPES, of_family


logger = get_logger(__name__)

# Options of a whole family; those of a loss begin with its name
FAMILY_OPTIONS = {
    "inner_loss_type": "robust",
    "preferred_fraction": "density_ratio",
    "count_fraction_by_prompt": "density_ratio",
}


def readers_of(option: str) -> tuple[str, ...]:
    """The names of our losses that read `option`, none for an option that is not a loss's."""
    if option in FAMILY_OPTIONS:
        return of_family(FAMILY_OPTIONS[option])
    return tuple(name for name in LOSS_TYPES if option.startswith(f"{name}_"))


def warn_of_unused_options(config: Any, loss_types: list[str]) -> None:
    """Name the options that were set and that none of `loss_types` reads."""
    for field in dataclasses.fields(config):
        readers, value = readers_of(field.name), getattr(config, field.name)
        if readers and value != field.default and not set(readers) & set(loss_types):
            logger.warning(
                f"`{field.name}={value!r}` has no effect: `loss_type` is {' and '.join(loss_types)}, and only "
                f"{' and '.join(readers)} {'reads' if len(readers) == 1 else 'read'} it."
            )
