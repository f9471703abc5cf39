"""
Whose preferences count: train where one domain dominates, test on all four (real human ratings).

Runs draw their pairs from film reviews (85 %), product reviews, tweets and editorials (5 % each) and are tested on as
many pairs of each domain. Raters differ between domains in what they call positive, and in how far they agree. The
question is whether the distributionally robust losses do better in the domain where the policy does worst.

    python scripts/studies/people_shift.py --size small
"""

from pathlib import Path
from typing import Any

import ratings
import study
import torch


SHARES = {"film": 0.85, "product": 0.05, "tweet": 0.05, "editorial": 0.05}
METHODS = {
    "dpo": {"loss_type": "sigmoid"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "kldpo, tau 0.3": {"loss_type": "kldpo", "kldpo_tau": 0.3},
    "kldpo, tau 0.1": {"loss_type": "kldpo", "kldpo_tau": 0.1},
    "wdpo, rho 0.001": {"loss_type": "wdpo", "wdpo_rho": 0.001},
}


def cells(size: str) -> list[dict[str, Any]]:
    methods, seeds = (["dpo", "kldpo, tau 0.3"], 1) if size == "ci" else (METHODS, 5)
    return [{"method": method, "seed": seed} for seed in range(seeds) for method in methods]


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    subject = ratings.Subject(cell, folder, ratings.quickstart_pairs())
    scores = subject.train_and_score(METHODS[cell["method"]], subject.draw(SHARES))
    result = {}
    for domain in ratings.DOMAINS:
        figures = ratings.pair_figures(scores[torch.tensor([pair["domain"] == domain for pair in subject.test])])
        result |= {f"accuracy_{domain}": figures["accuracy"], f"margin_{domain}": figures["margin"]}
    for name in ("accuracy", "margin"):
        values = [result[f"{name}_{domain}"] for domain in ratings.DOMAINS]
        result |= {f"{name}_mean": sum(values) / len(values), f"{name}_worst": min(values)}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    baseline = {row["seed"]: row for row in rows if row["method"] == "dpo"}
    lines = []
    for (method,), members in study.group(rows, ["method"]).items():
        line = [method]
        for name in ("accuracy_worst", "accuracy_mean", "margin_worst", "margin_mean"):
            differences = [{name: row[name] - baseline[row["seed"]][name]} for row in members]
            line += [
                study.cell_text(members, name),
                study.cell_text(differences, name, "+.3f") if method != "dpo" else "",
            ]
        lines.append(line)
    header = ["method"]
    for name in ("worst accuracy", "mean accuracy", "worst margin", "mean margin"):
        header += [name, "less dpo's"]
    return "Margins in nats. Differences are of the same seeds.\n\n" + study.markdown(header, lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    methods = study.group(rows, ["method"])
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "margin"), strict=True):
        for i, part in enumerate([*ratings.DOMAINS, "worst", "mean"]):
            figures = [study.mean_and_error(members, f"{name}_{part}") for members in methods.values()]
            xs = [x + (i - 2.5) * 0.13 for x in range(len(methods))]
            means, errors = zip(*figures, strict=True)
            axes.errorbar(xs, means, [error or 0.0 for error in errors], fmt="os"[i > 3], color=f"C{i}", label=part)
        axes.set_xticks(range(len(methods)), [method for (method,) in methods], rotation=20, ha="right")
        axes.set(title=f"{name} by test domain, trained on {SHARES['film']:.0%} film")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


STUDY = study.Study("people_shift", cells, run, table, draw, takes_model=True)

if __name__ == "__main__":
    study.main(STUDY)
