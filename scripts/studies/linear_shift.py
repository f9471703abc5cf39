"""
Do kldpo and wdpo keep their promise, and is it more than a smaller model?

A linear reward over ten features, where everything promised can be computed. A minority of 15 % of the labellers wants
other things than the majority; all losses are minimised exactly (the package's loss functions, LBFGS) on 2,000 pairs
and measured on 20,000 others, with labels that are noisy (Bradley-Terry) or not:

    mean                   the DPO loss, beta 1
    ball_0.1, ball_0.5     the worst mean loss over a KL ball of that radius around the pairs: kldpo's promise
    moved                  the mean loss when an adversary moves each pair's features by 0.5: wdpo's promise
    minority, accuracy     the minority's loss, and its accuracy

A robust loss gives smaller margins, and smaller margins alone improve a worst case. So each is compared with plain DPO
of the same draw, and with two controls that shrink DPO until it has the robust loss's mean loss: DPO's solution scaled
down (which is also what a larger beta does in a linear model), and gradient descent on DPO stopped early.

    python scripts/studies/linear_shift.py --size small
"""

import bisect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import study
import torch
from minimisers import minimise
from paired import holm, t_test

from trl_rdro.losses import kldpo_loss, sigmoid_loss, wdpo_penalty


METHODS = {"kldpo": ("tau", (5.0, 1.0, 0.5, 0.2)), "wdpo": ("rho", (0.05, 0.3, 1.0))}
FEATURES, MINORITY = 10, 0.15
MEASURES = ("ball_0.1", "ball_0.5", "moved", "minority", "accuracy")
CONTROLS = ("dpo", "scaled", "stopped")
RIDGE = 1e-4  # keeps a minimiser where labels have no noise
MOVE = 0.5
STEPS, RATE = 4000, 0.05  # of gradient descent


def cells(size: str) -> list[dict[str, Any]]:
    draws = {"ci": 1, "small": 20, "full": 100}[size]
    return [
        {"labels": labels, "method": method, "value": value, "seed": seed}
        for labels in ("noisy", "noise-free")
        for method, (_, values) in METHODS.items()
        for value in (values if size != "ci" else values[1:2])
        for seed in range(draws)
    ]


def pairs(n: int, labels: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the chosen less those of the rejected, `(n, 10)`, and whether a pair is the minority's, `(n,)`."""
    wanted = torch.zeros(2, FEATURES, dtype=torch.float64)
    wanted[0, :4] = 2.0
    wanted[1, :6] = torch.tensor([-1.0, -1.0, 2.0, 2.0, 3.0, 3.0])
    difference = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    is_minority = torch.rand(n, generator=generator) < MINORITY
    margin = torch.where(is_minority, difference @ wanted[1], difference @ wanted[0])
    threshold = torch.rand(n, generator=generator, dtype=torch.float64) if labels == "noisy" else 0.5
    first_wins = margin.sigmoid() > threshold
    return torch.where(first_wins.unsqueeze(1), difference, -difference), is_minority


def dpo(margins: torch.Tensor) -> torch.Tensor:
    return sigmoid_loss(margins, torch.zeros_like(margins), beta=1.0)


def objective(method: str, value: float, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def robust(theta: torch.Tensor) -> torch.Tensor:
        margins = x @ theta
        losses = dpo(margins)
        if method == "kldpo":
            losses = kldpo_loss(losses, value)
        elif method == "wdpo":  # the gradient to the features of the chosen and of the rejected completion
            losses = losses + wdpo_penalty(torch.sigmoid(-margins) * 2**0.5 * theta.norm(), value)
        return losses.mean() + RIDGE * theta @ theta

    return robust


def optimum(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    # Not from 0, where the norm in wdpo's penalty has no gradient
    start = torch.full((FEATURES,), 0.01, dtype=torch.float64)
    return minimise(function, start, max_iter=500, tolerance_change=1e-14)


def scaled_to(mean: float, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`theta`, the optimum, scaled down until its mean loss is `mean`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if dpo(x @ (middle * theta)).mean() > mean else (low, middle)
    return high * theta


def stopped_at(mean: float, train: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Where gradient descent on DPO from 0 first has a mean loss of at most `mean`; else its end."""
    path = [torch.zeros(FEATURES, dtype=torch.float64)]
    for _ in range(STEPS):
        theta = path[-1]
        path.append(theta + RATE * (torch.sigmoid(-(train @ theta)) @ train) / len(train))
    first = bisect.bisect_left(path, -mean, key=lambda theta: -dpo(x @ theta).mean().item())
    return path[min(first, STEPS)]


def worst_in_ball(losses: torch.Tensor, radii: tuple[float, ...]) -> torch.Tensor:
    """sup of the mean loss over all weightings within a KL divergence of each radius: min over tau of its dual."""
    taus = torch.logspace(-3, 3, 300, dtype=losses.dtype)
    values = taus * (torch.logsumexp(losses / taus.unsqueeze(1), dim=1) - math.log(len(losses)))  # kldpo's objective
    return torch.stack([(taus * radius + values).min() for radius in radii])


def measures(theta: torch.Tensor, x: torch.Tensor, is_minority: torch.Tensor) -> dict[str, float]:
    margins = x @ theta
    losses = dpo(margins)
    small_ball, large_ball = worst_in_ball(losses, (0.1, 0.5))
    values = {
        "mean": losses.mean(),
        "ball_0.1": small_ball,
        "ball_0.5": large_ball,
        "moved": dpo(margins - MOVE * theta.norm()).mean(),  # exact for a linear margin
        "minority": losses[is_minority].mean(),
        "accuracy": (margins[is_minority] > 0).double().mean(),
    }
    return {name: value.item() for name, value in values.items()}


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    generator = torch.Generator().manual_seed(cell["seed"])
    train, _ = pairs(2_000, cell["labels"], generator)
    x, is_minority = pairs(20_000, cell["labels"], generator)
    plain = optimum(objective("dpo", 0.0, train))
    robust = optimum(objective(cell["method"], cell["value"], train))
    result = measures(robust, x, is_minority)
    others = {
        "dpo": plain,
        "scaled": scaled_to(result["mean"], plain, x),
        "stopped": stopped_at(result["mean"], train, x),
    }
    controls = {name: measures(theta, x, is_minority) for name, theta in others.items()}
    differences = {
        f"{measure}_less_{name}": result[measure] - control[measure]
        for name, control in controls.items()
        for measure in ("mean", *MEASURES)
    }
    return {**result, **differences}


def table(rows: list[dict[str, Any]]) -> str:
    text = []
    for control, what in (
        ("dpo", "DPO of the same draw"),
        ("scaled", "DPO scaled to the same mean loss (in a linear model: DPO with a larger beta)"),
        ("stopped", "DPO stopped at the same mean loss"),
    ):
        groups = study.group(rows, ["labels", "method", "value"])
        values = {
            (key, measure): [row[f"{measure}_less_{control}"] for row in members]
            for key, members in groups.items()
            for measure in MEASURES
        }
        adjusted = holm([t_test(numbers) if len(numbers) > 1 else 1.0 for numbers in values.values()])
        p_values = dict(zip(values, adjusted, strict=True))
        lines = []
        for key, members in groups.items():
            labels, method, value = key
            line = [labels, f"{method}, {METHODS[method][0]} {value:g}"]
            for measure in MEASURES:
                star = "\\*" if p_values[key, measure] < 0.05 else ""
                line.append(study.cell_text(members, f"{measure}_less_{control}", "+.3f") + star)
            lines.append(line)
        text.append(
            f"Less {what}; \\*: p < .05 after Holm's correction over this table.\n\n"
            + study.markdown(["labels", "method", *map(TITLES.get, MEASURES)], lines)
        )
    return "\n".join(text)


TITLES = {
    "ball_0.1": "worst in KL ball .1",
    "ball_0.5": "worst in KL ball .5",
    "moved": f"features moved by {MOVE:g}",
    "minority": "minority's loss",
    "accuracy": "minority's accuracy",
}


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(MEASURES), 6.4), layout="constrained")
    for axes_row, labels in zip(figure.subplots(2, len(MEASURES)), ("noisy", "noise-free"), strict=True):
        for axes, measure in zip(axes_row, MEASURES, strict=True):
            members = [row for row in rows if row["labels"] == labels]
            groups = study.group(members, ["method", "value"])
            for i, control in enumerate(CONTROLS):
                for y, group in enumerate(groups.values()):
                    mean, error = study.mean_and_error(group, f"{measure}_less_{control}")
                    label = f"less {control}" if y == 0 else None
                    axes.errorbar(
                        mean, y + 0.2 * (i - 1), xerr=1.96 * (error or 0), fmt="o", ms=3, color=f"C{i}", label=label
                    )
            axes.axvline(0, color="grey", linewidth=0.8)
            axes.set_title(f"{labels}: {TITLES[measure]}", fontsize="small")
            axes.set_yticks(
                range(len(groups)), [f"{method} {value:g}" for method, value in groups], fontsize="x-small"
            )
    figure.axes[0].legend(fontsize="x-small")
    return figure


STUDY = study.Study("linear_shift", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
