"""FSDP, ZeRO-3 and gradient checkpointing: what the trainers must say to engines that do not ask."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils import launch as accelerate_launch
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import deepspeed as zero

from .checkpointing import checkpointing_off, kwargs_of, may_be_reentrant
from .trl_trainer import TrlTrainer


def full_precision_outputs(accelerator: Any) -> None:
    """Let FSDP2 return what the model computed. In mixed precision accelerate has it round the outputs: the
    log-probabilities to three digits, and the losses here take small differences of them."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Models made here are whole, also once ZeRO-3 is configured: from then on transformers takes apart all that it
    makes, and cannot take apart one without weights."""
    engine = zero._hf_deepspeed_config_weak_ref
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = engine


def refuse_fsdp1(accelerator: Any, loss_type: str) -> None:
    """For losses that need gradients with respect to inputs."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            f"`{loss_type}` does not run with FSDP1, whose parameters are only whole between the hooks of a training "
            "step, and not in the pass to the embeddings. Use FSDP2 (`fsdp_version: 2`, or TRL's accelerate config "
            "`fsdp2`)."
        )


def refuse_two_forwards(trainer: TrlTrainer, loss_type: str) -> None:
    """For one backward pass through two forwards. With reentrant checkpointing each of them gives a parameter's
    gradient by itself, and the engines expect one."""
    reentrant = may_be_reentrant(trainer.args)
    distributed = trainer.accelerator.distributed_type != DistributedType.NO
    if distributed and reentrant and trainer.model.is_gradient_checkpointing:
        raise ValueError(
            f"`{loss_type}` makes two forwards for one backward where a forward is random (dropout, NEFTune), which "
            "reentrant gradient checkpointing cannot do in several processes or with DeepSpeed. Set "
            "`disable_dropout=True` and no `neftune_noise_alpha`, or `activation_checkpointing=False`, or, but for "
            "ZeRO-3 with adapters, `gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )


def full_precision_adapters(trainer: TrlTrainer) -> str | None:
    """Let the adapters of a quantised model be trained in float32, as PEFT makes them. TRL has made them bfloat16, in
    which updates below half of a parameter's last digit are lost. Before the optimiser exists.

    Left as they are with DeepSpeed, which trains float32 copies, and FSDP1, which flattens parameters of one dtype.

    Returns:
        What is done, in words; `None` where there is nothing to do.
    """
    adapters = [p for p in trainer.model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    quantised = getattr(trainer.model, "is_loaded_in_4bit", False) or getattr(
        trainer.model, "is_loaded_in_8bit", False
    )
    if not quantised or not adapters:
        return None
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_deepspeed_enabled:
        return "bfloat16 as TRL makes them, with DeepSpeed's float32 copies"
    if plugin is not None and plugin.fsdp_version == 1:
        return "bfloat16 as TRL makes them: FSDP1 flattens parameters of one dtype"
    for parameter in adapters:
        parameter.data = parameter.data.float()
    return "float32"


def reason_not_to_scale_gradients(accelerator: Any) -> str | None:
    """Why `scale_gradients` would not reach all that an engine has accumulated; `None`: it does."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed keeps the gradients to itself"
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        return "FSDP1 keeps the gradients to itself"
    return None


@torch.no_grad()
def scale_gradients(model: torch.nn.Module, factor: float) -> None:
    """Multiply what was accumulated in the gradients of `model`, reduced over the ranks or not yet."""
    gradients = [parameter.grad for parameter in model.parameters()]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for parameter in _fsdp2_parameters(module):
                unsharded = getattr(parameter, "_unsharded_param", None)  # not before the first forward
                gradients += [parameter.unsharded_accumulated_grad, None if unsharded is None else unsharded.grad]
    once = {id(gradient): gradient for gradient in gradients if gradient is not None}
    for gradient in once.values():
        gradient.mul_(factor)


def _fsdp2_parameters(module: FSDPModule) -> list[Any]:
    """What FSDP2 holds of the module's own parameters: in a list of groups, or in older versions of PyTorch in one."""
    state: Any = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [parameter for group in groups if group is not None for parameter in group.fsdp_params]


@contextmanager
def path_of_deepspeed_unchanged():
    """Keep accelerate's launcher of DeepSpeed from adding the working directory to PYTHONPATH, which is searched
    before Python's own modules."""
    add, accelerate_launch.env_var_path_add = (
        accelerate_launch.env_var_path_add,
        lambda name, path: os.environ.get(name, ""),
    )
    try:
        yield
    finally:
        accelerate_launch.env_var_path_add = add


def reason_for_one_backward(accelerator: Any) -> str | None:
    """Why a micro-batch can have no more than one backward pass; `None`: it can."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed takes each backward pass for a micro-batch"
    if accelerator.mixed_precision == "fp16":
        return "fp16 scales the gradients"
    return None


def without_gradient_sync(accelerator: Any, model: torch.nn.Module) -> AbstractContextManager:
    """For a backward pass in a micro-batch before its last. Where gradients wait already, nothing is changed: FSDP2
    would no longer wait afterwards."""
    return accelerator.no_sync(model) if accelerator.sync_gradients else nullcontext()


def backward(accelerator: Any) -> Callable[[torch.Tensor], None]:
    """A backward pass as the Trainer makes it: not under the autocast of a forward."""

    def run(loss: torch.Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            accelerator.backward(loss)

    return run


def settle_fsdp2(model: torch.nn.Module | None) -> None:
    """Let FSDP2 initialise itself now. Otherwise it does so in the first forward and takes the gradients' dtype from
    the parameters trainable then, which are none where the first is that of a reference with adapters off."""
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()


@contextmanager
def without_checkpointing(trainer: TrlTrainer):
    """For gradient-free forwards: reentrant gradient checkpointing warns in them."""
    with torch.no_grad(), checkpointing_off(trainer.model, kwargs_of(trainer.args)):
        yield


@contextmanager
def non_reentrant_checkpointing(trainer: TrlTrainer):
    """For gradients with respect to inputs, which reentrant gradient checkpointing cannot give."""
    reentrant = trainer.model.is_activation_checkpointing and may_be_reentrant(trainer.args)
    kwargs = kwargs_of(trainer.args) or {}
    if reentrant:
        trainer.model.activation_checkpointing_enable({**kwargs, "use_reentrant": False})
    try:
        yield
    finally:
        if reentrant:
            trainer.model.activation_checkpointing_enable({**kwargs, "use_reentrant": True})


@contextmanager
def frozen_head(model: Any):
    """For gradients with respect to inputs. TRL's fused head is one autograd function, which is not told which
    gradients are asked for, and would compute that of its weight too."""
    weight = model.get_output_embeddings().weight
    # FSDP2 remembers from a parameter's first use whether it is trained; ZeRO-3 (`ds_id`) is left alone as well
    sharded = isinstance(model, FSDPModule) or hasattr(weight, "ds_id")
    trained = weight.requires_grad
    weight.requires_grad_(trained and sharded)
    try:
        yield
    finally:
        weight.requires_grad_(trained)
