"""A reference model beside TRL's own, made ready as TRL makes ready that one. Last checked against TRL 1.16."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoModelForCausalLM
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, disable_dropout_in_model, use_adapter

from .checkpointing import checkpointing_off, kwargs_of
from .trl import completion_logps, policy_forward


def second_reference(trainer: Any, name: str) -> Any:
    """Another reference model, for `second_reference_logps`: made ready as TRL does its own. The name of an adapter of
    the trained model stays a name."""
    if is_peft_model(trainer.model) and name in trainer.model.peft_config:
        return name
    kwargs = dict(trainer.args.model_init_kwargs or {})
    if trainer.args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", trainer.args.trust_remote_code)
    kwargs.setdefault("dtype", trainer.model.dtype)
    kwargs.setdefault("attn_implementation", trainer.model.config._attn_implementation)
    # An adapter's folder does not say its architecture; transformers loads it with its base model
    is_adapter = Path(name, "adapter_config.json").exists()
    architecture: Any = AutoModelForCausalLM if is_adapter else None
    model: Any = create_model_from_path(name, architecture, **kwargs)
    vocabularies = [len(x.get_input_embeddings().weight) for x in (model, trainer.model)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"The second reference {name!r} has a vocabulary of {vocabularies[0]}, the trained model one of "
            f"{vocabularies[1]}: they read the same tokens differently. Use a model of the same family, or compute "
            "its log-probabilities into columns of the data."
        )
    disable_dropout_in_model(model)
    add_fused_lm_head(model)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def second_reference_logps(trainer: Any, reference: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Its log-probabilities of the completions, `(2n,)`: chosen, then rejected."""
    if not isinstance(reference, str):
        return torch.cat(trainer.compute_ref_log_probs(reference, inputs))
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    with (
        torch.no_grad(),
        checkpointing_off(trainer.model, kwargs_of(trainer.args)),
        use_adapter(unwrapped, reference),
        trainer.accelerator.autocast(),
    ):
        outputs = policy_forward(trainer, trainer.model, inputs)
    return completion_logps(trainer, outputs.log_probs, inputs["completion_mask"])
