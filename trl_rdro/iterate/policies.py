"""Loading pi_0 and the policies trained from it, for sampling and scoring: one at a time, never two."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from trl import get_peft_config, get_quantization_config

from ..tools.loading import load_model


class Policies:
    """
    Args:
        args: the training arguments, whose `model_init_kwargs` the trainer loads its model with as well.
        model_args: TRL's `ModelConfig`.
    """

    def __init__(self, args: Any, model_args: Any):
        self.args, self.model_args = args, model_args
        self._name: str | None = None
        self._model: Any = None
        self.end_tokens: set[int] = set()

    @contextmanager
    def use(self, saved: Path | None) -> Iterator[torch.nn.Module]:
        """The policy saved there, or pi_0. With PEFT both are the same model, with other adapter weights or with the
        adapter switched off."""
        name, is_adapter = self.model_args.model_name_or_path, self.model_args.use_peft
        if saved is not None and not is_adapter:
            name = str(saved)
        if name != self._name:
            self.close()
            self._name, self._model = name, self._load(name)
        if saved is not None and is_adapter:
            load_adapter(self._model, saved)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        is_mixed = self.args.bf16 or self.args.fp16
        base = self._model.disable_adapter() if saved is None and is_adapter else nullcontext()
        with base, torch.no_grad(), torch.autocast(self.args.device.type, dtype, enabled=is_mixed):
            yield self._model

    def close(self) -> None:
        """Free the memory, for the trainer or for another model."""
        self._name, self._model = None, None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU

    def _load(self, name: str) -> torch.nn.Module:
        kwargs = dict(self.args.model_init_kwargs or {})
        quantization_config = get_quantization_config(self.model_args)
        if quantization_config is not None:
            kwargs |= {"quantization_config": quantization_config, "device_map": {"": self.args.device}}
        model = load_model(name, **kwargs)
        if quantization_config is None:
            model.to(self.args.device)
        ends = model.generation_config.eos_token_id
        self.end_tokens |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        # What a model's author advises for chats (a temperature, a repetition penalty) is another distribution
        model.generation_config = GenerationConfig()
        if self.model_args.use_peft:
            from peft import get_peft_model  # an optional dependency

            peft_config: Any = get_peft_config(self.model_args)  # not None, as an adapter is wanted
            model = get_peft_model(model, peft_config).eval()
        for module in model.modules():
            # On a CPU bitsandbytes 0.50 packs 4-bit weights to sample with them, and does not get the same weights
            # back when it unpacks them for another adapter
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model


def load_adapter(model: torch.nn.Module, saved: Path) -> None:
    """Give the adapter of `model` the weights saved there."""
    from peft import load_peft_weights, set_peft_model_state_dict  # an optional dependency

    set_peft_model_state_dict(model, load_peft_weights(str(saved), device="cpu"))
