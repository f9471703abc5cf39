"""
A language small enough to know: 36 completions of two words, with preferences that no Bradley-Terry model fits.

Preferences have a transitive part, in which one completion is simply better, and a cyclic one (rock, paper, scissors).
Two completions are drawn from a base distribution and one is preferred. That gives pairs, and p+ and p-, the
distributions of the preferred and the other one. Models are Qwen2s built to have exactly a wanted distribution, so the
reference model can be the mixture that the density-ratio losses assume, and a policy's distance to p+ is a sum over 36
completions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


SIDE = 6  # first words, and second words
OUTCOMES = SIDE * SIDE
TOKENS = 3  # of a completion: two words and the end of the text
FIRST_WORDS = [f"first{i}" for i in range(SIDE)]
SECOND_WORDS = [f"second{i}" for i in range(SIDE)]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<eos>", "prompt", *FIRST_WORDS, *SECOND_WORDS])}
PAD, EOS, PROMPT = (VOCABULARY[word] for word in ("<pad>", "<eos>", "prompt"))
FIRST, SECOND = VOCABULARY["first0"], VOCABULARY["second0"]
COMPLETIONS = [[FIRST + i, SECOND + j, EOS] for i in range(SIDE) for j in range(SIDE)]


@dataclass
class Language:
    """
    Attributes:
        base: the distribution of the completions that are compared, `(36,)`.
        preference: probability that the first of two is preferred, `(36, 36)`.
        p_plus, p_minus: the distributions of the preferred and of the other one, `(36,)`. Their mean is `base`.
    """

    base: np.ndarray
    preference: np.ndarray

    def __post_init__(self):
        self.p_plus = 2 * self.base * (self.preference @ self.base)
        self.p_minus = 2 * self.base * (self.preference.T @ self.base)

    def pairs(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`n` chosen and `n` rejected completions, as numbers."""
        first, second = rng.choice(OUTCOMES, size=(2, n), p=self.base)
        first_wins = rng.random(n) < self.preference[first, second]
        return np.where(first_wins, first, second), np.where(first_wins, second, first)

    def labelled(self, n: int, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`n` completions and their labels, a fraction of which, rounded, is preferred."""
        labels = np.arange(n) < round(fraction * n)
        completions = np.where(
            labels, rng.choice(OUTCOMES, size=n, p=self.p_plus), rng.choice(OUTCOMES, size=n, p=self.p_minus)
        )
        return completions, labels


def cyclic_language(strength: float = 8.0, cycle: float = 4.0) -> Language:
    """P(y over y') = sigmoid(strength (u - u') + cycle sin(phase - phase')), with u and phase of each completion."""
    rng = np.random.default_rng(0)
    base = np.exp(0.5 * rng.normal(size=OUTCOMES))
    quality = rng.uniform(size=OUTCOMES)
    phase = rng.uniform(0, 2 * np.pi, size=OUTCOMES)
    logits = strength * np.subtract.outer(quality, quality) + cycle * np.sin(np.subtract.outer(phase, phase))
    return Language(base / base.sum(), 1 / (1 + np.exp(-logits)))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def exact_model(distribution: np.ndarray) -> Qwen2ForCausalLM:
    """A Qwen2 whose completions of the prompt have this distribution.

    Attention and MLP write nothing at first, so the last hidden state is the normalised embedding of the last word,
    which is a direction of its own; the columns of the head are the log-probabilities of what follows it. All weights
    can be trained.
    """
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=SIDE + 2,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    joint = torch.tensor(distribution, dtype=torch.float64).view(SIDE, SIDE)
    logits = torch.full((SIDE + 2, len(VOCABULARY)), -30.0, dtype=torch.float64)  # a row for what comes before
    logits[0, FIRST : FIRST + SIDE] = joint.sum(dim=1).log()
    logits[1 : SIDE + 1, SECOND : SECOND + SIDE] = (joint / joint.sum(dim=1, keepdim=True)).log()
    logits[SIDE + 1, EOS] = 0.0
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.zero_()
        embedding[PROMPT, 0] = 1.0
        embedding[FIRST : FIRST + SIDE, 1 : SIDE + 1] = torch.eye(SIDE)
        embedding[SECOND : SECOND + SIDE, SIDE + 1] = 1.0
        model.get_output_embeddings().weight.copy_(logits.T / config.hidden_size**0.5)
    return model


@torch.no_grad()
def log_probabilities(model: Qwen2ForCausalLM) -> np.ndarray:
    """log p(completion | prompt) of the 36 completions, `(36,)`."""
    model.eval()
    completions = torch.tensor(COMPLETIONS)
    rows = torch.cat([torch.full((OUTCOMES, 1), PROMPT), completions], dim=1)
    log_probs = model(input_ids=rows.to(model.device)).logits[:, :-1].double().log_softmax(dim=-1).cpu()
    return log_probs.gather(2, completions.unsqueeze(2)).sum(dim=(1, 2)).numpy()


def distances(target: np.ndarray, model: Qwen2ForCausalLM) -> dict[str, float]:
    """KL(target || model) in nats and the total variation distance, over everything that the model can say."""
    log_policy = log_probabilities(model)
    policy = np.exp(log_policy)
    elsewhere = max(0.0, 1 - policy.sum())
    return {
        "kl": float((target * (np.log(target) - log_policy)).sum()),
        "total_variation": float((np.abs(target - policy).sum() + elsewhere) / 2),
    }


def text(outcome: int) -> str:
    return f" {FIRST_WORDS[outcome // SIDE]} {SECOND_WORDS[outcome % SIDE]}"


def paired_dataset(chosen: np.ndarray, rejected: np.ndarray) -> Dataset:
    """Pairs of completions, given as numbers, in TRL's format."""
    return Dataset.from_dict(
        {
            "prompt": ["prompt"] * len(chosen),
            "chosen": [text(outcome) for outcome in chosen],
            "rejected": [text(outcome) for outcome in rejected],
        }
    )


def unpaired_dataset(outcomes: np.ndarray, labels: np.ndarray) -> Dataset:
    """Labelled completions, given as numbers, in TRL's format."""
    return Dataset.from_dict(
        {
            "prompt": ["prompt"] * len(outcomes),
            "completion": [text(outcome) for outcome in outcomes],
            "label": labels,
        }
    )
