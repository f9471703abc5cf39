"""Values out of a list. Nothing slow is imported here: the command line asks too, before anything is."""

import difflib
from collections.abc import Mapping, Sequence


# What the losses of a trainer need, and where they are
_NEEDS = {
    "dpo": "needs pairs (prompt, chosen, rejected): use `DPOTrainer` with `DPOConfig`, or `trl-rdro dpo`",
    "kto": "needs labelled completions (prompt, completion, label): use `KTOTrainer` with `KTOConfig`, or "
    "`trl-rdro kto`",
}


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse `value` unless it is one of `choices`, and name the nearest."""
    if isinstance(value, str) and value in choices:
        return
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{name}` has no value {value!r}.{hint} Choose from {', '.join(map(repr, choices))}.")


def require_loss_type(value: object, method: str, loss_types: Mapping[str, Sequence[str]]) -> None:
    """Refuse `value` unless it is one of `loss_types[method]`; one of the other trainer's is said to be that one's."""
    for other, names in loss_types.items():
        if other != method and value in names and value not in loss_types[method]:
            raise ValueError(f"`loss_type={value!r}` {_NEEDS[other]}.")
    require_choice("loss_type", value, loss_types[method])
