"""
How stable are ddro and rdro as p+ and p- move apart?

The two distributions over a language of 36 completions (language.py) share less and less; the reference model is their
mixture, exactly. ddro, with caps from 0.5 to 0.999, and rdro are trained for 60 steps at learning rates from safe to
far too large. A run counts as diverged if the policy ends farther from p+ than the reference was, KL(p+ || policy) >
KL(p+ || reference), or if its loss stops being finite.

    python scripts/studies/stability.py --size small
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import study
from language import OUTCOMES, distances, exact_model, paired_dataset, tokenizer

from trl_rdro import DPOConfig, DPOTrainer


METHODS = {
    "rdro": {"loss_type": "rdro"},
    **{f"ddro, cap {cap}": {"loss_type": "ddro", "ddro_cap": cap} for cap in (0.5, 0.9, 0.99, 0.999)},
}
PAIRS, BATCH, STEPS = 1000, 64, 60


def cells(size: str) -> list[dict[str, Any]]:
    methods, separations, learning_rates, seeds = {
        "ci": (["rdro", "ddro, cap 0.99"], [2.0], [0.03], 1),
        "small": (METHODS, [0.5, 1.0, 2.0], [0.003, 0.03, 0.1], 3),
        "full": (METHODS, [0.5, 1.0, 1.5, 2.0, 3.0], [0.001, 0.003, 0.01, 0.03, 0.1], 10),
    }[size]
    return [
        {"method": method, "separation": separation, "learning_rate": learning_rate, "seed": seed}
        for seed in range(seeds)
        for separation in separations
        for learning_rate in learning_rates
        for method in methods
    ]


def distributions(separation: float) -> tuple[np.ndarray, np.ndarray]:
    """p+ and p-, the same up to a factor whose logarithm has a standard deviation of twice `separation`."""
    base, tilt = np.random.default_rng(0).normal(size=(2, OUTCOMES))
    p_plus, p_minus = np.exp(0.5 * base + separation * tilt), np.exp(0.5 * base - separation * tilt)
    return p_plus / p_plus.sum(), p_minus / p_minus.sum()


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    p_plus, p_minus = distributions(cell["separation"])
    mixture = (p_plus + p_minus) / 2
    rng = np.random.default_rng(cell["seed"])
    chosen, rejected = (rng.choice(OUTCOMES, size=PAIRS, p=p) for p in (p_plus, p_minus))
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = DPOTrainer(
            exact_model(mixture),
            exact_model(mixture),
            DPOConfig(
                output_dir=output_dir,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                learning_rate=cell["learning_rate"],
                lr_scheduler_type="constant",
                seed=cell["seed"],
                **{**study.TINY_RUN, "logging_strategy": "steps", "logging_steps": 1},
                **METHODS[cell["method"]],
            ),
            train_dataset=paired_dataset(chosen, rejected),
            processing_class=tokenizer(),
        )
        stopped = False
        try:
            study.train(trainer)
        except FloatingPointError:  # what a user would see, and the measurement
            stopped = True
    log = [row for row in trainer.state.log_history if "grad_norm" in row]
    result = {
        "overlap": float(np.minimum(p_plus, p_minus).sum()),
        "largest_ratio": float((p_plus / mixture / 2).max()),  # t r* at t = 1/2, below which a cap brings a bias
        "grad_norm_median": statistics.median(row["grad_norm"] for row in log),
        # The first steps, in which all policies are the reference, are alike
        "grad_norm_max": max(row["grad_norm"] for row in log[10:] or log),
    }
    if "ddro/capped_rejected" in log[-1]:
        tail = log[-10:]
        for label in ("chosen", "rejected"):
            result[f"capped_{label}"] = statistics.fmean(row[f"ddro/capped_{label}"] for row in tail)
    kl = distances(p_plus, trainer.model)["kl"]
    before = float((p_plus * np.log(p_plus / mixture)).sum())
    return {**result, "kl": kl, "kl_before": before, "diverged": float(stopped or not kl <= before)}


def table(rows: list[dict[str, Any]]) -> str:
    learning_rates = list(dict.fromkeys(row["learning_rate"] for row in rows))
    lines = []
    for (overlap, method), members in study.group(rows, ["overlap", "method"]).items():
        by_rate = study.group(members, ["learning_rate"])
        lines.append([f"{overlap:.2f}", method])
        for rate in learning_rates:
            runs = by_rate[rate,]
            norms, diverged = study.cell_text(runs, "grad_norm_max", ".3g"), sum(row["diverged"] for row in runs)
            capped = ""
            if "capped_rejected" in runs[0]:
                capped = f", {study.mean_and_error(runs, 'capped_rejected')[0]:.0%}"
            lines[-1].append(f"{diverged:.0f}/{len(runs)}, {norms}{capped}")
    header = ["overlap", "method", *(f"rate {rate}" for rate in learning_rates)]
    legend = (
        "Overlap: sum of min(p+, p-). Cells: runs that diverged, largest gradient norm after step 10, and for ddro "
        "the share of rejected completions beyond the cap in the last ten steps.\n\n"
    )
    return legend + study.markdown(header, lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    overlaps = study.group(rows, ["overlap"])
    panels = (("diverged", "share of diverged runs"), ("grad_norm_max", "largest gradient norm"), ("kl", "final KL"))
    figure = Figure(figsize=(12, 3.2 * len(overlaps)), layout="constrained")
    all_axes = figure.subplots(len(overlaps), 3, squeeze=False)
    for axes_row, ((overlap,), members) in zip(all_axes, overlaps.items(), strict=True):
        for axes, (column, title) in zip(axes_row, panels, strict=True):
            for (method,), curve in study.group(members, ["method"]).items():
                study.error_bars(axes, curve, "learning_rate", column, label=method)
            axes.set(title=f"overlap {overlap:.2f}: {title}", xscale="log", xlabel="learning rate")
            if column == "diverged":
                axes.set_ylim(-0.05, 1.05)
            else:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
        axes_row[0].axes.legend(fontsize="x-small")
    return figure


STUDY = study.Study("stability", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
