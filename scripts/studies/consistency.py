"""
Does training converge to p+, the distribution of preferred completions, as the data grow?

A policy over a language of 36 completions (language.py), whose preferences are partly cyclic, is trained on n pairs or
n labelled completions with each loss, and its KL(p+ || policy) is computed exactly. The reference model is the mixture
pi p+ + (1 - pi) p-, exactly ("exact") or as a model that was fitted to the training completions would have it
("fitted": their counts plus one half). "pooled" are ddro and rdro without class weights.

    python scripts/studies/consistency.py --size small --workers 2
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import study
import torch
from language import (
    OUTCOMES,
    TOKENS,
    cyclic_language,
    distances,
    exact_model,
    paired_dataset,
    tokenizer,
    unpaired_dataset,
)

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, losses


# Losses with a beta are run at TRL's default, 0.1, and near the beta that brings the policy they aim at closest to p+
# (see `limit`).
PAIRED = {
    "rdro": {"loss_type": "rdro"},
    "ddro": {"loss_type": "ddro"},
    "sft": {"loss_type": "sft"},
    "dpo": {"loss_type": "sigmoid"},
    "dpo, beta 3": {"loss_type": "sigmoid", "beta": 3.0},
    "ipo, beta 1.5": {"loss_type": "ipo", "beta": 1.5},
    "bco_pair, beta 1": {"loss_type": "bco_pair", "beta": 1.0},
    "robust, beta 3": {"loss_type": "robust", "beta": 3.0, "label_smoothing": 0.1},
    "kldpo, beta 3": {"loss_type": "kldpo", "beta": 3.0},
    "wdpo, beta 3": {"loss_type": "wdpo", "beta": 3.0},
}
UNPAIRED = {
    "rdro": {"loss_type": "rdro"},
    "ddro": {"loss_type": "ddro"},
    "rdro, pooled": {"loss_type": "rdro", "preferred_fraction": 0.5},
    "ddro, pooled": {"loss_type": "ddro", "preferred_fraction": 0.5},
    "kto": {"loss_type": "kto"},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
MIXTURE = ("rdro", "ddro")  # what the fraction pi is a parameter of, on pairs
FITTED = ("rdro", "ddro", "rdro, pooled", "dpo, beta 3")  # also run with a fitted reference
BATCH = 256


def cells(size: str) -> list[dict[str, Any]]:
    if size == "ci":
        methods = [("pairs", "rdro", 0.5), ("pairs", "dpo", 0.5), ("labels", "rdro", 0.2)]
        return [cell(data, method, pi, "exact", 10_000, 0) for data, method, pi in methods]
    ns, seeds = {"small": ([100, 1000, 10_000], 3), "full": ([100, 1000, 10_000, 100_000], 5)}[size]
    return [
        cell(data, method, pi, reference, n, seed)
        for n in ns
        for seed in range(seeds)
        for data, methods in (("pairs", PAIRED), ("labels", UNPAIRED))
        for method in methods
        for pi in ([0.2, 0.5, 0.8] if data == "labels" or method in MIXTURE else [0.5])
        for reference in (["exact", "fitted"] if method in FITTED else ["exact"])
    ]


def cell(data: str, method: str, pi: float, reference: str, n: int, seed: int) -> dict[str, Any]:
    return {"data": data, "method": method, "pi": pi, "reference": reference, "n": n, "seed": seed}


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    language = cyclic_language()
    pi, n = cell["pi"], cell["n"]
    rng = np.random.default_rng([cell["seed"], n])
    if cell["data"] == "pairs":
        options = PAIRED[cell["method"]]
        chosen, rejected = language.pairs(n, rng)
        dataset = paired_dataset(chosen, rejected)
        seen = [(chosen, pi), (rejected, 1 - pi)]
        trainer_class, config_class = DPOTrainer, DPOConfig
    else:
        options = UNPAIRED[cell["method"]]
        completions, labels = language.labelled(n, pi, rng)
        dataset = unpaired_dataset(completions, labels)
        seen = [(completions, 1.0)]
        trainer_class, config_class = KTOTrainer, KTOConfig
    if options["loss_type"] in MIXTURE:
        options = {**options, {"rdro": "rdro_alpha", "ddro": "ddro_t"}[options["loss_type"]]: pi}

    mixture = pi * language.p_plus + (1 - pi) * language.p_minus
    if cell["reference"] == "fitted":
        mixture = sum(weight * np.bincount(outcomes, minlength=OUTCOMES) for outcomes, weight in seen) + 0.5
        mixture /= mixture.sum()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_class(
            exact_model(mixture),
            exact_model(mixture),
            config_class(
                output_dir=output_dir,
                max_steps=max(100, n // BATCH),
                per_device_train_batch_size=min(n, BATCH),
                learning_rate=0.02,
                lr_scheduler_type="linear",
                adam_beta2=0.98,
                max_grad_norm=10.0,
                seed=cell["seed"],
                **study.TINY_RUN,
                **options,
            ),
            train_dataset=dataset.shuffle(seed=cell["seed"]),
            processing_class=tokenizer(),
        )
        study.train(trainer)
    return distances(language.p_plus, trainer.model)


def limit(options: dict[str, Any]) -> float | None:
    """KL(p+ || policy) of the policy that minimises a loss of margins over all pairs of the language: the least that
    any amount of data leads to. None for other losses."""
    if options["loss_type"] not in ("sigmoid", "ipo"):
        return None
    language = cyclic_language()
    base = torch.tensor(language.base)
    weights = base * base.unsqueeze(1) * torch.tensor(language.preference)  # of chosen and rejected
    beta = options.get("beta", 0.1)
    z = torch.zeros(OUTCOMES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        chosen, rejected = z.unsqueeze(1), z
        if options["loss_type"] == "ipo":  # as TRL's, of log-ratios per token
            values = losses.ipo_loss(chosen / TOKENS, rejected / TOKENS, beta)
        else:
            values = losses.sigmoid_loss(chosen, rejected, beta)
        value = (weights * values).sum()
        value.backward()
        return value

    optimizer.step(objective)
    log_policy = (z.detach() + base.log()).log_softmax(dim=0)
    p_plus = torch.tensor(language.p_plus)
    return (p_plus * (p_plus.log() - log_policy)).sum().item()


def table(rows: list[dict[str, Any]]) -> str:
    """KL(p+ || policy) for the largest n."""
    n = max(row["n"] for row in rows)
    columns = [(pi, reference) for pi in (0.2, 0.5, 0.8) for reference in ("exact", "fitted")]
    columns = [column for column in columns if column in study.group(rows, ["pi", "reference"])]
    lines = []
    for (data, method), members in study.group(rows, ["data", "method"]).items():
        by_column = study.group(members, ["pi", "reference", "n"])
        floor = limit((PAIRED | UNPAIRED)[method])
        line = [data, method, "" if floor is None else f"{floor:.4f}"]
        for column in columns:
            figures = by_column.get((*column, n))
            line.append(study.cell_text(figures, "kl", ".4f") if figures else "")
        lines.append(line)
    header = ["data", "method", "limit", *(f"pi {pi}, {reference} reference" for pi, reference in columns)]
    return f"KL(p+ || policy) at n = {n}, in nats.\n\n" + study.markdown(header, lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    columns = [("pairs", 0.5), *(("labels", pi) for pi in (0.2, 0.5, 0.8))]
    references = list(dict.fromkeys(row["reference"] for row in rows))
    figure = Figure(figsize=(4.2 * len(columns), 3.6 * len(references)), layout="constrained")
    all_axes = figure.subplots(len(references), len(columns), squeeze=False, sharex=True, sharey=True)
    for axes_row, reference in zip(all_axes, references, strict=True):
        for axes, (data, pi) in zip(axes_row, columns, strict=True):
            members = [row for row in rows if (row["data"], row["pi"], row["reference"]) == (data, pi, reference)]
            for (method,), curve in study.group(members, ["method"]).items():
                is_pooled = method.endswith("pooled")
                colour = f"C{list(PAIRED | UNPAIRED).index(method.removesuffix(', pooled')) % 10}"
                style = {"label": method, "color": colour, "linestyle": "--" if is_pooled else "-"}
                study.error_bars(axes, curve, "n", "kl", **style)
            axes.set(xscale="log", yscale="log", title=f"{data}, pi = {pi}, {reference} reference")
            axes.set(xlabel="n", ylabel="KL(p+ || policy), nats")
            axes.grid(alpha=0.3)
            if members:
                axes.legend(fontsize="x-small", ncols=2)
    return figure


STUDY = study.Study("consistency", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
