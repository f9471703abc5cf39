"""The sizes of a model that memory depends on, counted without its weights."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    tied: bool
    parameters: int  # all, tied ones once
    linear: int  # weights of linear layers other than the LM head: what quantisation applies to
    largest_linear: int
    adapter: int  # LoRA weights
    adapted: int  # linear layers with LoRA in a decoder layer

    @property
    def head(self) -> int:
        return self.vocab * self.hidden


def read_shape(config: PretrainedConfig, lora_targets: str | list[str] | None = None, lora_r: int = 0) -> Shape:
    """
    Count a model's parameters from its config alone.

    Args:
        lora_targets: as PEFT takes them: names, an expression, "all-linear", or None for PEFT's own choice.
        lora_r: the rank, 0 for no LoRA.

    Raises:
        `ValueError`: for a target that no linear layer has the name of, and a model without linear layers.
    """
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not linears:
        raise ValueError("it has no linear layers beside its LM head")
    adapted = _adapted(linears, lora_targets) if lora_r else []
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linears.values()),
        largest_linear=max(module.weight.numel() for module in linears.values()),
        adapter=sum(lora_r * (module.in_features + module.out_features) for module in adapted),
        adapted=round(len(adapted) / text.num_hidden_layers),
    )


def _adapted(linears: dict[str, nn.Linear], targets: str | list[str] | None) -> list[nn.Linear]:
    """The layers that PEFT adapts: all, those whose name matches an expression, or those of a list of names."""
    if targets == "all-linear":
        return list(linears.values())
    if isinstance(targets, str):  # so TRL gives a list of one, too
        patterns = {targets: targets}
    else:
        # PEFT's own choice for Llama and Qwen2
        patterns = {target: rf"(.*\.)?{re.escape(target)}" for target in targets or ("q_proj", "v_proj")}
    adapted: dict[str, nn.Linear] = {}
    for target, pattern in patterns.items():
        try:
            found = {name: module for name, module in linears.items() if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"the LoRA target {target} is no regular expression: {error}") from error
        if not found:
            names = sorted({name.rpartition(".")[2] for name in linears})
            hint = ""
            if target in names:
                hint = rf" (a single target is an expression for whole names: write '.*\.{target}')"
            raise ValueError(
                f"no linear layer is called {target}{hint}, for LoRA to adapt: there are {', '.join(names)}"
            )
        adapted |= found
    return list(adapted.values())
