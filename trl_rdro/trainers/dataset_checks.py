"""Refuse a data set of the wrong kind with one sentence, before a model is loaded or a library raises a KeyError."""

from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset

from ..losses.types import LOSS_TYPES


def check_datasets(
    check: Callable[[Any, str], dict[str, Any]], train_dataset: Any, eval_dataset: Any
) -> dict[str, Any]:
    """Run `check` on the training set and on every evaluation set. Returns the first training row, if there is one."""
    named = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    for name, dataset in named.items():
        if dataset is not None:
            check(dataset, "eval_dataset" if name is None else f"eval_dataset[{name!r}]")
    return {} if train_dataset is None else check(train_dataset, "train_dataset")


def first_example(dataset: Any, name: str) -> dict[str, Any]:
    """The first row of a map-style or streaming data set."""
    if isinstance(dataset, dict):
        raise ValueError(f"`{name}` has the splits {', '.join(map(str, dataset))}: pass one of them.")
    try:
        return next(iter(dataset))
    except StopIteration:
        raise ValueError(f"`{name}` is empty: training and evaluation need at least one row.") from None


def require_preference_columns(dataset: Any, name: str) -> dict[str, Any]:
    """Refuse anything but pairs: `chosen` and `rejected`, raw or already tokenised by TRL. Returns the first row."""
    example = first_example(dataset, name)
    columns = set(example)
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:
        return example
    if missing := sorted({"chosen", "rejected"} - columns):
        hint = (
            " It looks like unpaired data (`completion`, `label`): use `KTOTrainer` (`trl-rdro kto`) for it."
            if {"completion", "label"} <= columns
            else " Rename the columns (`dataset.rename_column`), and give the prompt as `prompt`."
        )
        raise ValueError(
            f"`{name}` lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} of a preference data set; it "
            f"has {', '.join(sorted(columns))}.{hint}"
        )
    for column in ("chosen", "rejected"):
        if not isinstance(example[column], (str, list)):
            raise ValueError(
                f"The column `{column}` of `{name}` must hold text or a list of messages, got "
                f"{type(example[column]).__name__} in the first row."
            )
    return example


def require_loss_columns(dataset: Any, name: str, loss_types: Iterable[str]) -> None:
    """Refuse data without a column that one of our losses cannot do without."""
    columns = set(first_example(dataset, name))
    for loss_type in loss_types:
        if missing := sorted(set(LOSS_TYPES[loss_type].columns) - columns):
            raise ValueError(
                f"`{loss_type}` needs the column `{missing[0]}`, which `{name}` lacks; it has "
                f"{', '.join(sorted(columns))}. Add it, or use another loss."
            )


def require_known_groups(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse data on which groups cannot be counted, and evaluation data with groups that training gives no weight."""
    if not isinstance(train_dataset, Dataset):
        raise ValueError(
            "`grdpo` needs the sizes of the groups, which cannot be counted on a streaming `train_dataset`. Load the "
            "data set without streaming."
        )
    known = set(map(str, train_dataset["group"]))
    named = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    for name, dataset in named.items():
        if isinstance(dataset, Dataset) and (new := sorted(set(map(str, dataset["group"])) - known)):
            raise ValueError(
                f"The group {new[0]!r} of `eval_dataset{'' if name is None else f'[{name!r}]'}` is not in "
                f"`train_dataset`, whose groups are {', '.join(sorted(known)[:10])}: `grdpo` has no weight for it. "
                "Remove these rows, or give them a group of the training set."
            )


def require_second_reference(dataset: Any, name: str) -> None:
    """Refuse data without the log-probabilities of mrpo's second reference."""
    columns = LOSS_TYPES["mrpo"].optional_columns
    if not set(columns) <= set(first_example(dataset, name)):
        raise ValueError(
            "`mrpo` needs a second reference model: set `mrpo_reference` to its path or to the name of an adapter, or "
            f"give its log-probabilities in the columns {' and '.join(columns)}, which `{name}` lacks."
        )


def require_unpaired_columns(dataset: Any, name: str) -> dict[str, Any]:
    """Refuse anything but labelled completions, or pairs, which TRL flattens. Returns the first row."""
    example = first_example(dataset, name)
    columns = set(example)
    if {"chosen", "rejected"} <= columns:
        return example
    completion = "completion_ids" if "prompt_ids" in columns else "completion"
    if missing := sorted({completion, "label"} - columns):
        raise ValueError(
            f"`{name}` lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} of an unpaired preference data "
            f"set (prompt, completion, label); it has {', '.join(sorted(columns))}. Rename the columns "
            "(`dataset.rename_column`)."
        )
    _require_boolean_labels(dataset, name, example)
    return example


def _require_boolean_labels(dataset: Any, name: str, example: dict[str, Any]) -> None:
    label, found = example["label"], None
    # By the column's type where there is one: its values may come as arrays or tensors
    is_boolean = dataset.features["label"].dtype == "bool" if isinstance(dataset, Dataset) else isinstance(label, bool)
    if not is_boolean or label is None:
        found = f"{label!r} ({type(label).__name__}) in the first row"
    elif isinstance(dataset, Dataset):
        empty = dataset.select_columns("label").with_format("arrow")[:].column("label").null_count
        found = f"{empty} empty one{'s' * (empty > 1)}" if empty else None
    if found:
        raise ValueError(
            f"The labels of `{name}` must be True (preferred) or False, got {found}. Drop rows without a label, and "
            'convert others, e.g. `dataset.map(lambda row: {"label": row["label"] == 1})`.'
        )
