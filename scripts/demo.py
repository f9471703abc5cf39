"""
Train a language model on real human judgements with one of the losses of trl_rdro, and measure what it learnt.

`make demo` runs this with SmolLM2-135M-Instruct. Every `--model` that `from_pretrained` takes will do. A LoRA adapter
is trained on the quickstart pairs (see trl_rdro/data/quickstart/README.md). The held-out pairs are scored before and
after; the figures, the curves and the adapter go to `--output_dir`.

    python scripts/demo.py --loss rdro
    python scripts/demo.py --loss ddro --data unpaired
    python scripts/demo.py --loss wdpo --seed 1 --model Qwen/Qwen3-0.6B
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import peft
import torch
import transformers
import trl
from machine import processor_name
from smollm2 import MODEL_NAME, model_directory
from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback

import trl_rdro
from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.compat import trl as trl_compat
from trl_rdro.quickstart import load_quickstart
from trl_rdro.tools.plotting import plot_log_history


@dataclass
class Settings:
    steps: int
    learning_rate: float
    pairs_per_step: int = 8
    config: dict = field(default_factory=dict)


# As many steps as leave a run under five minutes on two CPU cores. The density-ratio losses see log-ratios of whole
# texts unscaled, where kldpo and wdpo see a tenth of a margin, so their learning rates are smaller: at 3e-4 the
# accuracy of rdro rises, but so does its loss. ddro's is the smallest and its cap below the default, because its loss
# grows steeply where a rejected text nearly doubles its probability. wdpo's penalty is computed every fourth step,
# which makes room for more steps.
SETTINGS = {
    "rdro": Settings(steps=32, learning_rate=1.2e-4),
    "ddro": Settings(steps=32, learning_rate=2e-5, config={"ddro_cap": 0.9}),
    "kldpo": Settings(steps=32, learning_rate=3e-4),
    "wdpo": Settings(steps=20, learning_rate=3e-4, config={"wdpo_interval": 4}),
}
HELD_OUT_PAIRS = 96  # the last of the test split: the settings above were chosen on the others
# Scores closer than this (in nats) are ties. Only an untrained adapter, whose scores are all zero, comes so close.
TIE = 1e-3


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, with the few metrics to watch beside it instead of all of them below it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            metrics = {"loss": "loss", "chosen": "logratios/chosen", "rejected": "logratios/rejected"}
            self.training_bar.set_postfix({name: f"{logs[key]:.3f}" for name, key in metrics.items()})


def training_data(settings, seed, unpaired):
    """Random pairs, or the two halves of each, in random order, but for texts of similar length being together: that
    saves padding."""
    dataset = load_quickstart("train", unpaired)
    random_state = random.Random(seed)
    rows_per_pair = 2 if unpaired else 1
    pairs = random_state.sample(range(len(dataset) // rows_per_pair), settings.steps * settings.pairs_per_step)
    rows = [pair * rows_per_pair + i for pair in pairs for i in range(rows_per_pair)]
    texts = dataset["completion" if unpaired else "chosen"][:]
    rows.sort(key=lambda row: len(texts[row]))
    size = settings.pairs_per_step * rows_per_pair
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    random_state.shuffle(batches)
    return dataset.select([row for batch in batches for row in batch])


def score(trainer, description):
    """The trainer's loss and log-ratios of each held-out pair."""
    trainer.model.eval()
    rows = []
    for inputs in tqdm(trainer.get_eval_dataloader(), desc=description):  # one pair, or its two halves
        loss, _, _ = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)
        metrics = trl_compat.take_metrics(trainer)
        rows.append([loss.item(), metrics["logratios/chosen"], metrics["logratios/rejected"]])
    return torch.tensor(rows, dtype=torch.float64).unbind(dim=1)


def held_out(scores, kldpo_tau):
    """Accuracy and loss as one value per pair, whose mean is the figure and whose spread gives its standard error."""
    loss, chosen, rejected = scores
    margin = chosen - rejected
    accuracy = torch.where(margin.abs() < TIE, 0.5, (margin > 0).double())
    if kldpo_tau is not None:
        # Not a mean over pairs but tau log mean exp(loss / tau). These have it as their mean, and the spread of its
        # linearisation in the pairs (the delta method).
        weights = torch.softmax(loss / kldpo_tau, dim=0) * len(loss)
        loss = kldpo_tau * (torch.logsumexp(loss / kldpo_tau, dim=0) - math.log(len(loss)) + weights - 1)
    return {"accuracy": accuracy, "loss": loss, "logratio_chosen": chosen, "logratio_rejected": rejected}


def mean_and_error(values):
    return {"mean": values.mean().item(), "standard_error": (values.std() / math.sqrt(len(values))).item()}


def log_entry(step, values):
    """A held-out measurement as a line of a log history."""
    names = {
        "accuracy": "eval_rewards/accuracies",
        "loss": "eval_loss",
        "logratio_chosen": "eval_logratios/chosen",
        "logratio_rejected": "eval_logratios/rejected",
    }
    return {"step": step, **{names[key]: value.mean().item() for key, value in values.items()}}


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--loss", choices=SETTINGS, default="rdro")
    parser.add_argument("--data", choices=("paired", "unpaired"), default="paired")
    parser.add_argument("--model", help=f"model id or directory (default: {MODEL_NAME})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of the number chosen for the loss")
    parser.add_argument("--learning_rate", type=float, help="instead of the one chosen for the loss")
    parser.add_argument("--output_dir", type=Path, help="default: runs/demo-LOSS, or runs/demo-LOSS-unpaired")
    args = parser.parse_args()
    unpaired = args.data == "unpaired"
    if unpaired and args.loss not in ("rdro", "ddro"):
        parser.error(f"{args.loss} compares the two texts of a pair: it has no unpaired form. Use rdro or ddro.")
    started = time.monotonic()

    settings = SETTINGS[args.loss]
    settings = replace(
        settings,
        steps=args.steps or settings.steps,
        learning_rate=args.learning_rate or settings.learning_rate,
    )
    output_dir = args.output_dir or Path("runs") / f"demo-{args.loss}{'-unpaired' if unpaired else ''}"
    gpu = torch.cuda.is_available()
    transformers.set_seed(args.seed)

    config_class, trainer_class = (KTOConfig, KTOTrainer) if unpaired else (DPOConfig, DPOTrainer)
    rows_per_pair = 2 if unpaired else 1
    config = config_class(
        output_dir=str(output_dir),
        loss_type=args.loss,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        num_train_epochs=1,
        per_device_train_batch_size=settings.pairs_per_step * rows_per_pair,
        train_sampling_strategy="sequential",  # training_data has shuffled
        per_device_eval_batch_size=rows_per_pair,  # one loss per pair
        precompute_ref_log_probs=True,  # so that the held-out pairs meet the reference once, not twice
        model_init_kwargs={"dtype": "bfloat16" if gpu else "float32"},
        bf16=gpu,
        use_cpu=not gpu,
        activation_checkpointing=False,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        **settings.config,
    )
    test = load_quickstart("test", unpaired)
    trainer = trainer_class(
        model=args.model or str(model_directory()),
        args=config,
        train_dataset=training_data(settings, args.seed, unpaired),
        eval_dataset=test.select(range(len(test) - HELD_OUT_PAIRS * rows_per_pair, len(test))),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)

    tau = config.kldpo_tau if args.loss == "kldpo" else None
    before = held_out(score(trainer, "held-out pairs, before"), tau)
    trainer.train()
    after = held_out(score(trainer, "held-out pairs, after"), tau)

    trainer.save_model()
    history = [log_entry(0, before), *trainer.state.log_history, log_entry(settings.steps, after)]
    results = {
        key: {
            "before": mean_and_error(before[key]),
            "after": mean_and_error(after[key]),
            "change": mean_and_error(after[key] - before[key]),  # of the same pairs
        }
        for key in before
    }
    figures = {
        "model": args.model or MODEL_NAME,
        "data": "trl_rdro quickstart pairs (VADER ratings, positivity)",
        "format": args.data,
        "train_pairs": settings.steps * settings.pairs_per_step,
        "held_out_pairs": HELD_OUT_PAIRS,
        "loss": args.loss,
        "seed": args.seed,
        "settings": asdict(settings),
        "hardware": hardware(),
        "versions": {module.__name__: module.__version__ for module in (trl_rdro, trl, transformers, peft, torch)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "results": results,
        "log_history": history,
    }
    (output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot_log_history(history, output_dir / "curves.png")
    report(figures, output_dir)


def report(figures, output_dir):
    def cell(value, sign=""):
        return f"{value['mean']:{sign}.3f} ± {value['standard_error']:.3f}"

    data = f"{figures['train_pairs']} training pairs" + (" taken apart" if figures["format"] == "unpaired" else "")
    print(f"\n{figures['model']}, {figures['loss']}, {data}, seed {figures['seed']}")
    print(f"{figures['held_out_pairs']} held-out pairs, ± one standard error\n")
    print(f"{'':20}{'before':>16}{'after':>16}{'change':>17}")
    for key, name in (("accuracy", "preference accuracy"), ("loss", "loss")):
        row = figures["results"][key]
        print(f"{name:20}{cell(row['before']):>16}{cell(row['after']):>16}{cell(row['change'], '+'):>17}")
    print(
        "\nAccuracy: the share of pairs whose positive text gained more log-probability over the reference model than "
        "the negative one.\nBefore training the model is the reference, so every pair is a tie and counts one half: "
        "0.500 by construction.\n"
    )
    print(f"{figures['seconds']:.0f} s on {figures['hardware']}")
    print(f"{output_dir}/: curves.png, figures.json, adapter_model.safetensors")


if __name__ == "__main__":
    main()
