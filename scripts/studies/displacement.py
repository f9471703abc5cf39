"""
Likelihood displacement: does the log-probability of the chosen completions fall? (real human ratings)

Each loss trains on the same pairs of all four domains at the same learning rate and number of steps, so that losses
differ in how far they get too: read the chosen log-ratio beside the accuracy.

    python scripts/studies/displacement.py --size small
"""

from pathlib import Path
from typing import Any

import ratings
import study


METHODS = {
    "rdro": {"loss_type": "rdro"},
    "ddro, cap 0.9": {"loss_type": "ddro", "ddro_cap": 0.9},
    "kldpo, tau 0.3": {"loss_type": "kldpo", "kldpo_tau": 0.3},
    "wdpo, rho 0.001": {"loss_type": "wdpo", "wdpo_rho": 0.001},
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "bco_pair": {"loss_type": "bco_pair"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "kto": {"loss_type": "kto"},
    "sft": {"loss_type": "sft"},
}
SHARES = dict.fromkeys(ratings.DOMAINS, 1 / len(ratings.DOMAINS))


def cells(size: str) -> list[dict[str, Any]]:
    methods, seeds = (["rdro", "kto", "sft"], 1) if size == "ci" else (METHODS, 2 if size == "small" else 5)
    return [{"method": method, "seed": seed} for seed in range(seeds) for method in methods]


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    subject = ratings.Subject(cell, folder, ratings.quickstart_pairs())
    scores = subject.train_and_score(METHODS[cell["method"]], subject.draw(SHARES))
    return {**ratings.pair_figures(scores), "share_falling": (scores[:, 0] < 0).double().mean().item()}


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("chosen", "rejected", "share_falling", "accuracy")
    lines = [
        [method, *(study.cell_text(members, column, "+.2f" if column in columns[:2] else ".2f") for column in columns)]
        for (method,), members in study.group(rows, ["method"]).items()
    ]
    header = ["method", "chosen log-ratio", "rejected log-ratio", "share of chosen that fell", "accuracy"]
    return study.markdown(header, lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    methods = study.group(rows, ["method"])
    for shift, side in ((-0.1, "chosen"), (0.1, "rejected")):
        means, errors = zip(*(study.mean_and_error(members, side) for members in methods.values()), strict=True)
        xs = [x + shift for x in range(len(methods))]
        axes.errorbar(xs, means, [error or 0.0 for error in errors], fmt="o", label=side)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(methods)), [method for (method,) in methods], rotation=20, ha="right")
    axes.set(title="held-out log-ratio to the reference model", ylabel="nats")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


STUDY = study.Study("displacement", cells, run, table, draw, takes_model=True)

if __name__ == "__main__":
    study.main(STUDY)
