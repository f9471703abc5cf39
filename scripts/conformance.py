"""
The tables of docs/conformance.md: each loss as its paper has it, as the code released with it computes it, and as it
is here; and by how much they differ on the same numbers. `scripts/docs.py` writes them.

What is said of released code is a description; none of that code is here or was run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch

from trl_rdro import losses
from trl_rdro.losses.types import LOSS_TYPES


ROOT = Path(__file__).resolve().parents[1]
FIRST_HAND, SECOND_HAND = "first hand", "second hand"
NOT_READ = "not looked at"


@dataclass(frozen=True)
class Conformance:
    """What a loss is in its paper, in the code released with it, and here; why; and where our knowledge is from."""

    paper: str
    released: str
    ours: str
    why: str
    known: str = FIRST_HAND


CONFORMANCE = {
    "ddro": Conformance(
        "logistic Bregman divergence, valid for r < 1/t",
        NOT_READ,
        "the same up to r = cap/t, its tangents beyond",
        "the pole at 1/t ends a run that meets it",
    ),
    "rdro": Conformance(
        "E₊[...] + E₋[...]",
        "one mean over both classes, π E₊ + (1−π) E₋ ([factor](#rdro-pooled-classes))",
        "each class by 1/π or 1/(1−π), π of the training set",
        "the pooled mean has another minimiser than p₊ unless π = ½",
    ),
    "kldpo": Conformance(
        "Algorithm 2: weights exp((l − mean l)/τ), normalised over the batch",
        "not normalised, clamped at 10, mean over ranks, accumulation unseen ([factor](#kldpo-weights-without-a-sum))",
        "softmax(l/τ) over the optimiser step, ranks and accumulation included",
        "the objective is τ log mean exp(l/τ), whatever the split",
    ),
    "wdpo": Conformance(
        "Algorithm 1: ρ √(mean ‖g‖²)",
        "ρ mean ‖g‖², no root ([factor](#wdpo-the-missing-root)); the prompt's gradient once for each completion",
        "both; without the root unless `wdpo_penalty: rms`; the prompt as the code has it",
        "the published ρ are those of the code",
    ),
    "drdpo": Conformance(
        "−b log mean exp(−l/b) over the batch",
        "authors' code not looked at; ports take the local micro-batch ([factor](#drdpo-over-a-micro-batch))",
        "over the optimiser step; a step of one pair is refused",
        "with micro-batches of one it would be DPO",
    ),
    "grdpo": Conformance(
        "a_g ← a_g exp(η mean_g l), normalised",
        "η of 5e-7, multiplied by N ([factor](#grdpo-the-step-of-the-groups))",
        "η per unit of mean loss; groups that were not drawn keep their weight",
        "a number that means the same for every N; rare groups do not fade",
    ),
    "cdpo": Conformance(
        "(1−ε) l(u) + ε l(−u)",
        "TRL 1.16's `sigmoid` ignores `label_smoothing`",
        "the paper's",
        "",
    ),
    "holder": Conformance("γ s^(1+γ) − (1+γ) s^γ", NOT_READ, "the paper's", ""),
    "ropo": Conformance(
        "4α/(1+α)² l(u) + 4α²/(1+α)² σ(−u), with filtering and resampling of pairs",
        NOT_READ,
        "the loss alone; α 14 at second hand",
        "filtering is a matter of data",
        SECOND_HAND,
    ),
    "repo": Conformance(
        "EM: η moves to the mean posterior",
        NOT_READ,
        "one move each optimiser step, from all its pairs; one η per annotator",
        "the same for every split of a step",
    ),
    "chipo": Conformance("l(clip(β[φ(z_w) − φ(z_l)], ±2R))", NOT_READ, "the paper's, e^z up to z = 88", "float32"),
    "dpop": Conformance(
        "the penalty inside the sigmoid",
        "ports differ on where it stands ([factor](#dpop-where-the-penalty-stands))",
        "inside; λ 50 at second hand",
        "as in the paper",
        SECOND_HAND,
    ),
    "minor": Conformance("l(β(z_w − max(0, z_l)))", NOT_READ, "the paper's", ""),
    "adadpo": Conformance(
        "a minimum over τ for each pair",
        "options of the authors' script; its solver not looked at",
        "the minimum in closed form, τ = abs(u)/v",
        "v is the same for all pairs",
    ),
    "gdpo": Conformance("l((2p−1) u)", NOT_READ, "the paper's", ""),
    "dpopro": Conformance(
        "the worst label of a χ² ball",
        NOT_READ,
        "the worst label within [0, 1]",
        "checked against a grid",
        SECOND_HAND,
    ),
    "mrpo": Conformance(
        "1/π = a/π₂ + (1−a)/π₁",
        "a weighs 1/π₁; the clip is shared out between chosen and rejected ([factor](#mrpo-whose-weight-is-a))",
        "the paper's; log π₂ within ±10 % of log π₁",
        "the paper's formula says whose weight it is",
    ),
}

# The same 64 pairs in every table: quantiles of h ~ N(5, 20²) nats, in an order that mixes them
PAIRS = 64
MARGINS = torch.tensor([5 + 20 * NormalDist().inv_cdf((29 * i % PAIRS + 0.5) / PAIRS) for i in range(PAIRS)]).double()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def overview() -> str:
    rows = []
    for name, loss in LOSS_TYPES.items():
        entry, paper = CONFORMANCE[name], loss.paper["id"]
        link = f"[{paper}](https://huggingface.co/papers/{paper})"
        rows.append([f"`{name}`", f"{entry.paper} ({link})", entry.released, entry.ours, entry.why, entry.known])
    return markdown(["loss", "paper", "released code", "here", "why", "known"], rows)


def pair_losses(beta: float) -> torch.Tensor:
    return losses.sigmoid_loss(MARGINS, torch.zeros_like(MARGINS), beta)


# rdro


ANSWERS = 40


def rdro_table() -> str:
    """KL(p+ || policy) at the optimum of either mean, over all policies on 40 answers."""
    rows = []
    for share in (0.5, 0.39, 0.2, 0.8):
        p_plus, _ = two_distributions()
        kl = [
            (p_plus @ (p_plus.log() - rdro_policy(share, weights))).abs().item()
            for weights in ((share, 1 - share), (1.0, 1.0))
        ]
        rows.append([f"{share:g}", f"{share:g} : {1 - share:g}", *(f"{value:.3f}" for value in kl)])
    return markdown(["π = α", "weight of E₊ : E₋ in the pooled mean (here 1 : 1)", "KL, pooled", "KL, here"], rows)


def two_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """p+ and p-."""
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / ANSWERS) for i in range(ANSWERS)]).double()
    return (1.5 * quantiles).softmax(0), (-1.5 * quantiles[torch.arange(ANSWERS) * 7 % ANSWERS]).softmax(0)


def rdro_policy(share: float, weights: tuple[float, float]) -> torch.Tensor:
    """The log-probabilities of the optimum where the two expectations have these weights."""
    p_plus, p_minus = two_distributions()
    log_reference = (share * p_plus + (1 - share) * p_minus).log()
    preferred = torch.ones(ANSWERS, dtype=torch.bool)
    logits = log_reference.clone().requires_grad_()
    limits = {"max_iter": 2000, "tolerance_grad": 1e-12, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([logits], history_size=40, line_search_fn="strong_wolfe", **limits)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        z = logits.log_softmax(0) - log_reference
        value = weights[0] * p_plus @ losses.rdro_loss(z, preferred, share)
        value = value + weights[1] * p_minus @ losses.rdro_loss(z, ~preferred, share)
        value.backward()
        return value

    optimizer.step(objective)
    return logits.detach().log_softmax(0)


# kldpo


def kldpo_table() -> str:
    rows = []
    for beta, taus in ((0.01, (0.05, 0.01, 0.005)), (0.1, (1.0, 0.5, 0.1))):
        values = pair_losses(beta)
        for tau in taus:
            released, ours = released_kldpo_weights(values, tau), losses.kldpo_log_weights(values, tau).exp()
            figures = [released.mean().item(), released.max().item(), ours.max().item()]
            clamped = f"{(released == 10).double().mean():.0%}"
            size = f"{1 / ours.square().mean():.0%}"
            rows.append([f"{beta:g}", f"{tau:g}", *(f"{figure:.2f}" for figure in figures), clamped, size])
    return markdown(
        [
            "β",
            "τ",
            "mean weight, released",
            "largest, released",
            "largest, here",
            "clamped",
            "effective sample size, here",
        ],
        rows,
    )


def released_kldpo_weights(values: torch.Tensor, tau: float) -> torch.Tensor:
    return ((values - values.mean()) / tau).exp().clamp(max=10)


# wdpo


def wdpo_table() -> str:
    rows = []
    for size in (0.003, 0.03, 0.3, 3.0):
        norms = size * torch.tensor([0.5, 1.0, 1.5]).double()
        penalties, gradients = [], []
        for penalty in ("squared", "rms"):
            variable = norms.clone().requires_grad_()
            value = losses.wdpo_penalty(variable, 1.0, penalty).mean()
            penalties.append(value.item())
            gradients.append(torch.autograd.grad(value, variable)[0].norm().item())
        ratios = [penalties[0] / penalties[1], gradients[0] / gradients[1]]
        rows.append([f"{size:g}", *(f"{ratio:.2g}" for ratio in ratios)])
    return markdown(["typical ‖g‖", "penalty without the root / with it", "its gradient without / with"], rows)


# drdpo


def drdpo_table() -> str:
    b, values = 1.0, pair_losses(0.1)
    whole, rows = torch.softmax(-values / b, 0), []
    for size in (1, 2, 8, PAIRS):
        weights = torch.softmax(-values.view(-1, size) / b, 1).flatten() * size / PAIRS
        error = (weights - whole).norm() / (whole - 1 / PAIRS).norm()
        sample = 1 / (PAIRS * weights.square().sum())
        rows.append([str(size), f"{1 - error:.0%}" if size > 1 else "0% (DPO)", f"{sample:.0%}"])
    return markdown(
        ["pairs in the mean", "of the way from DPO's weights to those of the step", "effective sample size"], rows
    )


# grdpo


def grdpo_table() -> str:
    rows = []
    for number in (1_000, 10_000, 100_000):
        rows.append([f"{number:,}", f"{5e-7 * number:g}", f"{math.exp(5e-7 * number * math.log(2)):.4f}"])
    return markdown(
        ["N, training pairs", "theirs as `grdpo_eta`", "factor of a group's weight a step, at mean loss log 2"], rows
    )


# dpop


def dpop_table() -> str:
    beta, penalty, rows = 0.1, 50.0, []
    for z in (0.1, -0.1, -1.0, -5.0):
        chosen = torch.tensor([z], dtype=torch.float64, requires_grad=True)
        rejected = torch.tensor([-5.0], dtype=torch.float64)
        inside = losses.dpop_loss(chosen, rejected, beta, penalty)
        outside = losses.sigmoid_loss(chosen, rejected, beta) + penalty * torch.relu(-chosen)
        slopes = [torch.autograd.grad(value.sum(), chosen)[0].item() for value in (inside, outside)]
        rows.append([f"{z:g}", *(f"{slope:.2f}" for slope in slopes)])
    return markdown(["z of the chosen completion", "slope in it, inside", "outside"], rows)


# mrpo


def mrpo_table() -> str:
    own, other = torch.tensor([[-20.0], [-22.0]]).double(), torch.tensor([[-21.0], [-20.5]]).double()
    rows = []
    for alpha in (0.0, 0.1, 0.5, 0.9, 1.0):
        margins = [losses.mrpo_reference(own, other, a) for a in (alpha, 1 - alpha)]
        rows.append([f"{alpha:g}", *(f"{(margin[0] - margin[1]).item():+.2f}" for margin in margins)])
    return markdown(["a", "the reference's margin, here", "with a at the other one"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "rdro": rdro_table,
    "kldpo": kldpo_table,
    "wdpo": wdpo_table,
    "drdpo": drdpo_table,
    "grdpo": grdpo_table,
    "dpop": dpop_table,
    "mrpo": mrpo_table,
}
