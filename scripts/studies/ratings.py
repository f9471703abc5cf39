"""
Pairs of human ratings and a language model: what the studies of real preferences share.

People rated how positive each text is; that two texts make a pair is our construction. The reference model's
log-probabilities are computed once and kept in the study's folder.

The model is SmolLM2-135M-Instruct unless `--model` names another. At size "small" it has LoRA adapters on the last
fifth of its layers only, and a vocabulary cut to the data (vocabulary.py), so that a run takes a CPU core a minute.
"""

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


import study  # isort: skip  (makes the other scripts importable)
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from smollm2 import MODEL_NAME, model_directory
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary import cut_vocabulary

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.compat import trl as trl_compat
from trl_rdro.quickstart import load_quickstart
from trl_rdro.tools import scoring


SIDES = ("chosen", "rejected")
UNPAIRED_LOSSES = ("kto", "apo_zero_unpaired")
DOMAINS = ("film", "product", "tweet", "editorial")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of Llama and Qwen
MAX_LENGTH = 256  # tokens, which no text reaches


@dataclass
class Size:
    steps: int
    pairs_per_step: int
    test_pairs: int  # of each domain
    learning_rate: float  # of Adam, the same for all losses unless they say otherwise
    lora_layers: float = 1.0  # share of the layers with adapters, the last ones
    cut_vocabulary: bool = False

    @property
    def train_pairs(self) -> int:
        return self.steps * self.pairs_per_step


SIZES = {
    "ci": Size(steps=2, pairs_per_step=2, test_pairs=2, learning_rate=1e-3, cut_vocabulary=True),
    "small": Size(steps=20, pairs_per_step=8, test_pairs=32, learning_rate=1e-3, lora_layers=0.2, cut_vocabulary=True),
    "full": Size(steps=60, pairs_per_step=8, test_pairs=64, learning_rate=5e-4),
}
Pair = dict[str, Any]


# Data


def quickstart_pairs() -> list[Pair]:
    """The pairs that come with the package: the two texts are far apart, and raters hardly disagree on them."""
    return [{"split": split, **row} for split in ("train", "test") for row in load_quickstart(split)]


def draw_pairs(pool: list[Pair], shares: dict[str, float], size: Size, seed: int) -> list[Pair]:
    """The training pairs of a run: so many of each domain, without repetition, in random order, but that texts of
    similar length are together, which saves padding."""
    rng = random.Random(seed)
    domains = study.group(pool, ["domain"])
    total = size.train_pairs
    counts = {domain: round(total * share) for domain, share in shares.items()}
    counts[max(counts, key=counts.get)] += total - sum(counts.values())
    pairs = [pair for domain, count in counts.items() for pair in rng.sample(domains[domain,], count)]
    pairs.sort(key=lambda row: len(row["chosen"]) + len(row["rejected"]))
    per_step = size.pairs_per_step
    batches = [pairs[i : i + per_step] for i in range(0, total, per_step)]
    rng.shuffle(batches)
    return [pair for batch in batches for pair in batch]


def swapped(pair: Pair) -> Pair:
    """The pair with the other label."""
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


# Model


class Subject:
    """The model of a study, and the log-probability of each completion under it before training, kept in files."""

    def __init__(self, cell: dict[str, Any], folder: Path, pairs: list[Pair]):
        """`cell` names `model`, `size` and `seed`; `pairs` are all that the study has. `test` are those to score."""
        self.size, self.seed = SIZES[cell["size"]], cell["seed"]
        self.pairs, splits = pairs, study.group(pairs, ["split", "domain"])
        self.test = [pair for domain in DOMAINS for pair in splits["test", domain][: self.size.test_pairs]]
        self.path = str(model_directory()) if cell["model"] == MODEL_NAME else cell["model"]
        if self.size.cut_vocabulary:
            texts = [pair["prompt"] + pair[side] for pair in pairs for side in SIDES]
            self.path = cut_vocabulary(self.path, texts, folder / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.record = folder / "reference.jsonl"
        lines = study.read_lines(self.record)
        self.known = {(row["prompt"], row["completion"]): row["log_probability"] for row in lines}

    def draw(self, shares: dict[str, float], split: str = "train") -> list[Pair]:
        """Training pairs by the shares of the domains."""
        pool = [pair for pair in self.pairs if pair["split"] == split]
        return draw_pairs(pool, shares, self.size, self.seed)

    def load(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16)

    def reference(self, pairs: list[Pair]) -> torch.Tensor:
        """The log-probabilities of chosen and rejected completions before training, `(n, 2)`."""
        missing = [pair for pair in pairs if any((pair["prompt"], pair[side]) not in self.known for side in SIDES)]
        if missing:
            model = self.load().to(PartialState().device)
            trl_compat.add_fused_lm_head(model)
            with open(self.record, "a") as file:
                for pair, both in zip(missing, self.log_probabilities(model, missing).tolist(), strict=True):
                    for side, value in zip(SIDES, both, strict=True):
                        self.known[pair["prompt"], pair[side]] = value
                        row = {"prompt": pair["prompt"], "completion": pair[side], "log_probability": value}
                        file.write(json.dumps(row) + "\n")
        return torch.tensor([[self.known[pair["prompt"], pair[side]] for side in SIDES] for pair in pairs])

    def log_probabilities(self, model: torch.nn.Module, pairs: list[Pair]) -> torch.Tensor:
        """Of chosen and rejected completions, `(n, 2)`, in nats."""
        dataset = Dataset.from_list([{column: pair[column] for column in ("prompt", *SIDES)} for pair in pairs])
        rows = scoring.prepare(dataset, self.tokenizer, MAX_LENGTH)
        assert rows.dropped == rows.truncated == 0
        return scoring.completion_logps(model.eval(), rows, batch_size=16, description="scoring")

    def train_and_score(self, options: dict[str, Any], pairs: list[Pair]) -> torch.Tensor:
        """Train on `pairs` with the config fields `options`. Returns the log-ratios of the test pairs, `(n, 2)`."""
        unpaired = options["loss_type"] in UNPAIRED_LOSSES
        model = self.load()
        gpu = torch.cuda.is_available()
        trainer_class, config_class = (KTOTrainer, KTOConfig) if unpaired else (DPOTrainer, DPOConfig)
        with tempfile.TemporaryDirectory() as output_dir:
            config = config_class(
                output_dir=output_dir,
                max_steps=self.size.steps,
                per_device_train_batch_size=self.size.pairs_per_step * (2 if unpaired else 1),
                lr_scheduler_type="cosine",
                warmup_steps=2,
                max_length=MAX_LENGTH,
                train_sampling_strategy="sequential",  # `draw_pairs` has shuffled
                precompute_ref_log_probs=True,
                seed=self.seed,
                **{**study.TINY_RUN, "use_cpu": not gpu, "bf16": gpu},
                **{"learning_rate": self.size.learning_rate, **options},
            )
            trainer = trainer_class(
                model,
                args=config,
                train_dataset=self._labels(pairs) if unpaired else self._pairs(pairs),
                processing_class=self.tokenizer,
                peft_config=self._adapters(model.config.num_hidden_layers),
            )
            study.train(trainer)
        return self.log_probabilities(trainer.model, self.test) - self.reference(self.test)

    def _adapters(self, layers: int) -> LoraConfig:
        first = layers - max(1, round(self.size.lora_layers * layers))
        return LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=PROJECTIONS,
            layers_to_transform=list(range(first, layers)),
            task_type="CAUSAL_LM",
        )

    def _pairs(self, pairs: list[Pair]) -> Dataset:
        columns = {column: [pair[column] for pair in pairs] for column in ("prompt", *SIDES)}
        chosen, rejected = self.reference(pairs).T.tolist()
        return Dataset.from_dict({**columns, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected})

    def _labels(self, pairs: list[Pair]) -> Dataset:
        # The completions of a pair one after the other, so that steps see the same texts as with pairs
        return Dataset.from_list(
            [
                {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
                for pair in pairs
                for side in SIDES
            ]
        )


def pair_figures(logratios: torch.Tensor) -> dict[str, float]:
    """Accuracy and mean margin of `(n, 2)` log-ratios of chosen and rejected completions, and the mean of each."""
    figures = scoring.pair_figures(logratios)
    return {name: figures[name]["mean"] for name in ("accuracy", "margin", "chosen", "rejected")}
