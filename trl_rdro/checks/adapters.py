"""
A new PEFT adapter against the layers of its model, which its config tells: no weights are needed for that.

PEFT passes over names that no layer has, and TRL refuses an adapter on the LM head, whose weight it reads by itself,
only once the model is loaded, or ends in an `AttributeError`.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..compat.engines import without_zero3
from ..log import get_logger


logger = get_logger(__name__)

# Fields of PEFT's configurations that hold names of modules: of those to adapt, and of those to train as a whole
TARGETS, WHOLE = "target_modules", "modules_to_save"


def check_adapter_config(peft_config: Any, config: Any, args: Any) -> None:
    """
    Refuse an adapter that does not fit the model, or that the trainers cannot train.

    Args:
        peft_config: a PEFT configuration.
        config: the model's.
        args: the training configuration.

    Raises:
        `TypeError`: for anything but a PEFT configuration.
        `ValueError`: with one sentence.
    """
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a PEFT configuration, such as `peft.LoraConfig`, got {type(peft_config).__name__}."
        )
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"The adapter's `task_type` (`lora_task_type`) must be 'CAUSAL_LM', got {task!r}: a language model is "
            "trained. Remove it."
        )
    if args.sync_ref_model:
        raise ValueError(
            "`sync_ref_model=True` cannot be combined with an adapter: the reference is the model without it, which "
            "does not move. Set `sync_ref_model=False`, or train the whole model."
        )
    layers = _layers(config, args.trust_remote_code)
    if layers is not None:
        _check_targets(peft_config, layers)
        _check_token_indices(peft_config, layers, config)


def _layers(config: Any, trust_remote_code: bool) -> Any:
    """The model without weights, where transformers can build it from its config as a causal language model."""
    try:
        with torch.device("meta"), without_zero3():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:  # of another kind, such as one with images
        return None


def _check_targets(peft_config: Any, layers: Any) -> None:
    modules = {name for name, _ in layers.named_modules() if name}
    parameters = {name for name, _ in layers.named_parameters()}
    head = next((name for name, module in layers.named_modules() if module is layers.get_output_embeddings()), None)
    targets = getattr(peft_config, TARGETS, None)
    if targets and targets != "all-linear":
        found = _found(TARGETS, targets, modules, at_least=1)
        if head in found:
            raise ValueError(
                f"`{TARGETS}` (`lora_{TARGETS}`) must not have the LM head {head!r}, got {targets!r}: its weight is "
                "read directly, so that the adapter would never be trained. Remove it."
            )
    for field, names in ((WHOLE, modules), ("target_parameters", parameters)):
        if wanted := getattr(peft_config, field, None):
            _found(field, [wanted] if isinstance(wanted, str) else wanted, names, at_least=len(wanted))


def _found(field: str, wanted: str | Iterable[str], names: set[str], at_least: int) -> set[str]:
    """The names that an expression, or a list of their last parts, stands for."""
    if isinstance(wanted, str):
        try:
            found = {name for name in names if re.fullmatch(wanted, name)}
        except re.error as error:
            raise ValueError(
                f"`{field}` (`lora_{field}`) must be names or a regular expression of whole names, got {wanted!r}: "
                f"{error}."
            ) from error
        missing = [] if found else [wanted]
    else:
        by_name = {part: {name for name in names if name == part or name.endswith(f".{part}")} for part in wanted}
        found, missing = set().union(*by_name.values()), [part for part, of_it in by_name.items() if not of_it]
        if len(by_name) - len(missing) >= min(at_least, len(by_name)):
            if missing:
                logger.warning(f"`{field}`: the model has no {', '.join(missing)}, which are passed over.")
            return found
    if missing:
        last = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
        near = difflib.get_close_matches(missing[0], last, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if isinstance(wanted, str) and wanted in last:
            hint = rf" A single text is an expression for whole names: write '.*\.{wanted}'."
        raise ValueError(
            f"`{field}` (`lora_{field}`) names {missing[0]!r}, which the model does not have.{hint} It has "
            f"{', '.join(last)}."
        )
    return found


def _check_token_indices(peft_config: Any, layers: Any, config: Any) -> None:
    given = getattr(peft_config, "trainable_token_indices", None)
    if not given:
        return
    name = "trainable_token_indices"
    embeddings = next(n for n, module in layers.named_modules() if module is layers.get_input_embeddings())
    by_layer = given if isinstance(given, dict) else {embeddings.rpartition(".")[2]: given}
    if getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            f"`{name}` cannot be combined with a model whose LM head is tied to its embeddings "
            "(`tie_word_embeddings`): the weight of the head is read directly. Train the embeddings as a whole "
            f"(`{WHOLE}`), or give the model a head of its own (`tie_word_embeddings=False`)."
        )
    for layer, tokens in by_layer.items():
        if not embeddings.endswith(layer):
            raise ValueError(f"`{name}` must be of the embeddings {embeddings!r}, got {layer!r}. Name those.")
        rows = layers.get_input_embeddings().num_embeddings
        if bad := [token for token in tokens if not 0 <= token < rows]:
            raise ValueError(f"`{name}` has the token {bad[0]}, and the model has {rows} embeddings. Correct it.")
