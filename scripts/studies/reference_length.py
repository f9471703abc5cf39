"""
How far do ddro and rdro go when the reference is not the mixture that they assume, and how does that depend on length?

Completions of L tokens come from two Markov chains, p+ and p-, that differ a little in their next-token probabilities,
and both together from a base chain, as texts differ from what a model would write. The policy is any chain, so that p+
can be said exactly, and the loss of 2,048 pairs is minimised by LBFGS. The reference is the exact mixture of the two,
a chain that was fitted to both classes (SFT: a chain cannot hold a mixture of two), or the untouched base. Measured:
the share of the way from where the policy starts to p+, in KL per token on what p+ says, and log N, 0 for the mixture.

    python scripts/studies/reference_length.py --size small
"""

import math
from pathlib import Path
from typing import Any

import study
import torch
from minimisers import minimise

from trl_rdro import losses


TOKENS = 8
TILT = 0.15  # of the next-token logits, by which p+ and p- differ from their mean
SHIFT = 0.3  # by which that differs from the base
PAIRS = 2048
METHODS = ["rdro", "rdro, alpha 0.01", "ddro", "sft"]
REFERENCES = ["exact mixture", "SFT on both", "base"]
LENGTHS = {"ci": (20, 500), "small": (5, 20, 100, 500), "full": (5, 10, 20, 50, 100, 200, 500, 1000, 2000)}
SEEDS = {"ci": 1, "small": 3, "full": 10}


def cells(size: str) -> list[dict[str, Any]]:
    return [
        {"reference": reference, "method": method, "length": length, "seed": seed}
        for length in LENGTHS[size]
        for seed in range(SEEDS[size])
        for reference in REFERENCES
        for method in METHODS
        if (size, method) != ("ci", "rdro, alpha 0.01")
    ]


def chains(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of base, p+ and p-, `(tokens, tokens)` each: of the next token after each."""
    generator = torch.Generator().manual_seed(seed)
    base, shift, tilt = torch.randn(3, TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    data = base + SHIFT * shift
    plus, minus = data + TILT * tilt, data - TILT * tilt
    return base.log_softmax(dim=1), plus.log_softmax(dim=1), minus.log_softmax(dim=1)


def counts(log_chain: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """How often each token followed each other in completions of the chain, `(pairs, tokens^2)`. They begin after a
    token drawn at random."""
    token = torch.randint(TOKENS, (PAIRS,), generator=generator)
    result = torch.zeros(PAIRS, TOKENS * TOKENS, dtype=torch.float64)
    for _ in range(length):
        following = torch.multinomial(log_chain.exp()[token], 1, generator=generator)[:, 0]
        result[torch.arange(PAIRS), token * TOKENS + following] += 1
        token = following
    return result


def divergence(log_chain: torch.Tensor, log_policy: torch.Tensor) -> float:
    """KL(chain || policy) per token, in the long run."""
    state = torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64)
    for _ in range(500):
        state = state @ log_chain.exp()
    return float((state[:, None] * log_chain.exp() * (log_chain - log_policy)).sum())


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    base, plus, minus = chains(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    chosen, rejected = (counts(chain, cell["length"], generator) for chain in (plus, minus))
    completions = torch.cat([chosen, rejected])
    preferred = torch.arange(2 * PAIRS) < PAIRS
    fitted = (completions.sum(dim=0) + 0.5).view(TOKENS, TOKENS).log().log_softmax(dim=1)
    start = base if cell["reference"] == "base" else fitted
    ref_logps = completions @ start.flatten()
    if cell["reference"] == "exact mixture":
        ref_logps = torch.logaddexp(completions @ plus.flatten(), completions @ minus.flatten()) - math.log(2)

    def logratios(policy: torch.Tensor) -> torch.Tensor:
        return completions @ policy.log_softmax(dim=1).flatten() - ref_logps

    def objective(policy: torch.Tensor) -> torch.Tensor:
        z = logratios(policy)
        if cell["method"] == "sft":
            return -z[:PAIRS].mean()
        if cell["method"] == "ddro":
            return 2 * losses.ddro_loss(z, preferred).mean()
        return 2 * losses.rdro_loss(z, preferred, 0.01 if "alpha" in cell["method"] else 0.5).mean()

    policy = minimise(objective, start, max_iter=500, tolerance_change=1e-12)
    with torch.no_grad():
        z = logratios(policy)
    weights = torch.ones(2 * PAIRS, dtype=torch.float64)
    log_n, error = losses.log_normalisation(tuple(losses.normalisation_sums(z.float(), weights).tolist()))
    before, after = divergence(plus, start), divergence(plus, policy.log_softmax(dim=1))
    return {
        "share": 1 - after / before,
        "log_normalisation": log_n,
        "log_normalisation_error": error,
        "chosen": float(z[:PAIRS].mean()),
        "rejected": float(z[PAIRS:].mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Share of the way and log N, by length."""
    lengths = list(study.group(rows, ["length"]))
    lines = []
    for (reference, method), members in study.group(rows, ["reference", "method"]).items():
        by_length = study.group(members, ["length"])
        figures = [study.cell_text(by_length[length], "share", ".2f") for length in lengths]
        log_n = study.cell_text(by_length[lengths[-1]], "log_normalisation", "+.2f")
        lines.append([reference, method, *figures, log_n])
    lengths_text = [f"{length[0]} tokens" for length in lengths]
    header = ["reference", "method", *lengths_text, f"log N at {lengths[-1][0]}"]
    return "Share of the way to p+: 1 is p+, 0 where the policy began.\n\n" + study.markdown(header, lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(REFERENCES), 3.6), layout="constrained")
    for axes, reference in zip(figure.subplots(1, len(REFERENCES), sharey=True), REFERENCES, strict=True):
        members = [row for row in rows if row["reference"] == reference]
        for (method,), curve in study.group(members, ["method"]).items():
            study.error_bars(axes, curve, "length", "share", label=method, color=f"C{METHODS.index(method)}")
        axes.set(xscale="log", title=f"reference: {reference}", xlabel="tokens of a completion", ylim=(-0.1, 1.1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("share of the way to p+")
    return figure


STUDY = study.Study("reference_length", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
