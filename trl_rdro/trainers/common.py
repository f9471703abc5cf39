"""What the paired and the unpaired trainer share."""

from typing import Any


def require_own_config(args: Any, ours: list[str], config_class: type) -> None:
    """Refuse a plain TRL config with one of our losses: it lacks their fields and was not validated."""
    if ours and not isinstance(args, config_class):
        name = config_class.__name__
        raise TypeError(
            f"`loss_type={ours[0]!r}` needs `trl_rdro.{name}`, got `{type(args).__module__}.{type(args).__name__}`. "
            f"Import `{name}` from trl_rdro."
        )
