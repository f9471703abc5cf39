"""
Label noise: how much does kldpo, which trusts hard pairs, suffer from wrong labels? (real human ratings)

The quickstart's pairs, on which raters agree, are labelled by the mean rating, with a share of the labels flipped; and
pairs of texts that differ by as little as 0.5 ("close", rated_pairs.py) are labelled by the mean or by one randomly
drawn rater of each text. dpo, kldpo and robust DPO (told the share of wrong labels, and not run where there is none,
because it is dpo there) are tested on quickstart pairs.

    python scripts/studies/label_noise.py --size small
"""

import random
from pathlib import Path
from typing import Any

import rated_pairs
import ratings
import study


METHODS = {
    "dpo": {"loss_type": "sigmoid"},
    "kldpo, tau 0.1": {"loss_type": "kldpo", "kldpo_tau": 0.1},
    "robust": {"loss_type": "robust"},
}
RIGHT = ("none", "close, mean")  # every label is that of the mean
CLOSE = ("close, mean", "close, rater")
SHARES = dict.fromkeys(ratings.DOMAINS, 1 / len(ratings.DOMAINS))


def cells(size: str) -> list[dict[str, Any]]:
    methods, noises, seeds = {
        "ci": (["dpo", "robust"], ["flip 0.4"], 1),
        "small": (METHODS, ["none", "flip 0.4", *CLOSE], 3),
        "full": (METHODS, ["none", "flip 0.1", "flip 0.2", "flip 0.3", "flip 0.4", *CLOSE], 5),
    }[size]
    return [
        {"noise": noise, "method": method, "seed": seed}
        for seed in range(seeds)
        for noise in noises
        for method in methods
        if method != "robust" or noise not in RIGHT
    ]


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    pairs = ratings.quickstart_pairs()
    if cell["size"] != "ci":  # the tests do not download
        pairs += rated_pairs.load(folder)
    subject = ratings.Subject(cell, folder, pairs)
    drawn = subject.draw(SHARES, "close" if cell["noise"] in CLOSE else "train")
    rng = random.Random(cell["seed"])
    wrong = [is_wrong(pair, cell["noise"], rng) for pair in drawn]
    labelled = [ratings.swapped(pair) if flip else pair for pair, flip in zip(drawn, wrong, strict=True)]
    share = sum(wrong) / len(wrong)
    options = METHODS[cell["method"]]
    if options["loss_type"] == "robust":
        options = {**options, "label_smoothing": min(share, 0.45)}
    scores = subject.train_and_score(options, labelled)
    return {**ratings.pair_figures(scores), "wrong_labels": share}


def is_wrong(pair: ratings.Pair, noise: str, rng: random.Random) -> bool:
    """Whether the label is other than that of the mean."""
    if noise in RIGHT:
        return False
    if noise == "close, rater":
        one, other = rng.choice(pair["chosen_ratings"]), rng.choice(pair["rejected_ratings"])
        return one < other or (one == other and rng.random() < 0.5)
    return rng.random() < float(noise.removeprefix("flip "))


def table(rows: list[dict[str, Any]]) -> str:
    noises = study.group(rows, ["noise"])
    lines = []
    for (method,), members in study.group(rows, ["method"]).items():
        by_noise = study.group(members, ["noise"])
        lines.append([method])
        for (noise,) in noises:
            runs = by_noise.get((noise,), [])
            if not runs:
                lines[-1].append("")
                continue
            baseline = {row["seed"]: row["accuracy"] for row in noises[noise,] if row["method"] == "dpo"}
            differences = [{"accuracy": row["accuracy"] - baseline[row["seed"]]} for row in runs]
            lines[-1].append(study.cell_text(runs, "accuracy"))
            lines[-1][-1] += f" ({study.cell_text(differences, 'accuracy', '+.3f')})" if method != "dpo" else ""
    header = ["method"]
    for (noise,), members in noises.items():
        header.append(f"{noise} ({study.mean_and_error(members, 'wrong_labels')[0]:.0%} wrong)")
    return "Held-out accuracy; in brackets less dpo's of the same seeds.\n\n" + study.markdown(header, lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    noises = [noise for (noise,) in study.group(rows, ["noise"])]
    for axes, column in zip(figure.subplots(1, 2), ("accuracy", "margin"), strict=True):
        for i, ((method,), members) in enumerate(study.group(rows, ["method"]).items()):
            by_noise = study.group(members, ["noise"])
            figures = [study.mean_and_error(by_noise.get((noise,), []), column) for noise in noises]
            means, errors = zip(*figures, strict=True)
            xs = [x + (i - 1) * 0.08 for x in range(len(noises))]
            axes.errorbar(xs, means, [error or 0.0 for error in errors], fmt="o", label=method)
        axes.set_xticks(range(len(noises)), noises)
        axes.set(title=f"held-out {column}", xlabel="label noise in training")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


STUDY = study.Study("label_noise", cells, run, table, draw, takes_model=True)

if __name__ == "__main__":
    study.main(STUDY)
