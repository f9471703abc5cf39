"""Attention over packed rows against a naive loop, in each of its three backends."""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import nn

from trl_rdro.packing import attention
from trl_rdro.packing.layout import make_layout

from .batches import PAIRS, naive_attention, padded


def states(layout, dtype=torch.float64):
    """Random queries, and keys and values gathered by segment, with grouped heads."""
    generator = torch.Generator().manual_seed(0)

    def random(heads, length):
        return torch.randn(1, heads, length, 8, generator=generator, dtype=dtype)

    return random(4, sum(layout.query_lengths)), random(2, sum(layout.key_lengths)), random(2, sum(layout.key_lengths))


@pytest.fixture(params=[False, True], ids=["packed", "shared"])
def layout(request):
    return make_layout(**padded(PAIRS), share=request.param)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_loop(layout, window):
    query, key, value = states(layout)
    expected = naive_attention(query, key, value, layout, 0.3, window)
    torch.testing.assert_close(attention._loop(query, key, value, layout, 0.3, window), expected)


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_is_asked_for_the_same(layout, window, monkeypatch):
    """PyTorch's kernel needs CUDA (tests/distributed/gpu_check.py): here its documented contract takes its place."""

    def by_contract(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.diff().tolist() == layout.query_lengths and cu_k.diff().tolist() == layout.key_lengths
        assert (max_q, max_k) == (max(layout.query_lengths), max(layout.key_lengths))
        assert enable_gqa and window_size[1] == 0
        left = None if window_size[0] == -1 else window_size[0] + 1
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return naive_attention(q, k, v, layout, scale, left)[0]

    monkeypatch.setattr(attention, "varlen_attn", by_contract)
    query, key, value = states(layout)
    expected = naive_attention(query, key, value, layout, 0.3, window)
    torch.testing.assert_close(attention._varlen(query, key, value, layout, 0.3, window), expected)


@pytest.mark.parametrize("window", [None, 4])
def test_flash_is_asked_for_the_same(layout, window, monkeypatch):
    """The same for the `flash_attn` package, through transformers' own call of it."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal=False, softmax_scale=None, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert cu_seqlens_q.diff().tolist() == layout.query_lengths
        assert cu_seqlens_k.diff().tolist() == layout.key_lengths and causal
        assert (max_seqlen_q, max_seqlen_k) == (max(layout.query_lengths), max(layout.key_lengths))
        left = None if window_size[0] == -1 else window_size[0] + 1
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return naive_attention(q, k, v, layout, softmax_scale, left)[0]

    def imported(implementation, *args, **kwargs):
        assert implementation == "flash_attention_2"
        process = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
        return (None, flash_attn_varlen_func, None, None, None), (process, dict)

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", imported)
    query, key, value = states(layout)
    module = nn.Linear(1, 1, dtype=torch.float64)
    kwargs = {"scaling": 0.3, "sliding_window": window}
    found = attention._flash(module, query, key, value, layout, "flash_attention_2", kwargs)
    torch.testing.assert_close(found, naive_attention(query, key, value, layout, 0.3, window))


def test_backend():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert attention.backend("flash_attention_2", cuda, torch.bfloat16) == "flash"
    assert attention.backend("kernels-community/flash-attn3", cuda, torch.bfloat16) == "flash"
    assert attention.backend("sdpa", cuda, torch.bfloat16) == ("varlen" if attention._has_varlen() else "loop")
    for base, device, dtype in (
        ("sdpa", cuda, torch.float32),
        ("sdpa", cpu, torch.bfloat16),
        ("eager", cuda, torch.bfloat16),
        ("flex_attention", cuda, torch.bfloat16),
    ):
        assert attention.backend(base, device, dtype) == "loop"


def test_old_varlen_is_not_called(monkeypatch):
    """PyTorch 2.10 has the function without windows and scale."""
    monkeypatch.setattr(attention, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None)
    assert attention.backend("sdpa", torch.device("cuda"), torch.bfloat16) == "loop"
