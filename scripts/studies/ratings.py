"""
Pairs of human ratings and a language model: what the studies of real preferences share.

People rated how positive each text is; that two texts make a pair is our construction. The reference model's
log-probabilities are computed once and kept in the study's folder.

The model is SmolLM2-135M-Instruct unless `--model` names another. At size "small" it has LoRA adapters on the last
fifth of its layers only, a vocabulary cut to the data (vocabulary.py), and what the layers below make of a text is
kept (frozen_layers.py), so that a step of eight pairs takes a CPU core a second.
"""

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


import study  # isort: skip  (makes the other scripts importable)
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from frozen_layers import freeze_first_layers
from paired import two_way_interval
from peft import LoraConfig
from smollm2 import MODEL_NAME, model_directory
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from vocabulary import cut_vocabulary

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.compat import trl as trl_compat
from trl_rdro.quickstart import load_quickstart
from trl_rdro.tools import scoring


SIDES = ("chosen", "rejected")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of Llama and Qwen
MAX_LENGTH = 256  # tokens, which no text reaches


@dataclass
class Size:
    pairs_per_step: int
    test_pairs: int
    draws: int
    lora_layers: float = 1.0  # share of the layers with adapters, the last ones
    cut_vocabulary: bool = False


SIZES = {
    "ci": Size(pairs_per_step=2, test_pairs=8, draws=2, lora_layers=0.5, cut_vocabulary=True),
    "small": Size(pairs_per_step=8, test_pairs=256, draws=10, lora_layers=0.2, cut_vocabulary=True),
    "full": Size(pairs_per_step=8, test_pairs=256, draws=20),
}
Pair = dict[str, Any]


# Data


def quickstart_pairs() -> list[Pair]:
    """The pairs that come with the package: the two texts are far apart, and raters hardly disagree on them."""
    return [{"split": split, **row} for split in ("train", "test") for row in load_quickstart(split)]


def draw(pairs: list[Pair], n: int, seed: int) -> list[Pair]:
    """`n` training pairs of a run, without repetition and in random order."""
    return random.Random(seed).sample([pair for pair in pairs if pair["split"] == "train"], n)


def held_out(pairs: list[Pair], n: int) -> list[Pair]:
    """The first `n` pairs of the test split, whose texts no training pair has."""
    return [pair for pair in pairs if pair["split"] == "test"][:n]


def kind_of_text(pair: Pair) -> str:
    """ "film review", say: what the prompt asks for."""
    return pair["prompt"].removeprefix("Write a positive ").removesuffix(":\n")


def swapped(pair: Pair) -> Pair:
    """The pair with the other label."""
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


# Model

_KEPT: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}  # by the model's path, for all cells of a process


class Subject:
    """The model of a study, and the log-probability of each completion under it before training, kept in files."""

    def __init__(self, cell: dict[str, Any], folder: Path, texts: Sequence[str], dtype: torch.dtype = torch.bfloat16):
        """`cell` names `model`, `size` and `seed`; `texts` are all that the study has, prompts too."""
        self.size, self.seed, self.dtype = SIZES[cell["size"]], cell["seed"], dtype
        self.path = str(model_directory()) if cell["model"] == MODEL_NAME else cell["model"]
        if self.size.cut_vocabulary:
            self.path = cut_vocabulary(self.path, texts, folder / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.record = folder / "reference.jsonl"
        lines = study.read_lines(self.record)
        self.known = {(row["prompt"], row["completion"]): row["log_probability"] for row in lines}

    def load(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype)

    def freeze(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model whose layers below the adapters are computed once for each text; all it has left get adapters."""
        frozen = self._adapted(model)[0]
        return freeze_first_layers(model, frozen, _KEPT.setdefault(self.path, {})) if frozen else model

    def _adapted(self, model: torch.nn.Module) -> list[int]:
        """The layers of a whole model that get adapters."""
        layers = model.config.num_hidden_layers
        return list(range(layers))[-max(1, round(self.size.lora_layers * layers)) :]

    def reference(self, pairs: list[Pair]) -> torch.Tensor:
        """The log-probabilities of chosen and rejected completions before training, `(n, 2)`."""
        missing = [pair for pair in pairs if any((pair["prompt"], pair[side]) not in self.known for side in SIDES)]
        if missing:
            model = self.freeze(self.load().to(PartialState().device))
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

    def train_and_score(
        self, options: dict[str, Any], pairs: list[Pair], scored: list[Pair], at: Sequence[int]
    ) -> list[torch.Tensor]:
        """
        Train on `pairs`, in steps of `size.pairs_per_step` in random order, to the last step of `at`.

        Args:
            options: config fields. `wdpo` needs gradients of the token embeddings: it trains the whole model, which
                takes several times as long, and has one step in `at`.

        Returns:
            The log-ratios of the pairs `scored` after each of the steps `at`, `(n, 2)`, in nats.
        """
        unpaired, whole = options["loss_type"] == "kto", options["loss_type"] == "wdpo"
        model = self.load()
        layers = self._adapted(model) if whole else None
        if not whole:
            self.freeze(model)
        gpu = torch.cuda.is_available()
        trainer_class, config_class = (KTOTrainer, KTOConfig) if unpaired else (DPOTrainer, DPOConfig)
        scores = []
        with tempfile.TemporaryDirectory() as output_dir:
            config = config_class(
                output_dir=output_dir,
                max_steps=at[-1],
                per_device_train_batch_size=self.size.pairs_per_step * (2 if unpaired else 1),
                lr_scheduler_type="constant_with_warmup" if len(at) > 1 else "cosine",
                warmup_steps=2,
                max_length=MAX_LENGTH,
                padding_free=whole,  # what is kept of a text is of a row of its own
                precompute_ref_log_probs=True,
                seed=self.seed,
                **{**study.TINY_RUN, "use_cpu": not gpu, "bf16": gpu, **options},
            )
            trainer = trainer_class(
                model,
                args=config,
                train_dataset=self._labels(pairs) if unpaired else self._pairs(pairs),
                processing_class=self.tokenizer,
                peft_config=LoraConfig(
                    r=16, lora_alpha=32, target_modules=PROJECTIONS, layers_to_transform=layers, task_type="CAUSAL_LM"
                ),
            )

            def score() -> None:
                if whole:  # scored as all the others are, down to the rounding
                    self.freeze(trainer.model.get_base_model())
                scores.append(self._log_ratios(trainer.model, scored))

            trainer.add_callback(_Score(at, score))
            study.train(trainer)
        return scores

    def _log_ratios(self, model: torch.nn.Module, pairs: list[Pair]) -> torch.Tensor:
        return self.log_probabilities(model, pairs) - self.reference(pairs)

    def _pairs(self, pairs: list[Pair]) -> Dataset:
        columns = [column for column in ("prompt", *SIDES, "group") if column in pairs[0]]
        chosen, rejected = self.reference(pairs).T.tolist()
        reference = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return Dataset.from_dict({column: [pair[column] for pair in pairs] for column in columns} | reference)

    def _labels(self, pairs: list[Pair]) -> Dataset:
        return Dataset.from_list(
            [
                {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
                for pair in pairs
                for side in SIDES
            ]
        )


class _Score(TrainerCallback):
    def __init__(self, at, score):
        self.at, self.score = at, score

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step in self.at:
            self.score()
            model.train()


# Methods at learning rates


def grid(size: str, rates: dict[str, Sequence[float]], at_ci: Sequence[str]) -> list[dict[str, Any]]:
    """Cells of each method at each of its rates, one for each draw of the training pairs. At size "ci" the methods
    `at_ci`, at the first rate of all."""
    if size == "ci":
        rates = dict.fromkeys(at_ci, next(iter(rates.values()))[:1])
    return [
        {"method": method, "rate": rate, "seed": seed}
        for method, of_method in rates.items()
        for rate in of_method
        for seed in range(SIZES[size].draws)
    ]


def draw_by_rate(rows: list[dict[str, Any]], panels: dict[str, str]) -> Any:
    """A figure with a panel for each of the accuracies that `panels` gives titles to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    rates = sorted({row["rate"] for row in rows})
    for axes, (name, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for (method,), members in study.group(rows, ["method"]).items():
            study.error_bars(axes, members, "rate", name, label=method)
        axes.axhline(0.5, color="black", linewidth=0.8)  # a coin
        axes.set(title=title, xlabel="learning rate", ylabel="held-out accuracy")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


# Measures


def order(logratios: torch.Tensor) -> str:
    """For each of `(n, 2)` log-ratios of chosen and rejected completions "1" if the chosen one's is larger, or "0"."""
    return "".join("01"[chosen > rejected] for chosen, rejected in logratios.tolist())


def accuracy(right: str) -> float:
    return right.count("1") / len(right)


def right_table(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """The strings of `order` under `name`, one draw a row, `(draws, test pairs)`."""
    return np.array([[int(digit) for digit in row[name]] for row in sorted(rows, key=lambda row: row["seed"])])


def best_rate(rows: list[dict[str, Any]], method: str, name: str) -> float:
    """The learning rate at which the method's mean of `name` is the largest."""
    rates = study.group([row for row in rows if row["method"] == method], ["rate"])
    return max(rates, key=lambda rate: study.mean_and_error(rates[rate], name)[0])[0]


def differences(right: dict[tuple, np.ndarray], base: tuple) -> dict[tuple, str]:
    """The `difference_text` of each to that under the key `base`, which has none; all hold together."""
    return {
        key: "" if key == base else difference_text(table, right[base], comparisons=len(right) - 1)
        for key, table in right.items()
    }


def difference_text(ours: np.ndarray, theirs: np.ndarray, comparisons: int) -> str:
    """How much larger ours are, `(draws, test pairs)`, with the interval of `two_way_interval`, for a table."""
    low, high = two_way_interval(ours - theirs, comparisons)
    return f"{(ours - theirs).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
