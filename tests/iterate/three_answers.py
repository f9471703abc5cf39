"""
A language model that knows three answers, and the dynamics that iterated training on them should follow.

Its vocabulary is the three answers, and a completion is one token: the policy is three probabilities, which can be
read off exactly. (The tokenizer's end token is outside the model's vocabulary, and is never needed.)
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import ModelConfig

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.judges import PreferenceFunction, RewardFunctions
from trl_rdro.iterate.rounds import Loop

from ..tiny import cpu_args


ANSWERS = "ABC"
END = ANSWERS[-1]  # completions have one token, and an end of its own would be a fourth answer
PROMPT = [{"prompt": "A"}]


def save_model(folder: Path, shares: tuple[float, ...] | None = None) -> str:
    """Save the model in `folder`. Its answers have about the same probabilities, or to the prompt these `shares`."""
    vocabulary = {answer: i for i, answer in enumerate(ANSWERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = GPT2Config(
        vocab_size=len(ANSWERS),
        n_embd=16,
        n_layer=1,
        n_head=1,
        n_positions=8,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    if shares is not None:
        with torch.no_grad():
            hidden = model.eval().transformer(torch.zeros(1, 1, dtype=torch.long)).last_hidden_state[0, 0]
            model.lm_head.weight.copy_(torch.outer(torch.tensor(shares).log(), hidden / hidden.square().sum()))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    return str(folder)


def probabilities(model: str | Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return model(torch.zeros(1, 1, dtype=torch.long)).logits[0, -1].double().softmax(dim=-1).numpy()


def exact_step(policy, base, preferences, a, lam, b) -> np.ndarray:
    """softmax(a log pi_t + (1 - a) log pi_0 + b P mu)"""
    mu = lam * policy + (1 - lam) * base
    logits = a * np.log(policy) + (1 - a) * np.log(base) + b * preferences @ mu
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def run_loop(folder: Path, preferences: np.ndarray, a: float, lam: float, b: float, rounds: int, **changes):
    """The loop with ipo, whose b is 1 / beta for completions of one token. Returns its report and the policies."""
    model = save_model(folder / "model")

    def judge(prompts, first, second):
        # As a special token the last answer decodes to nothing
        return [
            preferences[ANSWERS.index(x or END), ANSWERS.index(y or END)] for x, y in zip(first, second, strict=True)
        ]

    config = IterateConfig(
        **{
            "rounds": rounds,
            "reference_mix": a,
            "sampling_mix": lam,
            "samples_per_prompt": 1024,
            "pair_selection": "random",
            "preference_func": "set.below",
            "max_completion_length": 1,
            "monitor_samples": 512,
            **changes,
        }
    )
    args = DPOConfig(
        **cpu_args(
            output_dir=str(folder / "out"),
            loss_type="ipo",
            beta=1 / b,
            learning_rate=0.03,
            lr_scheduler_type="cosine",
            max_steps=40,
            per_device_train_batch_size=512,
            max_grad_norm=0.0,
            logging_strategy="no",
        )
    )
    loop = Loop(config, args, ModelConfig(model_name_or_path=model), PreferenceFunction(judge), PROMPT, PROMPT)
    report = loop.run()
    saved = [model, *(folder / "out" / f"round_{i:03d}" / "model" for i in range(len(report["rounds"])))]
    return report, np.array([probabilities(path) for path in saved])


def run_rounds_of_rdro(folder: Path, method: str, shares: tuple[float, ...], rounds: int) -> np.ndarray:
    """The policies of a loop with rdro from these `shares`, in which the first answer passes and the others fail."""
    model = save_model(folder / "model", shares)
    config = IterateConfig(
        method=method,
        rounds=rounds,
        sampling_mix=1.0,
        samples_per_prompt=2048,
        reward_funcs=["set.below"],
        max_completion_length=1,
        monitor_samples=2,
        entropy_floor=0.0,
    )
    args = {"dpo": DPOConfig, "kto": KTOConfig}[method](
        **cpu_args(
            output_dir=str(folder / "out"),
            loss_type="rdro",
            learning_rate=0.03,
            lr_scheduler_type="linear",
            max_steps=60,
            per_device_train_batch_size=1024 if method == "dpo" else 2048,
            max_grad_norm=0.0,
            logging_strategy="no",
        )
    )
    config.validate_with(args)
    judge = RewardFunctions([lambda completions, **_: [float(text == ANSWERS[0]) for text in completions]], None)
    Loop(config, args, ModelConfig(model_name_or_path=model), judge, PROMPT, PROMPT).run()
    saved = [model, *(folder / "out" / f"round_{i:03d}" / "model" for i in range(rounds))]
    return np.array([probabilities(path) for path in saved])
