"""Attention over packed rows, registered with transformers beside the model's own.

The layout comes as a keyword argument through the decoder layers, so that it is there again when gradient
checkpointing recomputes them. Without it the model's own implementation is called: generation and padded batches are
untouched.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layout import Layout


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]

# The argument by which the layout travels
LAYOUT = "packed_layout"
PREFIX = "trl_rdro_packed_"
_REGISTERED: set[str] = set()
# The layout of the packed forward in progress: masks and embeddings are made without keyword arguments
CURRENT: ContextVar[Layout | None] = ContextVar("packed_layout", default=None)


@contextmanager
def packed_forward(layout: Layout):
    token = CURRENT.set(layout)
    try:
        yield
    finally:
        CURRENT.reset(token)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let `model` take packed rows, beside everything it takes already. Saved models do not show it."""
    base = model.config._attn_implementation
    # FlashAttention is looked up by the name in the model's config, which therefore has to stay
    name = base if "flash" in base else PREFIX + base.removeprefix(PREFIX)
    if name not in _REGISTERED:
        _REGISTERED.add(name)
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(base, ALL_ATTENTION_FUNCTIONS.get(base)))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask(ALL_MASK_ATTENTION_FUNCTIONS[base]))
    model.set_attn_implementation(name)


def base_implementation(model: PreTrainedModel) -> str:
    """The attention implementation that the model was loaded with."""
    return model.config._attn_implementation.removeprefix(PREFIX)


def backend(base: str, device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention over packed rows: "flash" (the model's FlashAttention), "varlen" (PyTorch's) or "loop"
    (one `scaled_dot_product_attention` for each segment)."""
    if "flash" in base:
        return "flash"
    half = dtype in (torch.float16, torch.bfloat16)
    return "varlen" if base == "sdpa" and device.type == "cuda" and half and _has_varlen() else "loop"


def _has_varlen() -> bool:
    # PyTorch 2.10 has it without windows
    return varlen_attn is not None and {"window_size", "scale", "enable_gqa"} <= set(
        inspect.signature(varlen_attn).parameters
    )


def _mask(own: Callable) -> Callable:
    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if CURRENT.get() else own(*args, **kwargs)

    return mask


def _attention(base: str, own: Callable | None) -> Callable:
    """`own` is transformers' function for `base`; `None` for "eager", which each model brings with it."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        layout = kwargs.pop(LAYOUT, None)
        if layout is None:
            unpacked = own or sys.modules[type(module).__module__].eager_attention_forward
            return unpacked(module, query, key, value, attention_mask, **kwargs)

        if layout.key_index is not None:
            key, value = key.index_select(2, layout.key_index), value.index_select(2, layout.key_index)
        chosen = backend(base, query.device, query.dtype)
        _require_understood(module, chosen, kwargs)
        if chosen == "flash":
            return _flash(module, query, key, value, layout, base, kwargs), None
        compute = _varlen if chosen == "varlen" and query.size(-1) <= 256 else _loop
        return compute(query, key, value, layout, kwargs.get("scaling"), kwargs.get("sliding_window")), None

    return attention


def _require_understood(module: torch.nn.Module, chosen: str, kwargs: dict[str, Any]) -> None:
    """Refuse what a layer asks for and packed attention would pass over in silence."""
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if chosen == "flash":
        refused = [name for name in refused if name == "position_bias"]
    if kwargs.get("dropout"):
        refused.append("dropout")
    if declared_window(module) and not kwargs.get("sliding_window"):
        refused.append("a sliding window that only its masks know")
    if refused:
        raise ValueError(
            f"{type(module).__name__} asks for {' and '.join(refused)}, which attention over packed rows "
            f"({chosen}) does not compute. Set `padding_free=False`."
        )


def declared_window(module: torch.nn.Module) -> int | None:
    """The sliding window of an attention layer by its config."""
    config, index = module.config, getattr(module, "layer_idx", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types and index is not None and layer_types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


# The three backends: (1, heads, T, dim) and keys gathered by segment -> (1, T, heads, dim)


def _flash(module, query, key, value, layout: Layout, base: str, kwargs: dict[str, Any]) -> torch.Tensor:
    """The model's own FlashAttention. With `cu_seq_lens` it need not look for the segments, in every layer anew."""
    return _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask=None,
        query_length=query.size(2),
        is_causal=True,
        softmax_scale=kwargs.get("scaling"),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        s_aux=kwargs.get("s_aux"),
        cu_seq_lens_q=layout.cu_queries,
        cu_seq_lens_k=layout.cu_keys,
        max_length_q=max(layout.query_lengths),
        max_length_k=max(layout.key_lengths),
        target_dtype=get_target_dtype(query, module),
        attn_implementation=base,
    )


def _varlen(query, key, value, layout: Layout, scaling: float | None, window: int | None) -> torch.Tensor:
    """PyTorch's FlashAttention, for CUDA in half precision."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out: Any = varlen_attn(
        q,
        k,
        v,
        layout.cu_queries,
        layout.cu_keys,
        max(layout.query_lengths),
        max(layout.key_lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.size(1) != k.size(1),
    )
    return out.unsqueeze(0)


def _loop(query, key, value, layout: Layout, scaling: float | None, window: int | None) -> torch.Tensor:
    """`scaled_dot_product_attention` segment by segment, anywhere and in every precision."""
    out = []
    segments = zip(
        query.split(layout.query_lengths, dim=2),
        key.split(layout.key_lengths, dim=2),
        value.split(layout.key_lengths, dim=2),
        strict=True,
    )
    for q, k, v in segments:
        queries, keys = q.size(2), k.size(2)
        mask = None
        if queries != keys or (window is not None and keys > window):
            position = torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
            distance = position - torch.arange(keys, device=q.device)
            mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        out.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.size(1) != k.size(1)
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()
