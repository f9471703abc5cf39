"""
Models, a tokenizer and data small enough to train in milliseconds, built from code alone.

Nothing here is downloaded: the tokenizer is a byte-level BPE trained on the words below (so it encodes any text and
decodes it back), the models are randomly initialised from a config with a fixed seed, and the preferences can be
learned from a handful of steps (a chosen completion ends in a kind word, a rejected one in a harsh word).
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_rdro.losses.types import LOSS_TYPES


KIND_WORDS = ("good", "great", "warm", "kind", "fair", "calm", "bright", "sweet")
HARSH_WORDS = ("bad", "awful", "cold", "cruel", "unfair", "loud", "grim", "bitter")
_SUBJECTS = ("the film", "a song", "this book", "that meal", "her story", "our trip", "the game", "his coat")
_FILLERS = ("it was", "it felt", "all of it was", "in the end it was", "to me it was")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of fewer than 384 entries with pad and eos tokens and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],  # as Qwen: pad, turn start, turn end
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words are preceded by a space nearly everywhere they occur, and a byte-level BPE tells "good" from " good".
    tokenizer.train_from_iterator([f" {text}" for text in KIND_WORDS + HARSH_WORDS + _SUBJECTS + _FILLERS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=_CHAT_TEMPLATE
    )


def build_tiny(
    model_class: type,
    config_class: type,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A two-layer model over the vocabulary of `tiny_tokenizer`; `overrides` are fields of its config."""
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # Larger than the usual 0.02, so that a tiny model's log-probabilities are not all alike.
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**{**settings, **overrides})).to(dtype)


def tiny_qwen2(tie: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> Qwen2ForCausalLM:
    """A two-layer Qwen2 over the vocabulary of `tiny_tokenizer`; `overrides` are fields of its config."""
    return build_tiny(Qwen2ForCausalLM, Qwen2Config, tie, dtype, seed, **overrides)


def tiny_llama(tie: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A two-layer Llama over the vocabulary of `tiny_tokenizer`; `overrides` are fields of its config."""
    return build_tiny(LlamaForCausalLM, LlamaConfig, tie, dtype, seed, **overrides)


def save_tiny(directory: str | Path, kind: str = "qwen2", **kwargs) -> str:
    """Write a tiny model ("qwen2" or "llama") and its tokenizer to `directory/<kind>`, and return that path."""
    path = Path(directory) / kind
    {"qwen2": tiny_qwen2, "llama": tiny_llama}[kind](**kwargs).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def tiny_preferences(n: int = 16, seed: int = 0) -> Dataset:
    """`n` pairs in TRL's preference format (prompt, chosen, rejected as plain text), learnable in a few steps."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        prompt = f"tell me about {rng.choice(_SUBJECTS)}:"
        kind, harsh = rng.choice(KIND_WORDS), rng.choice(HARSH_WORDS)
        rows.append(
            {
                "prompt": prompt,
                "chosen": f" {rng.choice(_FILLERS)} {kind}",
                "rejected": f" {rng.choice(_FILLERS)} {harsh}",
            }
        )
    return Dataset.from_list(rows)


def with_columns(dataset: Dataset, loss_types: Iterable[str]) -> Dataset:
    """The data set with the columns that these of our losses need and it lacks, with values that differ from row to
    row."""
    values = {
        "preference_probability": lambda i: (1.0, 0.75, 0.9, 0.6)[i % 4],
        "group": lambda i: ("women", "men")[i % 2],
        "second_ref_chosen_logps": lambda i: -20.0,
        "second_ref_rejected_logps": lambda i: -21.0,
    }
    losses = [LOSS_TYPES[loss] for loss in loss_types if loss in LOSS_TYPES]
    for name in dict.fromkeys(name for loss in losses for name in (*loss.columns, *loss.optional_columns)):
        if name not in dataset.column_names:
            dataset = dataset.add_column(name, [values[name](i) for i in range(len(dataset))])
    return dataset


def cpu_args(**kwargs) -> dict:
    """The config fields that a run without a GPU needs, and quiet ones for tests; `kwargs` come on top."""
    return {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **kwargs,
    }
