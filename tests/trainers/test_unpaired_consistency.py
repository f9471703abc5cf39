"""
The distribution that training converges to, measured on a language small enough to know it.

A completion is one word out of 36 and the end-of-text token. The preferred completions follow p+, the others p-, and
the reference model is built to be exactly pi p+ + (1 - pi) p-, the distribution that the whole data set follows. Both
density-ratio losses are minimised by p+ itself. The data hold each word as often as p+ and p- say, with no noise from
sampling, so a policy trained on them through `KTOTrainer` must come near p+; with the classes pooled in one mean it
must not, unless they are equally large, and the same test trains such a policy to show that it could fail.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_rdro import KTOConfig, KTOTrainer
from trl_rdro.losses.types import of_family

from ..loss_cases import LOSS_CASES
from ..tiny import cpu_args


WORDS = [f"word{i:02d}" for i in range(36)]
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", "prompt", *WORDS])}
FIRST = VOCABULARY[WORDS[0]]
SAMPLES = 400
# KL(p+ || policy) in nats. Weighted classes come below 5e-5. The pooled minimisers among the policies that say one of
# the 36 words lie at 8e-1, 1e-2, 1e-2 (rdro) and 5e-2, 3e-4, 7e-3 (ddro) for the three fractions below; a language
# model can stray further, because the pooled losses can reward it for saying something else altogether.
BOUND = 1.5e-4


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<pad>"), AddedToken("<eos>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def counts(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers, one or more each, nearly proportional to `weights`, that sum to `total`."""
    exact = weights / weights.sum() * (total - len(weights))
    floors = np.floor(exact).astype(int)
    floors[np.argsort(floors - exact)[: total - len(weights) - floors.sum()]] += 1
    return floors + 1


def word_counts(pi: float) -> tuple[np.ndarray, np.ndarray]:
    """How often each word is preferred, and how often it is not."""
    rng = np.random.default_rng(0)
    base, tilt = rng.normal(size=(2, len(WORDS)))
    preferred = round(pi * SAMPLES)
    return (
        counts(np.exp(0.5 * base + tilt), preferred),
        counts(np.exp(0.5 * base - tilt), SAMPLES - preferred),
    )


def exact_model(word_probs: np.ndarray) -> Qwen2ForCausalLM:
    """A Qwen2 that answers the prompt with a word of these probabilities, and each word with the end of the text.

    Attention and MLP write nothing at first, so the last hidden state is the normalised embedding of the last token:
    one direction for the prompt, one for the words; the columns of the LM head hold the logits that follow each.
    """
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        eos_token_id=VOCABULARY["<eos>"],
        pad_token_id=VOCABULARY["<pad>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    logits = torch.full((2, len(VOCABULARY)), -30.0)
    logits[0, FIRST:] = torch.tensor(word_probs).log()
    logits[1, VOCABULARY["<eos>"]] = 0.0
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.zero_()
        embedding[VOCABULARY["prompt"], 0] = 1.0
        embedding[FIRST:, 1] = 1.0
        head = model.get_output_embeddings().weight
        head.zero_()
        head[:, :2] = logits.T / config.hidden_size**0.5
    return model


@torch.no_grad()
def kl_to(model: Qwen2ForCausalLM, target: np.ndarray) -> float:
    """KL(target || model) over whole completions: the word, and the end of the text after it."""
    model.eval()
    rows = [[VOCABULARY["prompt"], FIRST + i, VOCABULARY["<eos>"]] for i in range(len(WORDS))]
    log_probs = model(input_ids=torch.tensor(rows)).logits.log_softmax(dim=-1)
    completion = log_probs[:, 0].diagonal(offset=FIRST)[: len(WORDS)] + log_probs[:, 1, VOCABULARY["<eos>"]]
    target = torch.tensor(target, dtype=torch.float32)
    return (target * (target.log() - completion)).sum().item()


def train(tmp_path, loss_type: str, n_plus: np.ndarray, n_minus: np.ndarray, **kwargs) -> float:
    """KL(p+ || policy) after training on exactly these samples, a full batch at each step."""
    rows = [
        {"prompt": "prompt", "completion": f" {word}", "label": label}
        for label, word_count in ((True, n_plus), (False, n_minus))
        for word, n in zip(WORDS, word_count, strict=True)
        for _ in range(n)
    ]
    mixture = (n_plus + n_minus) / (n_plus + n_minus).sum()
    reference = exact_model(mixture)
    assert kl_to(reference, mixture) < 1e-5
    args = KTOConfig(
        **cpu_args(
            output_dir=str(tmp_path),
            loss_type=loss_type,
            per_device_train_batch_size=SAMPLES,
            max_steps=100,
            learning_rate=0.05,
            lr_scheduler_type="linear",
            adam_beta2=0.98,
            weight_decay=0.0,
            max_grad_norm=1e9,
            logging_strategy="no",
            precompute_ref_log_probs=True,
            **kwargs,
        )
    )
    trainer = KTOTrainer(
        exact_model(mixture),
        reference,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return kl_to(trainer.model, n_plus / n_plus.sum())


@pytest.mark.slow
@pytest.mark.parametrize("pi", [0.2, 0.39, 0.8])
@pytest.mark.parametrize("loss_type", of_family("density_ratio"))
def test_converges_to_the_preferred_distribution_and_pooled_classes_do_not(tmp_path, loss_type, pi):
    n_plus, n_minus = word_counts(pi)
    assert pi * max(n_plus / n_plus.sum() / ((n_plus + n_minus) / SAMPLES)) < 0.98  # below ddro's cap
    weighted = train(tmp_path / "weighted", loss_type, n_plus, n_minus)
    # The same weight for both classes, with the right alpha or t all the same
    option = LOSS_CASES[loss_type].mixture
    pooled = train(tmp_path / "pooled", loss_type, n_plus, n_minus, preferred_fraction=0.5, **{option: pi})
    assert weighted < BOUND < pooled, (weighted, pooled)
