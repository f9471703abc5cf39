"""
Train a language model on real human judgements with one of the losses of trl_rdro, and with DPO beside it.

`make demo` runs this with SmolLM2-135M-Instruct, its vocabulary cut to the data (vocabulary.py). Every `--model` that
`from_pretrained` takes will do. A LoRA adapter on the last fifth of the layers is trained on pairs of the quickstart
data (see trl_rdro/data/quickstart/README.md), once with the chosen loss and once with DPO, on the same pairs in the
same order; then held-out pairs are scored under both. Adapters, figures and a picture go to `--output_dir`.

    python scripts/demo.py --loss rdro
    python scripts/demo.py --loss ddro --data unpaired
    python scripts/demo.py --loss ipo --seed 1 --model Qwen/Qwen3-0.6B
"""

import argparse
import json
import math
import os
import random
import time
from datetime import UTC, datetime
from pathlib import Path


# Threads that wait for one another by spinning make a busy machine ten times slower. Read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
print("[1/6] importing PyTorch, transformers and TRL: some ten seconds", flush=True)

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from machine import processor_name  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from smollm2 import MODEL_DIR, MODEL_NAME, model_directory  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402
from vocabulary import cut_vocabulary  # noqa: E402

import trl_rdro  # noqa: E402
from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # noqa: E402
from trl_rdro.compat import trl as trl_compat  # noqa: E402
from trl_rdro.losses.types import of_family  # noqa: E402
from trl_rdro.quickstart import load_quickstart  # noqa: E402
from trl_rdro.tools import scoring  # noqa: E402


BASELINE = "dpo"
SIDES = ("chosen", "rejected")
PAIRS_PER_STEP, STEPS, HELD_OUT_PAIRS = (
    8,
    24,
    96,
)  # the last of the test split are held out
LEARNING_RATE = 1e-3  # of Adam, the same for all losses; chosen on other pairs of the test split
# ddro's loss grows steeply where a rejected text nearly doubles its probability. wdpo's penalty costs a pass more.
CONFIG = {"ddro": {"ddro_cap": 0.9}, "wdpo": {"wdpo_interval": 4}}
MAX_LENGTH = 256  # tokens, which no text reaches


def say(step: int, text: str) -> None:
    print(f"[{step}/6] {text}", flush=True)


def training_pairs(steps: int, seed: int) -> list[dict]:
    """Random pairs in random order, but that texts of similar length are together: that saves padding."""
    rng = random.Random(seed)
    pairs = rng.sample(list(load_quickstart("train")), steps * PAIRS_PER_STEP)
    pairs.sort(key=lambda pair: len(pair["chosen"]))
    batches = [pairs[i : i + PAIRS_PER_STEP] for i in range(0, len(pairs), PAIRS_PER_STEP)]
    rng.shuffle(batches)
    return [pair for batch in batches for pair in batch]


def held_out_pairs() -> list[dict]:
    test = load_quickstart("test")
    return list(test.select(range(len(test) - HELD_OUT_PAIRS, len(test))))


def log_probabilities(model, tokenizer, pairs, description) -> torch.Tensor:
    """Of chosen and rejected texts, `(n, 2)`, in nats."""
    rows = scoring.prepare(dataset_of(pairs), tokenizer, MAX_LENGTH)
    return scoring.completion_logps(model.eval(), rows, batch_size=PAIRS_PER_STEP, description=description)


def dataset_of(pairs: list[dict], reference: torch.Tensor | None = None, unpaired: bool = False) -> Dataset:
    """The pairs, or their two halves one after the other, with the reference's log-probabilities where given."""
    prompts = [pair["prompt"] for pair in pairs]
    if not unpaired:
        columns = {"prompt": prompts, **{side: [pair[side] for pair in pairs] for side in SIDES}}
        if reference is not None:
            columns |= {f"ref_{side}_logps": reference[:, i].tolist() for i, side in enumerate(SIDES)}
        return Dataset.from_dict(columns)
    return Dataset.from_dict(
        {
            "prompt": [prompt for prompt in prompts for _ in SIDES],
            "completion": [pair[side] for pair in pairs for side in SIDES],
            "label": [side == "chosen" for _ in pairs for side in SIDES],
            "ref_logps": reference.flatten().tolist(),
        }
    )


class Progress(transformers.TrainerCallback):
    """A line now and then: how far it is, and what moves."""

    def __init__(self, name: str):
        self.name, self.started = name, time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            seconds = time.monotonic() - self.started
            rest = seconds / state.global_step * (state.max_steps - state.global_step)
            chosen, rejected = (logs[f"rewards/{side}"] / args.beta for side in SIDES)
            print(
                f"      {self.name}: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}, "
                f"log-ratios of chosen {chosen:+.2f} and rejected {rejected:+.2f}; {rest:.0f} s to go",
                flush=True,
            )


def train(name: str, path: str, dataset: Dataset, folder: Path, args: argparse.Namespace):
    """The trainer of one loss, when it is done."""
    gpu = torch.cuda.is_available()
    unpaired = "label" in dataset.column_names
    config_class, trainer_class = (KTOConfig, KTOTrainer) if unpaired else (DPOConfig, DPOTrainer)
    config = config_class(
        output_dir=str(folder),
        loss_type="sigmoid" if name == "dpo" else name,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        num_train_epochs=1,
        per_device_train_batch_size=PAIRS_PER_STEP * (2 if unpaired else 1),
        train_sampling_strategy="sequential",  # training_pairs has shuffled
        precompute_ref_log_probs=True,  # the columns are there
        max_length=MAX_LENGTH,
        bf16=gpu,
        use_cpu=not gpu,
        activation_checkpointing=False,
        logging_steps=min(4, args.steps),
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        **CONFIG.get(name, {}),
    )
    model = load(path)
    adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules=last_layers(model), task_type="CAUSAL_LM")
    trainer = trainer_class(model, args=config, train_dataset=dataset, peft_config=adapters)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(name))
    trainer.train()
    trainer.save_model()
    return trainer


def load(path: str) -> torch.nn.Module:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def last_layers(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers in the last fifth of a model's blocks: what is before them needs no backward pass."""
    blocks = model.config.num_hidden_layers
    kept = [f".layers.{i}." for i in range(blocks - max(1, blocks // 5), blocks)]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(block in f".{name}" for block in kept)
    ]


def figures_of(logratios: torch.Tensor) -> dict[str, dict[str, float]]:
    """Mean and standard error over the held-out pairs; before training the accuracy is 0.5 and all else 0."""
    chosen, rejected = logratios.double().T
    margin = chosen - rejected
    values = {
        "accuracy": torch.where(margin == 0, 0.5, (margin > 0).double()),
        "margin": margin,
        "chosen": chosen,
        "rejected": rejected,
    }
    result = {
        name: {"mean": value.mean().item(), "standard_error": (value.std() / math.sqrt(len(value))).item()}
        for name, value in values.items()
    }
    # Of e^z over both classes: 0 for every policy, if the reference were the mixture that the texts come from
    ratios = logratios.flatten().double()
    log_mean = torch.logsumexp(ratios, 0) - math.log(len(ratios))
    spread = (ratios - log_mean).exp().std() / math.sqrt(len(ratios))
    result["log_normalisation"] = {"mean": log_mean.item(), "standard_error": spread.item()}
    return result


def picture(logratios: dict[str, torch.Tensor], results: dict[str, dict], path: Path) -> None:
    """Log-ratios of the held-out texts under each loss."""
    figure = Figure(figsize=(3.6 * len(logratios) + 0.8, 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(logratios), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(all_axes, logratios.items(), strict=True):
        for i, (side, colour) in enumerate(zip(SIDES, ("C2", "C3"), strict=True)):
            parts = axes.violinplot(values[:, i].numpy(), positions=[i], showextrema=False, widths=0.8)
            parts["bodies"][0].set_color(colour)
            figures = results[name][side]
            axes.errorbar(i, figures["mean"], 2 * figures["standard_error"], fmt="o", color=colour, capsize=4)
        accuracy = results[name]["accuracy"]
        axes.set_title(f"{name}: accuracy {accuracy['mean']:.2f} ± {accuracy['standard_error']:.2f}")
        axes.set_xticks(range(2), SIDES)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel("log-ratio to the model before training, nats")
    figure.suptitle(
        f"{len(next(iter(logratios.values())))} held-out pairs; bars: mean ± 2 standard errors", fontsize=9
    )
    figure.savefig(path, dpi=120)


def table(results: dict[str, dict]) -> str:
    def cell(value, sign="+"):
        return f"{value['mean']:{sign}.2f} ± {value['standard_error']:.2f}"

    lines = [f"{'':8}{'accuracy':>15}{'margin':>16}{'chosen':>16}{'rejected':>16}{'log normalisation':>20}"]
    for name, row in results.items():
        cells = [cell(row[key]) for key in ("margin", "chosen", "rejected")]
        lines.append(
            f"{name:8}{cell(row['accuracy'], ''):>15}{''.join(f'{text:>16}' for text in cells)}"
            f"{cell(row['log_normalisation']):>20}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--loss", default="rdro", help="any loss type of DPOConfig, or dpo (default: rdro)")
    parser.add_argument("--data", choices=("paired", "unpaired"), default="paired")
    parser.add_argument("--model", help=f"model id or directory (default: {MODEL_NAME})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE, help="of Adam (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, help="default: runs/demo-LOSS, or runs/demo-LOSS-unpaired")
    args = parser.parse_args()
    loss = "dpo" if args.loss == "sigmoid" else args.loss
    unpaired = args.data == "unpaired"
    if unpaired and loss not in of_family("density_ratio"):
        parser.error(f"{loss} compares the two texts of a pair: it has no unpaired form. Use rdro or ddro.")
    output_dir = args.output_dir or Path("runs") / f"demo-{loss}{'-unpaired' if unpaired else ''}"
    try:  # a loss that does not exist, or needs columns that the data have not, is said before anything is loaded
        DPOConfig(output_dir=str(output_dir), loss_type="sigmoid" if loss == "dpo" else loss, use_cpu=True, bf16=False)
    except ValueError as error:
        parser.error(str(error))
    started = time.monotonic()
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(4, os.cpu_count() or 1))))
    transformers.set_seed(args.seed)
    transformers.logging.set_verbosity_error()

    train_pairs, test_pairs = training_pairs(args.steps, args.seed), held_out_pairs()
    say(2, f"the model: {args.model or MODEL_NAME}, unpacked once to {MODEL_DIR.parent}/")
    path = args.model
    if path is None:
        texts = [
            pair["prompt"] + pair[side]
            for split in ("train", "test")
            for pair in load_quickstart(split)
            for side in SIDES
        ]
        path = cut_vocabulary(str(model_directory()), texts, MODEL_DIR.with_name(f"{MODEL_DIR.name}-quickstart"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    say(3, f"the reference: its log-probabilities of {len(train_pairs)} training and {len(test_pairs)} held-out pairs")
    model = load(path)
    if torch.cuda.is_available():
        model.cuda()
    trl_compat.add_fused_lm_head(model)
    reference = log_probabilities(model, tokenizer, train_pairs + test_pairs, "      reference")
    known, held_out = reference.split([len(train_pairs), len(test_pairs)])
    del model

    names = list(dict.fromkeys((loss, BASELINE)))
    logratios = {}
    for step, name in enumerate(names, 4):
        say(step, f"training with {name}: {args.steps} steps of {PAIRS_PER_STEP} pairs, then the held-out pairs")
        rows = dataset_of(train_pairs, known, unpaired=unpaired and name != BASELINE)
        trainer = train(name, path, rows, output_dir / name, args)
        scores = log_probabilities(trainer.model, tokenizer, test_pairs, f"      {name}, held-out pairs")
        logratios[name] = scores - held_out

    results = {name: figures_of(values) for name, values in logratios.items()}
    picture(logratios, results, output_dir / "demo.png")
    figures = {
        "model": args.model or MODEL_NAME,
        "data": "trl_rdro quickstart pairs (VADER ratings, positivity)",
        "format": args.data,
        "train_pairs": len(train_pairs),
        "held_out_pairs": len(test_pairs),
        "loss": loss,
        "seed": args.seed,
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{processor_name()}, {torch.get_num_threads()} threads",
        "versions": {module.__name__: module.__version__ for module in (trl_rdro, trl, transformers, peft, torch)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(time.process_time(), 1),
        "results": results,
        "logratios": {name: values.tolist() for name, values in logratios.items()},
    }
    (output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    say(6, f"done in {figures['seconds']:.0f} s on {figures['hardware']}\n")
    print(
        f"{len(test_pairs)} held-out pairs after {len(train_pairs)} training pairs, seed {args.seed}, "
        "± one standard error\n"
    )
    print(table(results))
    print(
        "\naccuracy   share of pairs whose positive text gained more log-probability than the negative (.50 before)\n"
        "margin     by how much, in nats; chosen, rejected: the log-ratios that it is the difference of (0 before)\n"
        "log normalisation   log of the mean ratio over both texts: near 0 as long as the policy moves as ddro's and\n"
        "           rdro's theory has it, far from 0 where probability went to (or came from) texts in general\n"
    )
    print(f"{output_dir}/: demo.png, figures.json, and an adapter each in {', '.join(names)}/")


if __name__ == "__main__":
    main()
