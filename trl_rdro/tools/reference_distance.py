"""
How far a reference model is from the mixture of the data's preferred and other completions, before it is trained with
ddro or rdro, which assume that it is that mixture.

For any model q, E_data[log q - log pi_ref] <= KL(data || pi_ref), with equality where q is the data's distribution. So
the log-likelihood of held-out completions that a short supervised fine-tuning on both classes gains is a lower bound
of the distance. A model that was fitted to such data gains about nothing.

    distance = measure(load_policy("Qwen/Qwen2.5-0.5B-Instruct"), prepare(dataset, tokenizer, max_length))
    print("\n".join(report_lines(distance)))
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from ..compat import trl as trl_compat
from ..errors import UserError
from .score_figures import mean_and_error
from .scoring import Policy, PreparedRows, completion_logps


ROWS = 512  # of the data, unless more are asked for
FEWEST_ROWS = 40
FEWEST_PROMPTS = 20  # for parts that share no prompt
EPOCHS = 3
RATE = 1e-3
NEAR = 0.1  # nats a completion


def measure(policy: Policy, rows: PreparedRows, batch_size: int = 8) -> dict[str, Any]:
    """
    Fine-tune a LoRA adapter on half of the rows, stop by a quarter of them, and compare on the last quarter.

    Returns:
        `all`, `preferred`, `others` and one dict for each third of the completions by length in `by_length`: the
        number `n` of held-out completions, their mean log-probability under the reference and after the fine-tuning,
        and their `difference` with its standard error (over rows, a pair being one), all in nats a completion.

    Raises:
        `UserError`: for too few rows.
    """
    if len(rows.dataset) < FEWEST_ROWS:
        raise UserError(f"the distance of the reference needs {FEWEST_ROWS} rows, got {len(rows.dataset)}")
    fit, watched, held_out = (replace(rows, dataset=rows.dataset.select(part)) for part in _parts(rows))
    before = completion_logps(policy.model, held_out, batch_size, "reference")
    model = _fine_tuned(policy.model, fit, watched, batch_size)
    after = completion_logps(model, held_out, batch_size, "after SFT")
    names = ("chosen_ids", "rejected_ids") if rows.is_paired else ("completion_ids",)
    tokens = torch.tensor([[len(row[name]) for name in names] for row in held_out.dataset]).view(before.shape)
    preferred = torch.zeros_like(tokens, dtype=torch.bool)
    if rows.is_paired:
        preferred[:, 0] = True
    else:
        preferred = torch.tensor(held_out.dataset.with_format(None)["label"][:])
    edges = torch.quantile(tokens.double(), torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64)).tolist()
    parts = [
        (tokens >= low) & (tokens < high) for low, high in zip(edges[:-1], [*edges[1:-1], edges[-1] + 1], strict=True)
    ]
    return {
        "model": policy.name,
        "fitted_rows": len(fit.dataset),
        "all": _figures(before, after, torch.ones_like(preferred)),
        "preferred": _figures(before, after, preferred),
        "others": _figures(before, after, ~preferred),
        "by_length": [
            {
                "shortest": tokens[part].min().item(),
                "longest": tokens[part].max().item(),
                **_figures(before, after, part),
            }
            for part in parts
            if part.any()
        ],
    }


def _parts(rows: PreparedRows) -> tuple[list[int], list[int], list[int]]:
    """Rows to fit, to stop by and to compare on, which share no prompt where there are enough of them."""
    prompts = [tuple(ids) for ids in rows.dataset.with_format(None)["prompt_ids"][:]]
    keys: list[Any] = prompts if len(set(prompts)) >= FEWEST_PROMPTS else list(range(len(prompts)))
    order = sorted(set(keys))
    random.Random(0).shuffle(order)
    place = {key: i / len(order) for i, key in enumerate(order)}
    fit = [row for row, key in enumerate(keys) if place[key] < 0.5]
    watched = [row for row, key in enumerate(keys) if 0.5 <= place[key] < 0.75]
    return fit, watched, [row for row, key in enumerate(keys) if place[key] >= 0.75]


def _fine_tuned(model: torch.nn.Module, rows: PreparedRows, watched: PreparedRows, batch_size: int) -> Any:
    """The model with an adapter that says the rows' completions, of both classes, as long as that helps `watched`."""
    from peft import LoraConfig, get_peft_model  # an optional dependency

    torch.manual_seed(0)
    best = completion_logps(model, watched, batch_size, "to stop by").mean()
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter: Any = get_peft_model(model, config)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    device, order = trained[0].device, list(range(len(rows.dataset)))
    columns = [name for name in rows.dataset.column_names if name.endswith("_ids") or name == "label"]
    dataset = rows.dataset.select_columns(columns)
    for epoch in range(EPOCHS):
        random.Random(epoch).shuffle(order)
        for start in tqdm(range(0, len(order), batch_size), desc=f"SFT on both classes, epoch {epoch + 1}"):
            batch = rows.collator([dataset[row] for row in order[start : start + batch_size]])
            inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            log_probs = trl_compat.policy_forward(trl_compat.NO_TRAINER, adapter, inputs).log_probs
            (-log_probs.sum() / inputs["completion_mask"].sum()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        now = completion_logps(adapter, watched, batch_size, "to stop by").mean()
        if now <= best:
            break
        best, kept = now, [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return adapter


def _figures(before: torch.Tensor, after: torch.Tensor, part: torch.Tensor) -> dict[str, Any]:
    """Of the completions in `part`, one row of which counts as one draw."""
    difference = after - before
    if difference.ndim == 2:
        is_there = part.any(dim=1)
        of_rows = ((difference * part).sum(dim=1) / part.sum(dim=1).clamp(min=1))[is_there]
    else:
        of_rows = difference[part]
    return {
        "n": int(part.sum()),
        "reference": before[part].mean().item(),
        "fitted": after[part].mean().item(),
        "difference": mean_and_error(of_rows),
    }


# What is printed


def report_lines(distance: dict[str, Any], dataset: str = "DATA") -> Iterator[str]:
    """The figures as a table, and a sentence of advice."""
    yield f"Reference: {distance['model']}, against itself after a short SFT (LoRA) on both classes of {dataset}"
    yield f"{'held-out completions':22}{'n':>6}{'reference':>12}{'after SFT':>12}{'difference':>18}  nats a completion"
    lines = {name: distance[name] for name in ("preferred", "others", "all")}
    lines |= {f"{part['shortest']} to {part['longest']} tokens": part for part in distance["by_length"]}
    for name, part in lines.items():
        mean, error = part["difference"]["mean"], part["difference"]["standard_error"] or 0.0
        yield f"{name:22}{part['n']:>6}{part['reference']:>12.2f}{part['fitted']:>12.2f}{mean:>10.2f} ± {error:.2f}"
    yield ""
    yield advice(distance, dataset)


def is_near(distance: dict[str, Any]) -> bool:
    """Whether the reference may be the data's mixture: what is gained is within its error, or too little to matter."""
    of_all = distance["all"]["difference"]
    return of_all["mean"] < max(NEAR, 2 * (of_all["standard_error"] or 0.0))


def advice(distance: dict[str, Any], dataset: str) -> str:
    of_all, model = distance["all"]["difference"], distance["model"]
    if is_near(distance):
        return (
            "Train as it is: held-out completions gain nothing worth mentioning, so that the reference may be the "
            "mixture of both classes that ddro and rdro assume (`reference/log_normalisation` says more in training)."
        )
    return (
        f"KL(data || reference) is at least {of_all['mean']:.1f} ± {of_all['standard_error'] or 0:.1f} nats a "
        "completion, and ddro and rdro assume 0. Either fit the reference to both classes first, `trl sft "
        f"--model_name_or_path {model} --dataset_name {dataset} --output_dir sft` (of pairs make rows of prompt and "
        "completion with `trl.data_utils.unpair_preference_dataset`), and train from `sft`; or draw the completions "
        f"from the reference, `trl-rdro iterate --sample_only true --loss_type rdro --model_name_or_path {model}` "
        "with a judge; or use another loss (`sigmoid` for pairs, `kto` for labels)."
    )
