"""
PEFT adapters to score with: loaded whole or not at all, and with the reference that they were trained against.

A run that starts from a given adapter keeps a copy of it as its reference, which TRL names "ref" and PEFT saves in a
folder of that name. A run that starts from a new adapter has the model without it as its reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import find_adapter_config_file

from ..errors import UserError


REFERENCE = "ref"


def put_adapter(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """
    `model` with the adapter `name`, a directory or hub id, and with its reference if that is an adapter too.

    Raises:
        `UserError`: for an adapter that does not fit the model, and for one on the output head that TRL's fused head
            would pass over. A head that was trained whole (`modules_to_save`) is read as it is.
    """
    from peft import PeftModel  # an optional dependency
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = PeftModel.from_pretrained(model, name)
    _require_fit(adapted, name, "default")
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"cannot load the adapter {name}: it changes the output head, which is not supported; merge it into its "
            "model (merge_and_unload) and score the result"
        )
    if find_adapter_config_file(name, subfolder=REFERENCE) is not None:
        adapted.load_adapter(name, REFERENCE, subfolder=REFERENCE)
        _require_fit(adapted, name, REFERENCE, subfolder=REFERENCE)
    return adapted


def _require_fit(model: Any, name: str, adapter: str, **where: str) -> None:
    """Refuse an adapter that has weights without a place in the model, or none for a place: PEFT only warns."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = load_peft_weights(name, device="cpu", **where).keys()
    wanted = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).keys()
    homeless = stored - wanted - model.state_dict().keys()  # embeddings may be stored beside the adapter
    if lost := sorted(homeless | (wanted - stored)):
        raise UserError(
            f"cannot load the adapter {name}: {len(stored & wanted)} of its {len(stored)} tensors fit the model "
            f"{model.peft_config[adapter].base_model_name_or_path}, which has room for {len(wanted)} (not for, or not "
            f"filled: {lost[0]}); it belongs to another model"
        )


def describe_reference(model: Any) -> str:
    """What `as_reference` makes of the model, in words."""
    base = model.peft_config["default"].base_model_name_or_path
    return f"{base} with the adapter that training started from" if _has_own(model) else f"{base} (adapter off)"


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """The model as its training's reference."""
    if not _has_own(model):
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE)
    try:
        yield
    finally:
        model.set_adapter("default")


def _has_own(model: Any) -> bool:
    return REFERENCE in model.peft_config
