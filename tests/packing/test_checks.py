"""What cannot be packed is refused in one sentence; what nobody thought of, by trying it."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    MambaConfig,
    MambaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
)

from trl_rdro.packing import checks
from trl_rdro.packing.attention import use_packed_attention
from trl_rdro.packing.forward import Layouts, PackedModel

from ..tiny import build_tiny, tiny_qwen2
from .batches import PAIRS, padded
from .models import ARCHITECTURES, with_fused_head


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (T5Config(), "encoder-decoder model `t5`"),
        (Qwen2_5_VLConfig(), "multi-modal model `qwen2_5_vl`"),
        (Qwen2Config(rope_parameters={"rope_type": "default", "mrope_section": [1, 1]}), "mRoPE"),
        (Lfm2Config(full_attn_idxs=[2]), "layers of type 'conv'"),
        (Qwen2Config(attention_dropout=0.1), "`attention_dropout=0.1`"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_by_config(config, named):
    with pytest.raises(ValueError, match=named) as error:
        checks.refuse_config(config)
    assert "`padding_free=False`" in str(error.value) and "\n" not in str(error.value)


def test_accepted_by_config():
    for make in ARCHITECTURES.values():
        checks.refuse_config(make().config)


def test_capped_attention_logits_need_flash_attention():
    model = build_tiny(Gemma2ForCausalLM, Gemma2Config, head_dim=8)
    with pytest.raises(ValueError, match="'eager'.*capped attention logits of `gemma2`.*flash_attention_2"):
        checks.refuse_model(model, "loop", compiled=False)
    checks.refuse_model(model, "flash", compiled=False)


def test_compiled_loop():
    with pytest.raises(ValueError, match="`torch_compile=True`"):
        checks.refuse_model(tiny_qwen2(), "loop", compiled=True)
    checks.refuse_model(tiny_qwen2(), "varlen", compiled=True)


class RunningMean(nn.Module):
    """Adds to each token the mean of those before it in the row: state outside attention."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden):
        counts = torch.arange(1, hidden.size(1) + 1).view(1, -1, 1)
        return self.mlp(hidden) + 0.1 * hidden.cumsum(dim=1) / counts


@pytest.mark.parametrize("share", [False, True])
def test_self_check_finds_state_outside_attention(share):
    model = with_fused_head(tiny_qwen2())
    use_packed_attention(model)
    checks.self_check(model, share, half=False)
    model.model.layers[1].mlp = RunningMean(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match="changes what Qwen2ForCausalLM computes.*outside attention"):
        checks.self_check(model, share, half=False)


def test_self_check_finds_attention_of_its_own():
    """A model that attends in its own way, and one that has no attention."""
    model = with_fused_head(tiny_qwen2())  # its attention is not replaced
    with pytest.raises(ValueError, match="changes what Qwen2ForCausalLM computes"):
        checks.self_check(model, share=True, half=False)
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=384, state_size=4))
    checks.use_or_refuse(with_fused_head(mamba))
    with pytest.raises(ValueError, match="changes what MambaForCausalLM computes"):
        checks.self_check(mamba, share=False, half=False)


def test_attention_that_cannot_be_replaced():
    with pytest.raises(ValueError, match="with BloomForCausalLM: its attention does not go through"):
        checks.use_or_refuse(BloomForCausalLM(BloomConfig(vocab_size=384, hidden_size=16, n_layer=1, n_head=2)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_self_check_passes(name):
    model = with_fused_head(ARCHITECTURES[name]()).train()
    use_packed_attention(model)
    state = torch.get_rng_state()
    checks.self_check(model, share=True, half=False)
    assert model.training and torch.get_rng_state().equal(state)


def test_self_check_in_half_precision():
    model = with_fused_head(tiny_qwen2(dtype=torch.bfloat16))
    use_packed_attention(model)
    checks.self_check(model, share=True, half=True)


def test_self_check_leaves_broken_weights_to_others():
    model = with_fused_head(tiny_qwen2())
    use_packed_attention(model)
    model.lm_head.weight.data[0] = torch.nan
    checks.self_check(model, share=True, half=False)


def test_window_that_only_masks_know():
    """Qwen2-MoE tells its masks about sliding windows, and not its attention, which in packed rows would see too much:
    beyond the window, and so beyond what the self-check sees."""
    model = build_tiny(
        Qwen2MoeForCausalLM, Qwen2MoeConfig, sliding_window=64, use_sliding_window=True, max_window_layers=2,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    use_packed_attention(with_fused_head(model))
    with pytest.raises(ValueError, match="sliding window that only its masks know.*`padding_free=False`"):
        PackedModel(model, Layouts(share=False))(**padded(PAIRS), fused_lm_head=True)


def test_encoders_are_not_decoders():
    checks.refuse_config(BertConfig())  # TRL refuses it itself: not a causal language model
