"""What cannot be packed: refused by name where that is known beforehand, and found by trying it otherwise."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from .attention import base_implementation, use_packed_attention
from .forward import Layouts, PackedModel


PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2  # nats of a token's log-probability
# Two short pairs (prompt, chosen, rejected), in tokens
_MADE_UP = ((7, 5, 9), (3, 8, 2))


def _refusal(what: str, why: str, advice: str = "Set `padding_free=False`.") -> ValueError:
    return ValueError(f"`padding_free=True` cannot be used with {what}: {why}. {advice}")


def _name(model: Any) -> str:
    return type(model.get_base_model() if is_peft_model(model) else model).__name__


def refuse_arguments(args: Any) -> None:
    """
    Raises:
        `ValueError`: for options of a run that do not go with packed rows, before a model is loaded.
    """
    if args.use_liger_kernel:
        raise _refusal("`use_liger_kernel=True`", "its kernels replace parts of the model that packing relies on")
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise _refusal(
            "context or sequence parallelism", "a row that is split over devices has no segments to attend to"
        )


def refuse_config(config: PreTrainedConfig) -> None:
    """
    Raises:
        `ValueError`: for an architecture that is known not to be packable, by its configuration.
    """
    name = f"`{config.model_type}`"
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(f"the encoder-decoder model {name}", "only decoders take packed rows")
    text = config.get_text_config()
    if text is not config or hasattr(config, "vision_config"):
        raise _refusal(f"the vision or multi-modal model {name}", "its inputs are more than one row of tokens")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if any("mrope_section" in part for part in (rope, *rope.values()) if isinstance(part, dict)):
        raise _refusal(f"{name}, which has multi-dimensional position ids (mRoPE)", "those of a packed row have one")
    others = sorted(set(getattr(text, "layer_types", None) or ()) - PACKABLE_LAYERS)
    if others:
        raise _refusal(
            f"{name}, which has layers of type {', '.join(map(repr, others))}",
            "only full and sliding attention keep the sequences of a row apart",
        )
    dropout = getattr(text, "attention_dropout", 0.0)
    if dropout:
        raise _refusal(
            f"`attention_dropout={dropout}`",
            "it is drawn for a padded square of attention weights",
            "Set it to 0 in the model's config, or `padding_free=False`.",
        )


def refuse_model(model: Any, backend: str, compiled: bool) -> None:
    """
    Args:
        model: with or without adapters.
        backend: what computes attention, see [`attention.backend`].
        compiled: whether `torch_compile` is set.

    Raises:
        `ValueError`: for what is known only once a model is loaded.
    """
    if is_peft_model(model):
        prompts = [peft.peft_type for peft in model.peft_config.values() if peft.is_prompt_learning]
        if prompts:
            raise _refusal(f"{prompts[0]} adapters", "they put virtual tokens before every row of the padded batch")
        model = model.get_base_model()
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and backend != "flash":
        raise _refusal(
            f"`attn_implementation={base_implementation(model)!r}` and the capped attention logits of "
            f"`{text.model_type}`",
            "only FlashAttention caps them in packed rows",
            "Set `attn_implementation='flash_attention_2'`, or `padding_free=False`.",
        )
    if compiled and backend == "loop":
        raise _refusal(
            "`torch_compile=True` here",
            "attention over packed rows is a loop over their segments on this device and in this precision, which "
            "would be compiled anew for every batch",
        )


def use_or_refuse(model: PreTrainedModel) -> None:
    """
    Let a model take packed rows.

    Raises:
        `ValueError`: if its attention cannot be replaced.
    """
    before = base_implementation(model)
    use_packed_attention(model)
    if base_implementation(model) == model.config._attn_implementation and "flash" not in before:
        raise _refusal(
            _name(model), "its attention does not go through the functions that transformers lets one replace"
        )


def made_up_batch(vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Two short pairs, padded as TRL pads them: rows [chosen, chosen, rejected, rejected]."""
    generator = torch.Generator().manual_seed(0)
    chosen: list[torch.Tensor] = []
    rejected: list[torch.Tensor] = []
    prompts = []
    for prompt, *completions in _MADE_UP:
        ids = torch.randint(vocab_size, (prompt,), generator=generator)
        prompts.append(prompt)
        for side, length in zip((chosen, rejected), completions, strict=True):
            side.append(torch.cat([ids, torch.randint(vocab_size, (length,), generator=generator)]))
    rows = chosen + rejected
    width = max(map(len, rows))
    input_ids = torch.stack([F.pad(row, (0, width - len(row))) for row in rows])
    columns = torch.arange(width)
    attention_mask = (columns < torch.tensor([[len(row)] for row in rows])).long()
    scored = attention_mask.bool() & (columns >= torch.tensor(prompts * 2).unsqueeze(1))
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": input_ids.masked_fill(~scored, -100)}
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def self_check(model: Any, share: bool, half: bool) -> None:
    """
    Forward two short pairs padded and packed, and compare the log-probabilities of their tokens: finds every model
    that carries something from token to token outside attention.

    Args:
        model: with TRL's fused LM head, as it stands in training.
        share: whether prompts are shared.
        half: whether it computes in half precision.

    Raises:
        `ValueError`: if they differ.
    """
    batch = made_up_batch(model.config.get_text_config().vocab_size, model.device)
    # Not all of the model: 4-bit layers on a CPU are turned into another format by a forward in evaluation
    dropouts = [module for module in model.modules() if "Dropout" in type(module).__name__ and module.training]
    for module in dropouts:
        module.eval()
    padded, packed = (
        forward(**batch, use_cache=False, fused_lm_head=True).log_probs.float()
        for forward in (model, PackedModel(model, Layouts(share)))
    )
    for module in dropouts:
        module.train()
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    difference = (packed - padded).abs().max().item()
    if padded.isfinite().all() and not difference <= tolerance:
        raise ValueError(
            f"`padding_free=True` changes what {_name(model)} computes: log-probabilities of tokens of two "
            f"made-up pairs differ by up to {difference:.2g} nats between padded and packed rows, where {tolerance:g} "
            "is allowed. It carries something from token to token outside attention. Set `padding_free=False`."
        )
