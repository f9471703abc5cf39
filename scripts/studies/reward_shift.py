"""
A shift in what people want: train on labels by one mixture of two rewards, test on all mixtures.

The design of the KLDPO and WDPO paper (2502.01930): pairs are labelled by r_a = a r_1 + (1 - a) r_2 with a = 0.1, and
the policy is tested on labels by every a from 0 to 1. Here r_1 is a text's human rating (how positive it is) and
r_2 its mean word length, both standardised: one needs people, one is computed. Pairs are two random texts of one
domain; training labels are drawn from the Bradley-Terry model of 2 r_a, test labels go to the larger r_a.

    python scripts/studies/reward_shift.py --size small
"""

import math
import random
import statistics
from pathlib import Path
from typing import Any

import ratings
import study
import torch


TRAINED = 0.1
MIXTURES = [i / 10 for i in range(11)]
SCALE = 2.0
SHARES = dict.fromkeys(ratings.DOMAINS, 1 / len(ratings.DOMAINS))
METHODS = {
    "dpo": {"loss_type": "sigmoid"},
    "kldpo, tau 0.1": {"loss_type": "kldpo", "kldpo_tau": 0.1},
    "wdpo, rho 0.001": {"loss_type": "wdpo", "wdpo_rho": 0.001},
}


def cells(size: str) -> list[dict[str, Any]]:
    methods, seeds = (METHODS, 5) if size == "full" else (["dpo", "kldpo, tau 0.1"], 3 if size == "small" else 1)
    return [{"method": method, "seed": seed} for seed in range(seeds) for method in methods]


def texts_with_rewards(pairs: list[ratings.Pair]) -> list[dict[str, Any]]:
    """Each text of the pairs with its two rewards, not standardised, under a prompt that asks for nothing."""
    return [
        {
            "split": pair["split"],
            "domain": pair["domain"],
            "prompt": pair["prompt"].replace("positive ", ""),
            "text": pair[side],
            "rewards": (pair[f"{side}_mean"], statistics.fmean(map(len, pair[side].split()))),
        }
        for pair in pairs
        for side in ratings.SIDES
    ]


def random_pairs(texts: list[dict[str, Any]], rng: random.Random) -> list[ratings.Pair]:
    """Two texts of a domain and split each, and the gaps between their standardised rewards, first less second."""
    spreads = [statistics.stdev(text["rewards"][i] for text in texts) for i in range(2)]
    pairs = []
    for (split, domain), members in study.group(texts, ["split", "domain"]).items():
        rng.shuffle(members)
        for first, second in zip(members[::2], members[1::2], strict=False):
            gaps = [(a - b) / s for a, b, s in zip(first["rewards"], second["rewards"], spreads, strict=True)]
            row = {"split": split, "domain": domain, "prompt": first["prompt"], "gaps": gaps}
            pairs.append({**row, "chosen": first["text"], "rejected": second["text"]})
    return pairs


def mixed(pair: ratings.Pair, mixture: float) -> float:
    return mixture * pair["gaps"][0] + (1 - mixture) * pair["gaps"][1]


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    # The same pairs for all seeds, so that the reference is computed once; their labels and the draw differ
    pairs = random_pairs(texts_with_rewards(ratings.quickstart_pairs()), random.Random(0))
    subject = ratings.Subject(cell, folder, pairs)
    rng = random.Random(cell["seed"])
    labelled = [
        pair if rng.random() < 1 / (1 + math.exp(-SCALE * mixed(pair, TRAINED))) else ratings.swapped(pair)
        for pair in subject.draw(SHARES)
    ]
    first, second = subject.train_and_score(METHODS[cell["method"]], labelled).T
    result = {}
    for mixture in MIXTURES:
        wanted = torch.tensor([mixed(pair, mixture) for pair in subject.test]) > 0
        result[f"accuracy_{mixture}"] = ((first > second) == wanted).double().mean().item()
    return {**result, "worst": min(result.values())}


def table(rows: list[dict[str, Any]]) -> str:
    columns = [*(f"accuracy_{mixture}" for mixture in (0.0, 0.1, 0.5, 1.0)), "worst"]
    lines = [
        [method, *(study.cell_text(members, column) for column in columns)]
        for (method,), members in study.group(rows, ["method"]).items()
    ]
    return study.markdown(["method", "accuracy at a = 0", "0.1 (trained)", "0.5", "1", "worst a"], lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (method,), members in study.group(rows, ["method"]).items():
        means, errors = zip(*(study.mean_and_error(members, f"accuracy_{a}") for a in MIXTURES), strict=True)
        axes.errorbar(MIXTURES, means, [error or 0.0 for error in errors], label=method)
    axes.axvline(TRAINED, color="black", linewidth=0.8, linestyle=":")
    axes.set(title="accuracy under r_a, trained at a = 0.1", xlabel="a", ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


STUDY = study.Study("reward_shift", cells, run, table, draw, takes_model=True)

if __name__ == "__main__":
    study.main(STUDY)
