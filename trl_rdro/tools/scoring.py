"""
Implicit rewards of a model on preference data, without a trainer.

The score of a completion is its log-ratio log p(completion | prompt) - log p_ref(completion | prompt), summed over its
tokens: beta times it is DPO's implicit reward. Rows are prepared, truncated and masked by TRL's own code, and the
log-probabilities come from its fused head, so the figures are those that training logs.

    policy, reference = load_policy("runs/quickstart")          # a model, or an adapter and what it was trained from
    rows = prepare(dataset, policy.tokenizer, max_length=1024)
    logps = completion_logps(policy.model, rows, batch_size=8, description="policy")
    summary = summarise(rows, logps - reference_logps, groups=["domain"])
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from ..checks.models import check_adapter, check_model
from ..compat import trl as trl_compat


ROW = "trl_rdro_row"  # a row's place in the data set before rows were dropped


# Models


@dataclass
class Policy:
    """A model that answers with log-probabilities, and the tokenizer that came with it."""

    name: str
    model: torch.nn.Module
    tokenizer: Any
    is_adapter: bool

    @contextmanager
    def base(self) -> Iterator[None]:
        """For an adapter: the model without it."""
        with self.model.disable_adapter():
            yield


def default_dtype() -> torch.dtype:
    return torch.float32 if PartialState().device.type == "cpu" else torch.bfloat16


def load_policy(name: str, dtype: torch.dtype | str, trust_remote_code: bool = False) -> Policy:
    """
    Load a model, or a PEFT adapter on the model that it names, for scoring.

    Raises:
        `ValueError`: for what is not a causal language model with its tokenizer; for an adapter that changes the
            output head, which TRL's fused head would pass over.
    """
    adapter_config = find_adapter_config_file(name)
    base_name, tokenizer = name, None
    options = {"trust_remote_code": trust_remote_code}
    if adapter_config is not None:
        from peft import PeftConfig, PeftModel  # an optional dependency

        check_adapter(name)
        base_name = PeftConfig.from_pretrained(name).base_model_name_or_path
        with suppress(OSError, ValueError):  # it has none of its own
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    files = check_model(base_name, None, trust_remote_code, tokenizer)
    tokenizer = tokenizer or getattr(files.processing_class, "tokenizer", files.processing_class)
    model = AutoModelForCausalLM.from_pretrained(base_name, dtype=dtype, **options)
    trl_compat.add_fused_lm_head(model)
    if adapter_config is not None:
        model = PeftModel.from_pretrained(model, name)
        if type(model.get_output_embeddings()).__module__.startswith("peft."):
            raise ValueError(
                "the adapter changes the output head, which is not supported: merge it into its model "
                "(merge_and_unload) and score the result"
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Policy(name, model.eval().to(PartialState().device), tokenizer, adapter_config is not None)


# Data


@dataclass
class PreparedRows:
    """A tokenised data set, and the collator that makes its batches."""

    dataset: Dataset
    collator: Callable
    is_paired: bool
    dropped: int
    truncated: int

    @property
    def lengths(self) -> list[int]:
        names = ("chosen_ids", "rejected_ids") if self.is_paired else ("completion_ids",)
        columns = [self.dataset.with_format(None)[column][:] for column in ("prompt_ids", *names)]
        return [len(prompt) + max(map(len, completions)) for prompt, *completions in zip(*columns, strict=True)]


@dataclass
class _Settings:
    """The fields of TRL's configs that preparing data reads."""

    max_length: int | None
    truncation_mode: str = "keep_start"
    dataset_num_proc: int | None = None
    pad_to_multiple_of: int | None = None


def prepare(dataset: Dataset, tokenizer: Any, max_length: int | None) -> PreparedRows:
    """Tokenise pairs (prompt, chosen, rejected) or labelled completions (prompt, completion, label) as TRL's trainers
    do. Other columns are kept."""
    is_paired = "chosen" in dataset.column_names
    rows = len(dataset)
    dataset = dataset.add_column(ROW, list(range(rows)))
    prepared, collator = trl_compat.prepare_dataset(
        "dpo" if is_paired else "kto", dataset, tokenizer, _Settings(max_length)
    )
    result = PreparedRows(prepared, collator, is_paired, dropped=rows - len(prepared), truncated=0)
    if max_length is not None:
        result.truncated = sum(length > max_length for length in result.lengths)
    return result


# Scores


def completion_logps(
    model: torch.nn.Module, rows: PreparedRows, batch_size: int, description: str, context: Any = None
) -> torch.Tensor:
    """
    Log-probability of each completion, float64 on the CPU: `(rows, 2)`, chosen and rejected, or `(rows,)`.

    Rows of similar length go together, the longest first, so that a batch too large for the memory fails at once.
    """
    lengths = rows.lengths
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids") if rows.is_paired else ("prompt_ids", "completion_ids")
    dataset = rows.dataset.select_columns([*names, *([] if rows.is_paired else ["label"])])
    device = next(model.parameters()).device
    result = torch.empty(len(order), 2 if rows.is_paired else 1, dtype=torch.float64)
    with torch.no_grad(), context or nullcontext(), tqdm(total=len(order), desc=description, unit="row") as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = rows.collator([dataset[row] for row in chunk])
            inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            log_probs = trl_compat.policy_forward(trl_compat.NO_TRAINER, model, inputs).log_probs
            logps = trl_compat.completion_logps(trl_compat.NO_TRAINER, log_probs, inputs["completion_mask"])
            result[chunk] = logps.double().cpu().view(-1, len(chunk)).T
            bar.update(len(chunk))
    return result if rows.is_paired else result[:, 0]


# Figures


def mean_and_error(values: torch.Tensor) -> dict[str, float | None]:
    """The mean of one value per row, and its standard error (None for fewer than two)."""
    n = len(values)
    if n == 0:
        return {"mean": None, "standard_error": None}
    return {
        "mean": values.mean().item(),
        "standard_error": (values.std() / math.sqrt(n)).item() if n > 1 else None,
    }


def pair_figures(scores: torch.Tensor) -> dict[str, Any]:
    """Of `(n, 2)` scores: accuracy (a tie counts one half), margin, and the mean score of each side."""
    chosen, rejected = scores.unbind(dim=1)
    correct = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return {
        "n": len(scores),
        "accuracy": mean_and_error(correct),
        "margin": mean_and_error(chosen - rejected),
        "chosen": mean_and_error(chosen),
        "rejected": mean_and_error(rejected),
    }


def unpaired_figures(scores: torch.Tensor, preferred: torch.Tensor) -> dict[str, Any]:
    """Of `(n,)` scores and labels: the mean score of each class, and the AUC, the chance that a preferred completion
    scores above a non-preferred one (ties count one half), with DeLong's standard error."""
    above, below = scores[preferred], scores[~preferred]
    return {
        "n": len(scores),
        "auc": area_under_curve(above, below),
        "preferred": {"n": len(above), **mean_and_error(above)},
        "non_preferred": {"n": len(below), **mean_and_error(below)},
    }


def area_under_curve(above: torch.Tensor, below: torch.Tensor) -> dict[str, float | None]:
    if not len(above) or not len(below):
        return {"mean": None, "standard_error": None}

    def share_below(values, others):  # (n,), each value's share of the others below it
        others = others.sort().values
        left, right = torch.searchsorted(others, values), torch.searchsorted(others, values, right=True)
        return (left + right).double() / (2 * len(others))

    placements = share_below(above, below), 1 - share_below(below, above)
    error = None
    if min(len(above), len(below)) > 1:
        error = math.sqrt(sum((values.var() / len(values)).item() for values in placements))
    return {"mean": placements[0].mean().item(), "standard_error": error}


def summarise(rows: PreparedRows, scores: torch.Tensor, groups: list[str] | None = None) -> dict[str, Any]:
    """The figures of all rows ("overall"), and of the rows of each value of each group column ("groups")."""
    labels = None if rows.is_paired else torch.tensor(rows.dataset["label"][:], dtype=torch.bool)

    def figures(chosen_rows) -> dict[str, Any]:
        part = scores[chosen_rows]
        return pair_figures(part) if labels is None else unpaired_figures(part, labels[chosen_rows])

    result = {"overall": figures(slice(None)), "groups": {}}
    for column in groups or []:
        members: dict[str, list[int]] = {}
        for row, value in enumerate(rows.dataset[column][:]):
            members.setdefault(str(value), []).append(row)
        result["groups"][column] = {value: figures(members[value]) for value in sorted(members)}
    return result


def per_row(rows: PreparedRows, scores: torch.Tensor) -> list[dict[str, Any]]:
    """Each row's number in the given data set and its scores."""
    numbers = rows.dataset[ROW][:]
    if rows.is_paired:
        return [
            {"row": row, "chosen": chosen, "rejected": rejected}
            for row, (chosen, rejected) in zip(numbers, scores.tolist(), strict=True)
        ]
    labels = rows.dataset["label"][:]
    return [
        {"row": row, "label": label, "score": score}
        for row, label, score in zip(numbers, labels, scores.tolist(), strict=True)
    ]
