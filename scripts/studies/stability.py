"""
How stable are ddro and rdro as p+ and p- move apart, and as the reference is not their mixture?

The two distributions over a language of 36 completions (language.py) share much or little. The reference model is
their mixture, exactly, or the text that both were made from ("base"), under which p+/pi_ref goes beyond 1/alpha.
ddro, with several caps, and rdro are trained for 60 steps at a large learning rate. A run has diverged if its loss
stopped being finite or if the policy ends at KL(p+ || policy) >= log 36 nats: at least as far from p+ as a uniform
distribution can be.

    python scripts/studies/stability.py --size small
"""

import math
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
    **{f"ddro, cap {cap}": {"loss_type": "ddro", "ddro_cap": cap} for cap in (0.9, 0.99, 0.999)},
}
REFERENCES = ("mixture", "base")
PAIRS, BATCH, STEPS = 1000, 64, 60


def cells(size: str) -> list[dict[str, Any]]:
    methods, separations, learning_rates, seeds = {
        "ci": (["rdro", "ddro, cap 0.99"], [2.0], [0.03], 1),
        "small": (METHODS, [0.5, 2.0], [0.1], 10),
        "full": (METHODS, [0.5, 1.0, 1.5, 2.0, 3.0], [0.003, 0.03, 0.1], 30),
    }[size]
    return [
        {
            "method": method,
            "reference": reference,
            "separation": separation,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        for seed in range(seeds)
        for reference in REFERENCES
        for separation in separations
        for learning_rate in learning_rates
        for method in methods
    ]


def distributions(separation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A base distribution, and p+ and p-: the base tilted by the same factor and by its inverse, the logarithm of
    which has a standard deviation of `separation`."""
    base, tilt = np.random.default_rng(0).normal(size=(2, OUTCOMES))
    weights = (np.exp(0.5 * base + sign * separation * tilt) for sign in (0, 1, -1))
    base, p_plus, p_minus = (weight / weight.sum() for weight in weights)
    return base, p_plus, p_minus


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    base, p_plus, p_minus = distributions(cell["separation"])
    reference = base if cell["reference"] == "base" else (p_plus + p_minus) / 2
    rng = np.random.default_rng(cell["seed"])
    chosen, rejected = (rng.choice(OUTCOMES, size=PAIRS, p=p) for p in (p_plus, p_minus))
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = DPOTrainer(
            exact_model(reference),
            exact_model(reference),
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
        "largest_ratio": float((p_plus / reference / 2).max()),  # t r* at t = 1/2: a cap below it brings a bias
        "grad_norm_median": statistics.median(row["grad_norm"] for row in log),
        # The first steps, in which all policies are the reference, are alike
        "grad_norm_max": max(row["grad_norm"] for row in log[10:] or log),
    }
    if "ddro/capped_rejected" in log[-1]:
        tail = log[-10:]
        for label in ("chosen", "rejected"):
            result[f"capped_{label}"] = statistics.fmean(row[f"ddro/capped_{label}"] for row in tail)
    kl = distances(p_plus, trainer.model)["kl"]
    before = float((p_plus * np.log(p_plus / reference)).sum())
    return {**result, "kl": kl, "kl_before": before, "diverged": float(stopped or not kl < math.log(OUTCOMES))}


def table(rows: list[dict[str, Any]]) -> str:
    learning_rates = list(dict.fromkeys(row["learning_rate"] for row in rows))
    lines = []
    for (reference, overlap, method), members in study.group(rows, ["reference", "overlap", "method"]).items():
        by_rate = study.group(members, ["learning_rate"])
        before, largest = members[0]["kl_before"], members[0]["largest_ratio"]
        lines.append([reference, f"{overlap:.2f}, {largest:.2f}", f"{before:.2f}", method])
        for rate in learning_rates:
            runs = by_rate[rate,]
            kl, norms = study.cell_text(runs, "kl", ".2f"), study.cell_text(runs, "grad_norm_max", ".2g")
            lines[-1].append(f"{diverged_text(runs)}; {kl}; {norms}")
    header = ["reference", "overlap, largest t r", "KL before", "method", *(f"rate {rate}" for rate in learning_rates)]
    legend = (
        "Overlap: sum of min(p+, p-); largest t r: that of p+ over the reference at t = 1/2, above 1 only for a wrong "
        "one. Cells: runs that diverged with the exact 95 % interval of their share; final KL(p+ || policy), nats; "
        "largest gradient norm after step 10.\n\n"
    )
    return legend + study.markdown(header, lines)


def diverged_text(runs: list[dict[str, Any]]) -> str:
    """k/n with the Clopper-Pearson interval of the share."""
    n, diverged = len(runs), round(sum(row["diverged"] for row in runs))

    def at_most(k: int, share: float) -> float:
        return sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k + 1))

    # Shares under which so few, or so many, would be seen with a probability of 2.5 %, on a grid finer than is printed
    grid = np.linspace(0, 1, 2001)
    low = min(share for share in grid if diverged == 0 or 1 - at_most(diverged - 1, share) >= 0.025)
    high = max(share for share in grid if diverged == n or at_most(diverged, share) >= 0.025)
    return f"{diverged}/{n} [{low:.2f}, {high:.2f}]"


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    panels = study.group(rows, ["reference", "overlap"])
    figure = Figure(figsize=(4.0 * len(panels), 6.4), layout="constrained")
    columns = figure.subplots(2, len(panels), squeeze=False).T
    for (upper, lower), ((reference, overlap), members) in zip(columns, panels.items(), strict=True):
        for (method,), curve in study.group(members, ["method"]).items():
            study.error_bars(upper, curve, "learning_rate", "kl", label=method)
            study.error_bars(lower, curve, "learning_rate", "grad_norm_max", label=method)
        upper.axhline(members[0]["kl_before"], color="grey", linestyle=":", label="reference")
        upper.set(title=f"reference: {reference}; overlap {overlap:.2f}", ylabel="final KL(p+ || policy), nats")
        lower.set(yscale="log", xlabel="learning rate", ylabel="largest gradient norm")
        for axes in (upper, lower):
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="x-small")
    return figure


STUDY = study.Study("stability", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
