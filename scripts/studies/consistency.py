"""
Does training converge to p+, the distribution of preferred completions, as the data grow?

Over a language of 36 completions (language.py) whose preferences are partly cyclic, each loss's exact minimiser over
all policies is found (minimisers.py) for many draws of n pairs, of n labelled completions of which a fraction pi is
preferred, and of n labelled completions of three prompts whose fractions differ. The reference model is the mixture
pi p+ + (1 - pi) p- of each prompt: the true one ("exact"), or that of the same completions ("fitted"). "pooled" are
ddro and rdro without class weights; "sft" is fine-tuning on the preferred completions. Completions are counted with
half a one more per class, so that none has probability 0. Losses of margins have a limit that they
reach with endless data.

A few policies are also trained, by the trainers, to see that they arrive at the minimiser: `trained` cells.

    python scripts/studies/consistency.py --size small --workers 2
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import study
import torch
from language import (
    OUTCOMES,
    TOKENS,
    Language,
    cyclic_language,
    distances,
    exact_model,
    paired_dataset,
    tokenizer,
    unpaired_dataset,
)
from minimisers import Loss, divergence, margin_minimiser, minimiser

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, losses


METHODS = ("rdro", "ddro")
SHARES = (0.15, 0.4, 0.65)  # of preferred completions, by prompt
# The beta that brings the policy a loss of margins aims at closest to p+
LIMITS = {"dpo, beta 3": ("sigmoid", 3.0), "ipo, beta 1.5": ("ipo", 1.5)}
BATCH, PASSES = 256, 20  # of trained policies


def cells(size: str) -> list[dict[str, Any]]:
    draws = {"ci": 8, "small": 50, "full": 400}[size]
    ns = {"ci": [1000, 10_000]}.get(size, [300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000])
    kinds = [
        *(
            ("pairs", method, pi)
            for method in (*METHODS, "sft")
            for pi in ((0.2, 0.5, 0.8) if method != "sft" else (0.5,))
        ),
        *(("labels", method, pi) for method in (*METHODS, "sft") for pi in (0.2, 0.39, 0.8)),
        *(("labels", f"{method}, pooled", pi) for method in METHODS for pi in (0.2, 0.39, 0.8)),
        *(("prompts", f"{method}, {alpha}", 0.4) for method in METHODS for alpha in ("one alpha", "alpha per prompt")),
    ]
    exact = [
        {"data": data, "method": method, "pi": pi, "reference": reference, "n": n, "draws": draws}
        for data, method, pi in kinds
        for reference in (["exact", "fitted"] if method in METHODS else ["exact"])
        for n in ns
    ]
    seeds, trained_ns = {"ci": (1, [2000]), "small": (3, [3000, 10_000]), "full": (10, [3000, 10_000, 100_000])}[size]
    trained = [
        {
            "data": data,
            "method": method,
            "pi": pi,
            "reference": "exact",
            "n": n,
            "draws": 1,
            "seed": seed,
            "trained": True,
        }
        for data, pi in (("pairs", 0.5), ("labels", 0.39))
        for method in (METHODS if size != "ci" else ["rdro"])
        for n in trained_ns
        for seed in range(seeds)
    ]
    return exact + trained


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    language = cyclic_language()
    rng = np.random.default_rng([cell.get("seed", 0), cell["n"]])
    if cell.get("trained"):
        return run_trained(cell, language, rng)
    kl = divergences(cell, language, rng)
    spread = 1 / math.sqrt(len(kl))
    return {
        "kl": kl.mean().item(),
        "kl_error": kl.std().item() * spread,
        "log_kl": kl.log().mean().item(),
        "log_kl_error": kl.log().std().item() * spread,
    }


def divergences(cell: dict[str, Any], language: Language, rng: np.random.Generator) -> torch.Tensor:
    """KL(p+ || minimiser) of every draw, `(draws,)`; of several prompts their mean."""
    p_plus, p_minus = (torch.tensor(p) for p in (language.p_plus, language.p_minus))
    method, *variant = cell["method"].split(", ")
    shares = SHARES if cell["data"] == "prompts" else (cell["pi"],)
    fraction = sum(shares) / len(shares)
    results = []
    for share in shares:
        n_plus = n_minus = cell["n"]
        if cell["data"] != "pairs":
            n_plus = round(share * cell["n"] / len(shares))
            n_minus = round(cell["n"] / len(shares)) - n_plus
        counts = (
            torch.tensor(rng.multinomial(n, p, size=cell["draws"]) + 0.5)
            for n, p in ((n_plus, language.p_plus), (n_minus, language.p_minus))
        )
        plus, minus = (count / count.sum(dim=1, keepdim=True) for count in counts)  # each class's estimate
        if method == "sft":
            results.append(divergence(p_plus, plus.log()))
            continue
        reference = share * p_plus + (1 - share) * p_minus
        if cell["reference"] == "fitted":
            reference = share * plus + (1 - share) * minus
        if variant == ["pooled"]:
            plus, minus = share * plus, (1 - share) * minus
        elif variant == ["one alpha"]:  # the class weights of the whole data set on a prompt with another share
            plus, minus = share / fraction * plus, (1 - share) / (1 - fraction) * minus
        parameter = fraction if variant == ["one alpha"] else share
        results.append(divergence(p_plus, minimiser(loss_at(method, parameter), plus, minus, reference)))
    return torch.stack(results).mean(dim=0)


def loss_at(method: str, fraction: float) -> Loss:
    """The loss at its parameter: the preferred share of the reference."""
    return {"rdro": partial(losses.rdro_loss, alpha=fraction), "ddro": partial(losses.ddro_loss, t=fraction)}[method]


def run_trained(cell: dict[str, Any], language: Language, rng: np.random.Generator) -> dict[str, float]:
    """KL(p+ || policy) of a trained policy and of the minimiser on the same completions, and their ratio."""
    method, pi, n = cell["method"], cell["pi"], cell["n"]
    options = {"rdro": {"rdro_alpha": pi}, "ddro": {"ddro_t": pi}}[method]
    if cell["data"] == "pairs":
        chosen, rejected = language.pairs(n, rng)
        dataset, trainer_class, config_class = paired_dataset(chosen, rejected), DPOTrainer, DPOConfig
    else:
        completions, labels = language.labelled(n, pi, rng)
        chosen, rejected = completions[labels], completions[~labels]
        dataset, trainer_class, config_class = unpaired_dataset(completions, labels), KTOTrainer, KTOConfig
    mixture = pi * language.p_plus + (1 - pi) * language.p_minus
    plus, minus = (torch.tensor(np.bincount(seen, minlength=OUTCOMES) / len(seen)) for seen in (chosen, rejected))
    best = minimiser(loss_at(method, pi), plus.unsqueeze(0), minus.unsqueeze(0), torch.tensor(mixture))
    least = divergence(torch.tensor(language.p_plus), best).item()

    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_class(
            exact_model(mixture),
            exact_model(mixture),
            config_class(
                output_dir=output_dir,
                num_train_epochs=PASSES,
                per_device_train_batch_size=BATCH,
                learning_rate=0.02,
                lr_scheduler_type="linear",
                adam_beta2=0.98,
                max_grad_norm=10.0,
                seed=cell["seed"],
                loss_type=method,
                **study.TINY_RUN,
                **options,
            ),
            train_dataset=dataset.shuffle(seed=cell["seed"]),
            processing_class=tokenizer(),
        )
        study.train(trainer)
    kl = distances(language.p_plus, trainer.model)["kl"]
    return {"kl": kl, "kl_minimiser": least, "ratio": kl / least}


def limit(loss_type: str, beta: float) -> float:
    """KL(p+ || policy) of the policy that minimises a loss of margins over all pairs of the language: what endless
    data lead to."""
    language = cyclic_language()
    base = torch.tensor(language.base)
    wins = base * base.unsqueeze(1) * torch.tensor(language.preference)  # of chosen over rejected
    tokens = TOKENS if loss_type == "ipo" else 1  # as TRL's, of log-ratios per token
    loss = {"ipo": losses.ipo_loss, "sigmoid": losses.sigmoid_loss}[loss_type]
    policy = margin_minimiser(lambda chosen, rejected: loss(chosen / tokens, rejected / tokens, beta), wins, base)
    return divergence(torch.tensor(language.p_plus), policy).item()


def slope(rows: list[dict[str, Any]], least_n: int = 1000) -> tuple[float, float]:
    """Of log KL against log n, by weighted least squares, and half its 95 % interval: -1 is the rate 1/n."""
    rows = [row for row in rows if row["n"] >= least_n]
    x = np.log([row["n"] for row in rows])
    y = np.array([row["log_kl"] for row in rows])
    weights = np.array([row["log_kl_error"] for row in rows]) ** -2.0
    centred = x - np.average(x, weights=weights)
    precision = (weights * centred**2).sum()
    return float((weights * centred * y).sum() / precision), float(1.96 / math.sqrt(precision))


def table(rows: list[dict[str, Any]]) -> str:
    exact = [row for row in rows if not row.get("trained")]
    lines = []
    for (data, pi, method, reference), curve in study.group(exact, ["data", "pi", "method", "reference"]).items():
        rate, half = slope(curve)
        ends = [f"{row['kl']:.3g} ± {row['kl_error']:.1g}" for row in (curve[0], curve[-1])]
        times_n = f"{curve[-1]['n'] * curve[-1]['kl']:.3g}" if rate < -0.9 else ""  # a constant at the rate 1/n
        shares = " / ".join(map(str, SHARES)) if data == "prompts" else f"{pi}"
        lines.append([data, shares, method, reference, *ends, times_n, f"{rate:.3f} ± {half:.3f}"])
    least, most = min(row["n"] for row in exact), max(row["n"] for row in exact)
    header = [
        "data",
        "pi",
        "method",
        "reference",
        f"KL at n = {least:,}",
        f"KL at n = {most:,}",
        "n KL there",
        "slope",
    ]
    limits = ", ".join(f"{name}: {limit(*setting):.4f}" for name, setting in LIMITS.items())

    trained = [row for row in rows if row.get("trained")]
    trained_lines = [
        [data, str(pi), method, f"{n:,}", *(study.cell_text(members, name, ".3g") for name in ("kl", "ratio"))]
        for (data, pi, method, n), members in study.group(trained, ["data", "pi", "method", "n"]).items()
    ]
    return (
        f"KL(p+ || minimiser), in nats: mean over {exact[0]['draws']} draws ± its standard error; slope of log KL "
        "against log n from n = 1,000 with its 95 % interval (-1: the rate 1/n).\n\n"
        + study.markdown(header, lines)
        + f"\nLimits of losses of margins, at the beta that suits this language best: {limits}.\n\n"
        "Policies trained by the trainers, against the minimiser on the same completions (ratio 1: they reach it).\n\n"
        + study.markdown(
            ["data", "pi", "method", "n", "KL(p+ || policy)", "ratio to the minimiser's KL"], trained_lines
        )
    )


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    panels = [("pairs", 0.5), ("labels", 0.2), ("labels", 0.8), ("prompts", 0.4)]
    titles = ["pairs", "labels, 20 % preferred", "labels, 80 % preferred", "labels, three prompts: 15, 40, 65 %"]
    figure = Figure(figsize=(4.0 * len(panels), 3.8), layout="constrained")
    exact = [row for row in rows if not row.get("trained") and row["reference"] == "exact"]
    for axes, panel, title in zip(figure.subplots(1, len(panels), sharey=True), panels, titles, strict=True):
        members = [row for row in exact if (row["data"], row["pi"]) == panel]
        for (method,), curve in study.group(members, ["method"]).items():
            name, *variant = method.split(", ")
            colour = {"rdro": "C0", "ddro": "C1", "sft": "black"}[name]
            dashed = "--" if variant in (["pooled"], ["one alpha"]) else "-"
            label = "sft, and all three with a fitted reference" if name == "sft" else method
            errors = [1.96 * row["kl_error"] for row in curve]
            axes.errorbar(
                [row["n"] for row in curve],
                [row["kl"] for row in curve],
                errors,
                marker="o",
                markersize=3,
                color=colour,
                linewidth=4 if method == "rdro" else 1.5,  # ddro lies on it
                alpha=0.5 if method == "rdro" else 1,
                linestyle=dashed,
                label=label,
            )
        if panel[0] == "pairs":
            for i, (name, setting) in enumerate(LIMITS.items()):
                axes.axhline(limit(*setting), color=f"C{i + 2}", linestyle=":", label=f"{name}: limit")
        axes.set(xscale="log", yscale="log", title=title, xlabel="completions, n")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.axes[0].set_ylabel("KL(p+ || minimiser), nats")
    return figure


STUDY = study.Study("consistency", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
