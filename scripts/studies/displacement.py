"""
Likelihood displacement: does the log-probability of the chosen completions fall? (people's texts, one word changed)

It is reported of pairs whose two texts hardly differ (2402.13228, 2410.11779), so here they differ in one word and its
opposite (opposites.py), and each loss trains for eight epochs at one learning rate, DPO at two smaller ones too. The
primary endpoint is the log-ratio of the chosen texts of held-out pairs at the end. Losses differ in how far they get:
read it beside the margin and the accuracy, and along the epochs.

    python scripts/studies/displacement.py --size small
"""

from pathlib import Path
from typing import Any

import ratings
import study
import torch
from opposites import near_identical


METHODS = {
    "rdro": {"loss_type": "rdro"},
    "ddro, cap 0.9": {"loss_type": "ddro", "ddro_cap": 0.9},
    "kldpo, tau 0.3": {"loss_type": "kldpo", "kldpo_tau": 0.3},
    "dpo": {"loss_type": "sigmoid"},
    "dpo, rate 3e-4": {"loss_type": "sigmoid", "learning_rate": 3e-4},
    "dpo, rate 1e-4": {"loss_type": "sigmoid", "learning_rate": 1e-4},
    "cdpo, 0.1": {"loss_type": "cdpo", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "dpop": {"loss_type": "dpop"},
    "bco_pair": {"loss_type": "bco_pair"},
    "kto": {"loss_type": "kto"},
    "sft": {"loss_type": "sft"},
}
RATE = 1e-3
EPOCHS = (1, 3, 8)
STEPS_PER_EPOCH = {"ci": 1, "small": 8, "full": 16}
DRAWS = {"ci": 1, "small": 3, "full": 10}
HELD_OUT = {"ci": 4, "small": 64, "full": 128}
FIGURES = ("chosen", "rejected", "accuracy")


def cells(size: str) -> list[dict[str, Any]]:
    methods = ("dpo", "kto", "sft") if size == "ci" else METHODS
    return [{"method": method, "seed": seed} for seed in range(DRAWS[size]) for method in methods]


def run(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    size = cell["size"]
    pairs = near_identical(ratings.quickstart_pairs())
    subject = ratings.Subject(cell, folder, [pair["prompt"] + pair[side] for pair in pairs for side in ratings.SIDES])
    steps = STEPS_PER_EPOCH[size]
    trained = ratings.draw(pairs, steps * subject.size.pairs_per_step, cell["seed"])
    tests = ratings.held_out(pairs, HELD_OUT[size])
    options = {"learning_rate": RATE, **METHODS[cell["method"]]}
    at = [epoch * steps for epoch in EPOCHS]
    result = {}
    for epoch, scores in zip(EPOCHS, subject.train_and_score(options, trained, tests + trained, at), strict=True):
        for name, logratios in (("", scores[: len(tests)]), ("trained_", scores[len(tests) :])):
            result |= {f"{name}{figure}_{epoch}": value for figure, value in figures(logratios).items()}
    return result


def figures(logratios: torch.Tensor) -> dict[str, float]:
    """Mean log-ratios, nats, of `(n, 2)`, and the share of pairs in order."""
    chosen, rejected = logratios.double().T
    means = (chosen.mean(), rejected.mean(), (chosen > rejected).double().mean())
    return {name: mean.item() for name, mean in zip(FIGURES, means, strict=True)}


def table(rows: list[dict[str, Any]]) -> str:
    last = EPOCHS[-1]
    columns = [
        *((f"chosen_{epoch}", "+.2f", f"chosen, epoch {epoch}") for epoch in EPOCHS),
        (f"rejected_{last}", "+.2f", "rejected"),
        (f"accuracy_{last}", ".3f", "accuracy"),
        (f"trained_chosen_{last}", "+.2f", "trained on: chosen"),
        (f"trained_rejected_{last}", "+.2f", "rejected"),
    ]
    lines = [
        [method, *(study.cell_text(members, name, form) for name, form, _ in columns)]
        for (method,), members in study.group(rows, ["method"]).items()
    ]
    text = f"Log-ratios to the reference in nats, of held-out pairs and, after epoch {last}, of those trained on.\n\n"
    return text + study.markdown(["method", *(title for _, _, title in columns)], lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_epoch, by_margin = figure.subplots(1, 2, sharey=True)
    for i, ((method,), members) in enumerate(study.group(rows, ["method"]).items()):
        chosen, rejected = (
            [0, *(study.mean_and_error(members, f"{side}_{epoch}")[0] for epoch in EPOCHS)] for side in ratings.SIDES
        )
        errors = [0, *(study.mean_and_error(members, f"chosen_{epoch}")[1] or 0 for epoch in EPOCHS)]
        margins = [ours - theirs for ours, theirs in zip(chosen, rejected, strict=True)]
        for axes, xs in ((by_epoch, [0, *EPOCHS]), (by_margin, margins)):
            axes.errorbar(
                xs, chosen, errors, marker=".", linestyle="-" if i < len(METHODS) / 2 else "--", label=method
            )
    by_epoch.set(xlabel="epochs", ylabel="log-ratio of held-out chosen texts, nats")
    by_margin.set(xlabel="their margin over the rejected ones, nats", xscale="symlog")
    for axes in (by_epoch, by_margin):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
    by_margin.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


STUDY = study.Study("displacement", cells, run, table, draw, takes_model=True)

if __name__ == "__main__":
    study.main(STUDY)
