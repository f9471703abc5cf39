"""Packed and padded forwards of the same batch, without a trainer."""

import json

import pytest
import torch

from trl_rdro.packing.attention import base_implementation, use_packed_attention
from trl_rdro.packing.forward import Layouts, PackedModel

from ..tiny import tiny_qwen2
from .batches import PAIRS, padded, tokens
from .models import ARCHITECTURES, OUTPUTS, gradients, with_fused_head


def forward(model, batch, **kwargs):
    return model(**batch, use_cache=False, fused_lm_head=True, **kwargs)


def difference(first, second) -> float:
    return (first.float() - second.float()).abs().max().item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_padded_forward(name):
    """Every field that TRL reads, to the rounding that another padding width makes."""
    model = with_fused_head(ARCHITECTURES[name]())
    expected = forward(model, padded(PAIRS))
    use_packed_attention(model)
    for share in (False, True):
        layouts = Layouts(share)
        found = forward(PackedModel(model, layouts), padded(PAIRS))
        assert layouts._layout.shared_pairs == (3 if share else 0)
        for field in OUTPUTS:
            assert getattr(found, field).shape == getattr(expected, field).shape
            assert difference(getattr(found, field), getattr(expected, field)) < 5e-6, field


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients(name):
    model = with_fused_head(ARCHITECTURES[name]())
    weights = torch.randn(len(PAIRS) * 2, 1, generator=torch.Generator().manual_seed(0))

    def gradient(forward_model, batch):
        model.zero_grad()
        (forward(forward_model, batch).log_probs * weights).sum().backward()
        return gradients(model)

    expected = gradient(model, padded(PAIRS))
    noise = ((gradient(model, padded(PAIRS, width=50)) - expected).norm() / expected.norm()).item()
    use_packed_attention(model)
    for share in (False, True):
        found = gradient(PackedModel(model, Layouts(share)), padded(PAIRS))
        assert (found - expected).norm() / expected.norm() < max(5 * noise, 1e-6)


def test_left_padding():
    """TRL pads on the right, other collators need not. Positions are then counted with the padding, as unpacked."""
    model = with_fused_head(tiny_qwen2())
    expected = forward(model, padded(PAIRS, left=True)).log_probs
    use_packed_attention(model)
    found = forward(PackedModel(model, Layouts(share=True)), padded(PAIRS, left=True)).log_probs
    assert difference(found, expected) < 5e-6


@pytest.mark.parametrize("share", [False, True])
def test_no_cross_talk(share):
    """Other tokens in one pair: the log-probabilities of all others stay, to the last bit."""
    model = with_fused_head(tiny_qwen2())
    use_packed_attention(model)

    def rows(pairs):
        with torch.no_grad():
            return forward(PackedModel(model, Layouts(share)), padded(pairs)).log_probs

    before = rows(PAIRS)
    for changed in range(len(PAIRS)):
        other = [tokens(len(part), 100 + i) for i, part in enumerate(PAIRS[changed])]
        after = rows([*PAIRS[:changed], other, *PAIRS[changed + 1 :]])
        for row in range(2 * len(PAIRS)):
            assert after[row].equal(before[row]) == (row % len(PAIRS) != changed)


def test_bf16():
    model = with_fused_head(tiny_qwen2(dtype=torch.bfloat16))
    exact = forward(with_fused_head(tiny_qwen2()), padded(PAIRS)).log_probs
    stock = forward(model, padded(PAIRS)).log_probs
    use_packed_attention(model)
    found = forward(PackedModel(model, Layouts(share=True)), padded(PAIRS)).log_probs
    relative = (found.float() - stock.float()).norm() / stock.float().norm()
    assert relative < 1e-2
    assert (found.float() - exact).norm() < 1.5 * (stock.float() - exact).norm()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_calls_are_untouched(implementation, tmp_path):
    """Padded batches, logits, generation and what is saved: to the last bit what they were."""
    model = with_fused_head(tiny_qwen2())
    model.set_attn_implementation(implementation)
    batch = padded(PAIRS)
    prompt = {"input_ids": batch["input_ids"][:, :9], "attention_mask": batch["attention_mask"][:, :9]}

    def calls(called):
        with torch.no_grad():
            generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
            logits = called(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return generated, logits, forward(model, batch).log_probs.detach()

    before = calls(model)
    model.save_pretrained(tmp_path / "before")
    use_packed_attention(model)
    use_packed_attention(model)  # twice is once
    assert base_implementation(model) == implementation
    for first, second in zip(before, calls(PackedModel(model, Layouts(share=True))), strict=True):
        assert first.equal(second)
    model.save_pretrained(tmp_path / "after")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert saved[0] == saved[1]


def test_a_batch_packed_by_others_is_left_alone():
    """TRL's own packing sends one row with position ids and without a mask."""
    model = with_fused_head(tiny_qwen2())
    use_packed_attention(model)
    row = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    labels = torch.tensor([[-100, 6, 7, -100, 9]])
    expected = forward(model, row, labels=labels).log_probs
    found = forward(PackedModel(model, Layouts(share=True)), row, labels=labels).log_probs
    assert found.equal(expected)


def test_one_layout_for_policy_and_reference():
    model = with_fused_head(tiny_qwen2())
    use_packed_attention(model)
    layouts, batch = Layouts(share=True), padded(PAIRS)
    made = [forward(PackedModel(model, layouts), batch) and layouts._layout for _ in range(2)]
    assert made[0] is made[1]
    assert forward(PackedModel(model, layouts), padded(PAIRS)) and layouts._layout is not made[0]
