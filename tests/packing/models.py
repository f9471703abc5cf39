"""Tiny models of the architectures that are packed, with TRL's fused LM head."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from ..tiny import build_tiny, tiny_llama, tiny_qwen2


WINDOW = 7  # shorter than most rows of `batches.PAIRS`

ARCHITECTURES = {
    "qwen2": lambda **kw: tiny_qwen2(**kw),
    "qwen2 windows": lambda **kw: tiny_qwen2(
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, **kw
    ),
    "llama": lambda **kw: tiny_llama(**kw),
    "mistral": lambda **kw: build_tiny(MistralForCausalLM, MistralConfig, sliding_window=WINDOW, **kw),
    "qwen3": lambda **kw: build_tiny(Qwen3ForCausalLM, Qwen3Config, head_dim=8, **kw),
    # Without its cap on attention logits, which is refused
    "gemma2": lambda **kw: build_tiny(
        Gemma2ForCausalLM, Gemma2Config, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=None, **kw
    ),
    "gemma3": lambda **kw: build_tiny(
        Gemma3ForCausalLM, Gemma3TextConfig, head_dim=8, sliding_window=WINDOW, layer_types=LAYER_TYPES, **kw
    ),
    "mixtral": lambda **kw: build_tiny(MixtralForCausalLM, MixtralConfig, num_local_experts=4, **kw),
    # Learned positions, and no grouped heads
    "gpt2": lambda **kw: build_tiny(GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, **kw),
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def with_fused_head(model: PreTrainedModel) -> PreTrainedModel:
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model.eval()


def gradients(model: PreTrainedModel) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
