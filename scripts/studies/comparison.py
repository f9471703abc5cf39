"""
Flipped labels: which loss loses least, when all are tuned alike?

Two data sets, a language whose truth is known and people's ratings (finite_policies.py), with none, a tenth, a fifth
or two fifths of the labels flipped. Every loss gets the same rates and betas to choose from, for each data set and
share of flips, by its accuracy on validation pairs whose labels are flipped too; its other options are the defaults.
Then it is trained on other draws of pairs, the same for all losses, and measured on right labels. Differences to dpo
are of the same seeds; whether they are more than chance is Student's t with Holm's correction over all differences of
both data sets.

    python scripts/studies/comparison.py --size small
"""

import itertools
import json
from pathlib import Path
from typing import Any

import finite_policies
import study
from paired import holm, t_test


METHODS = {
    "dpo": {"loss_type": "sigmoid"},
    "cdpo": {"loss_type": "cdpo", "label_smoothing": 0.1},
    "drdpo": {"loss_type": "drdpo"},
    "holder": {"loss_type": "holder"},
    "ropo": {"loss_type": "ropo"},
    "repo": {"loss_type": "repo"},
    "ipo": {"loss_type": "ipo"},
    "adadpo": {"loss_type": "adadpo"},
    "chipo": {"loss_type": "chipo"},
    "dpop": {"loss_type": "dpop"},
    "minor": {"loss_type": "minor"},
    "kldpo": {"loss_type": "kldpo"},
    "rdro": {"loss_type": "rdro"},
    "ddro": {"loss_type": "ddro"},
}
WITHOUT_BETA = ("rdro", "ddro")
RATES, BETAS = (0.003, 0.01, 0.03, 0.1, 0.3), (0.1, 0.3, 1.0, 3.0)
PAIRS, STEPS = 320, 40  # to train on, and as many others to validate on; steps of 32 pairs
TUNING_SEEDS = (1000, 1001, 1002)  # of draws that are not tested on
LEVEL = 0.05


def cells(size: str) -> list[dict[str, Any]]:
    methods, flips, seeds = {
        "ci": (["dpo", "repo"], [0.2], 1),
        "small": (METHODS, [0.0, 0.1, 0.2, 0.4], 20),
        "full": (METHODS, [0.0, 0.1, 0.2, 0.3, 0.4], 100),
    }[size]
    return [
        {"data": data, "flips": share, "method": method, "seed": seed, "size": size}
        for data in finite_policies.TASKS
        for share in flips
        for method in methods
        for seed in range(seeds)
    ]


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    rate, beta = tuned(cell, folder)
    task = finite_policies.TASKS[cell["data"]]()
    theta = trained(task, cell, task.flipped(PAIRS, cell["flips"], cell["seed"]), cell["seed"], rate, beta)
    return {"accuracy": task.accuracy(theta), "rate": rate, "beta": beta}


def trained(task: finite_policies.Task, cell: dict[str, Any], pairs: Any, seed: int, rate: float, beta: float) -> Any:
    return finite_policies.train(task, pairs, steps=STEPS, rate=rate, beta=beta, seed=seed, **METHODS[cell["method"]])


def tuned(cell: dict[str, Any], folder: Path) -> tuple[float, float]:
    """The rate and beta that are best on validation pairs. What was tried is kept in `tuning.jsonl`."""
    record, setting = folder / "tuning.jsonl", {name: cell[name] for name in ("data", "flips", "method")}
    known = {study.key(row["setting"]): row["accuracy"] for row in study.read_lines(record)}
    betas = BETAS[:1] if cell["method"] in WITHOUT_BETA else BETAS
    grid = list(itertools.product(RATES, betas))[: 2 if cell["size"] == "ci" else None]
    found = {}
    for rate, beta in grid:
        name = study.key({**setting, "rate": rate, "beta": beta})
        if name not in known:
            known[name] = validated(cell, rate, beta)
            with open(record, "a") as file:
                file.write(json.dumps({"setting": json.loads(name), "accuracy": known[name]}) + "\n")
        found[rate, beta] = known[name]
    return max(found, key=found.__getitem__)


def validated(cell: dict[str, Any], rate: float, beta: float) -> float:
    """The mean accuracy on validation pairs, flipped as those trained on are."""
    task, accuracies = finite_policies.TASKS[cell["data"]](), []
    for seed in TUNING_SEEDS:
        pairs = task.flipped(2 * PAIRS, cell["flips"], seed)
        theta = trained(task, cell, pairs[:PAIRS], seed, rate, beta)
        accuracies.append(task.accuracy(theta, pairs[PAIRS:]))
    return sum(accuracies) / len(accuracies)


# Results


def compared(rows: list[dict[str, Any]]) -> dict[tuple, tuple[list[float], float | None]]:
    """Of each data set, share of flips and method but dpo: its differences to dpo, and their corrected p-value."""
    base = {(row["data"], row["flips"], row["seed"]): row["accuracy"] for row in rows if row["method"] == "dpo"}
    differences = {
        key: [row["accuracy"] - base[row["data"], row["flips"], row["seed"]] for row in cell]
        for key, cell in study.group(rows, ["data", "flips", "method"]).items()
        if key[2] != "dpo"
    }
    enough = all(len(values) > 1 for values in differences.values())
    p_values = holm([t_test(values) for values in differences.values()]) if enough else [None] * len(differences)
    return dict(zip(differences, zip(differences.values(), p_values, strict=True), strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    comparisons, parts = compared(rows), []
    for (data,), members in study.group(rows, ["data"]).items():
        shares = [share for (share,) in study.group(members, ["flips"])]
        lines = []
        for (method,), of_method in study.group(members, ["method"]).items():
            lines.append([method])
            for (share,), runs in study.group(of_method, ["flips"]).items():
                text = study.cell_text(runs, "accuracy")
                if method != "dpo":
                    differences, p_value = comparisons[data, share, method]
                    text += f" ({study.cell_text([{'d': d} for d in differences], 'd', '+.3f')}{_mark(p_value)})"
                lines[-1].append(text)
        header = [data, *(f"{share:.0%} flipped" for share in shares)]
        parts += [study.markdown(header, lines), f"{_sentence(comparisons, data)}\n"]
    return (
        "Accuracy on right labels; in brackets less dpo's of the same seeds. \\*: more than chance, at "
        f"{LEVEL:.0%} after Holm's correction over all differences of both tables.\n\n" + "\n".join(parts)
    )


def _mark(p_value: float | None) -> str:
    return " \\*" if p_value is not None and p_value < LEVEL else ""


def _sentence(comparisons: dict[tuple, tuple[list[float], float | None]], data: str) -> str:
    """Wins and defeats alike."""
    parts = []
    for word, sign in (("Better", 1), ("Worse", -1)):
        named = [
            f"{method} at {share:.0%}"
            for (of, share, method), (values, p_value) in comparisons.items()
            if of == data and sign * sum(values) > 0 and _mark(p_value)
        ]
        parts.append(f"{word} than dpo beyond chance: {', '.join(named) or 'none'}.")
    return " ".join(parts)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    by_data = study.group(rows, ["data"])
    for axes, ((data,), members) in zip(
        figure.subplots(1, len(by_data), squeeze=False)[0], by_data.items(), strict=True
    ):
        for i, ((method,), of_method) in enumerate(study.group(members, ["method"]).items()):
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
            study.error_bars(axes, of_method, "flips", "accuracy", label=method, **style)
        axes.set(title=data, xlabel="share of flipped labels", ylabel="accuracy on right labels")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    return figure


STUDY = study.Study("comparison", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
