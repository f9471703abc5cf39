"""
Implicit rewards of a model on preference data, without a trainer.

The score of a completion is its log-ratio log p(completion | prompt) - log p_ref(completion | prompt), summed over its
tokens: beta times it is DPO's implicit reward. Rows are prepared, truncated and masked by TRL's own code, and the
log-probabilities come from its fused head, so the figures are those that training logs.

    result = score(dataset, "runs/quickstart", groups=["domain"])    # an adapter against its model, or a model alone
    result["overall"]["accuracy"]["mean"]
"""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from ..checks.models import check_adapter, check_model
from ..compat import trl as trl_compat
from ..errors import UserError, user_error
from .adapters import as_reference, describe_reference
from .loading import load_model, loading
from .score_figures import area_under_curve, mean_and_error, pair_figures, unpaired_figures


__all__ = [
    "Policy",
    "PreparedRows",
    "area_under_curve",
    "completion_logps",
    "default_dtype",
    "load_policy",
    "mean_and_error",
    "pair_figures",
    "per_row",
    "prepare",
    "score",
    "summarise",
    "unpaired_figures",
]
# As TRL's `precompute_ref_log_probs` names and reads them; by whether rows are pairs
REFERENCE_COLUMNS = {True: ("ref_chosen_logps", "ref_rejected_logps"), False: ("ref_logps",)}
ROW = "trl_rdro_row"  # a row's place in the data set before rows were dropped


# Models


@dataclass
class Policy:
    """A model that answers with log-probabilities, and the tokenizer that came with it."""

    name: str
    model: Any  # of transformers, or an adapter of PEFT on one
    tokenizer: Any
    is_adapter: bool


def default_dtype() -> torch.dtype:
    return torch.float32 if PartialState().device.type == "cpu" else torch.bfloat16


def load_policy(name: str, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False) -> Policy:
    """
    Load a model, or a PEFT adapter on the model that it names, for scoring.

    Raises:
        `UserError`: where it cannot be loaded, or is an adapter that does not fit its model.
    """
    with loading("the model", name, OSError, ValueError, ImportError):
        is_adapter = find_adapter_config_file(name) is not None
        base_name = name
        if is_adapter:
            from peft import PeftConfig  # an optional dependency

            base_name = PeftConfig.from_pretrained(name).base_model_name_or_path
    options = {"trust_remote_code": trust_remote_code}
    tokenizer = None
    if is_adapter:
        with suppress(OSError, ValueError):  # it need not bring one
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    with user_error(ValueError), loading("the model", base_name, OSError):
        files = check_model(base_name, None, trust_remote_code, tokenizer)
        if is_adapter:
            check_adapter(name)
    model = load_model(base_name, name if is_adapter else None, dtype=dtype or default_dtype(), **options)
    tokenizer = getattr(files.processing_class, "tokenizer", files.processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Policy(name, model.to(PartialState().device), tokenizer, is_adapter)


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
            result[chunk] = logps.cpu().double().view(-1, len(chunk)).T
            bar.update(len(chunk))
    return result if rows.is_paired else result[:, 0]


def stored_reference(rows: PreparedRows) -> torch.Tensor | None:
    """The reference's log-probabilities that the data set brings, shaped as `completion_logps`, or None."""
    names = REFERENCE_COLUMNS[rows.is_paired]
    if not {*names} <= {*rows.dataset.column_names}:
        return None
    with user_error(TypeError, ValueError, prefix=f"{' and '.join(names)} must hold numbers: "):
        columns = [torch.tensor(rows.dataset.with_format(None)[name][:], dtype=torch.float64) for name in names]
    return torch.stack(columns, dim=1) if rows.is_paired else columns[0]


# Results


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


def score(
    dataset: Dataset,
    model: str,
    reference: str | None = None,
    groups: list[str] | None = None,
    batch_size: int = 8,
    max_length: int | None = 1024,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    Score a data set of pairs or labelled completions: all that `trl-rdro score` prints and writes of it.

    Args:
        dataset: columns prompt, chosen, rejected, or prompt, completion, label.
        model: a directory or hub id, of a model or an adapter.
        reference: another one, or None for what the data set brings (`REFERENCE_COLUMNS`), else for the reference that
            an adapter was trained against; a model with neither has plain log-probabilities.
        groups: columns whose values are summarised too.
        max_length: tokens that a row is truncated to, as in training; None for all.
        dtype: of the weights, or None for bfloat16 on an accelerator and float32 on a CPU.

    Raises:
        `UserError`: where a model cannot be loaded, no row is left, or the scores are not finite or not comparable.

    (Longer than most functions for its arguments and what it returns.)
    """
    policy = load_policy(model, dtype, trust_remote_code)
    with user_error(Exception, prefix="TRL cannot prepare these rows: "):
        rows = prepare(dataset, policy.tokenizer, max_length)
    if not len(rows.dataset):
        raise UserError(f"no row has a prompt shorter than max_length {max_length}: raise it")
    loaded_dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")

    scores = completion_logps(policy.model, rows, batch_size, "model")
    if reference is not None:
        vocabulary = policy.tokenizer.get_vocab()
        del policy.model  # one model at a time
        policy = load_policy(reference, dtype, trust_remote_code)
        if policy.tokenizer.get_vocab() != vocabulary:
            raise UserError(f"{reference} has another vocabulary than {model}: their log-ratio means nothing")
        scores -= completion_logps(policy.model, rows, batch_size, "reference")
    elif (stored := stored_reference(rows)) is not None:
        reference = "the data set's own, " + " and ".join(REFERENCE_COLUMNS[rows.is_paired])
        scores -= stored
    elif policy.is_adapter:
        reference = describe_reference(policy.model)
        scores -= completion_logps(policy.model, rows, batch_size, "reference", as_reference(policy.model))
    if not scores.isfinite().all():
        raise UserError(f"the scores are not finite in {loaded_dtype}: try dtype float32 (float16 overflows easily)")
    return {
        "model": model,
        "reference": reference,
        "score": "log-probability" if reference is None else "log-ratio",
        "format": "pairs" if rows.is_paired else "labelled completions",
        "rows": len(dataset),
        "dropped": rows.dropped,
        "truncated": rows.truncated,
        "max_length": max_length,
        "dtype": loaded_dtype,
        **summarise(rows, scores, groups),
        "scores": per_row(rows, scores),
    }
