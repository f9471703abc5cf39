"""
One pass over preference data, before a model is loaded.

Tables are looked at column by column in Arrow, a million rows in seconds, and the rows that this is not sure of one by
one. Streams are looked at in their first rows, and further on as they are read. What is wrong is said in one sentence
that names the data set, the row, the column, the value and the remedy; what is only odd, in a warning.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from .oddities import Oddities
from .rules import Rules, make_rules


FIRST_ROWS = 100  # of a stream
BATCH = 50_000
FEW = 100  # rows that are cheaper to look up one by one than with all others of a batch


def check_datasets(
    method: str, train_dataset: Any, eval_dataset: Any, used: tuple[str, ...] = (), read: tuple[str, ...] = ()
) -> tuple[Any, Any, dict[str, Any]]:
    """Check the training set and every evaluation set; see `check_dataset`.

    Returns:
        Both as they came, but streams, which go on checking; and the first training row, if there is one.
    """
    eval_dataset = check_evaluation(method, eval_dataset, used, read)
    if train_dataset is None:
        return None, eval_dataset, {}
    train_dataset = check_dataset(train_dataset, "train_dataset", method, used, read)
    if "weight" in read:
        require_weight(train_dataset)
    return train_dataset, eval_dataset, next(iter(train_dataset))


def evaluation_sets(eval_dataset: Any) -> dict[str, Any]:
    """One evaluation set, or each of a dictionary of them, under the names that messages call them."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def check_evaluation(method: str, eval_dataset: Any, used: tuple[str, ...] = (), read: tuple[str, ...] = ()) -> Any:
    """Check an evaluation set, or each of a dictionary of them."""
    if isinstance(eval_dataset, dict):
        return {
            name: check_dataset(dataset, f"eval_dataset[{name!r}]", method, used, read)
            for name, dataset in eval_dataset.items()
        }
    return None if eval_dataset is None else check_dataset(eval_dataset, "eval_dataset", method, used, read)


def check_dataset(
    dataset: Any,
    name: str,
    method: str,
    used: tuple[str, ...] = (),
    read: tuple[str, ...] = (),
    tokenised: bool = True,
) -> Dataset | IterableDataset:
    """
    Refuse a data set that cannot be trained on.

    Args:
        dataset: a table or a stream.
        name: how messages call it.
        method: "dpo" (pairs), "kto" (labelled completions, or pairs, which TRL flattens) or "prompts".
        used: further columns that have to be there (`columns.COLUMNS`).
        read: further columns that are looked at where they are there.
        tokenised: whether token ids may take the place of text.

    Returns:
        The data set; a stream with a step added that checks each row as it is read.

    Raises:
        `ValueError`: with one sentence; from a stream also later.
        `TypeError`: for anything but a `Dataset` or an `IterableDataset`.
    """
    if isinstance(dataset, dict):
        raise ValueError(f"`{name}` has the splits {', '.join(map(str, dataset))}: pass one of them.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}.")
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        rows = dataset.with_format(None)
        rules = make_rules(name, method, first_row(rows, name), used, read, tokenised)
        _check_table(rows, rules)
        return dataset
    rules = check_rows(itertools.islice(dataset, FIRST_ROWS), name, method, used, read, tokenised)
    return dataset.map(rules.require, with_indices=True) if isinstance(dataset, IterableDataset) else dataset


def require_weight(train_dataset: Any) -> None:
    """Raises `ValueError` for a table whose rows all have the weight 0. Streams and transforms are passed over."""
    if not isinstance(train_dataset, Dataset) or train_dataset.format["type"] == "custom":
        return
    if "weight" in train_dataset.column_names:
        weights = train_dataset.select_columns(["weight"]).with_format("arrow").iter(BATCH)
        if not any(table["weight"].to_numpy().any() for table in weights):
            raise ValueError(
                f"`train_dataset`: the weights of all {len(train_dataset)} rows are 0: nothing would be trained. Give "
                "rows a `weight` above 0, or remove the column."
            )


def check_rows(
    rows: Iterable[dict[str, Any]],
    name: str,
    method: str,
    used: tuple[str, ...] = (),
    read: tuple[str, ...] = (),
    tokenised: bool = True,
) -> Rules:
    """Check rows one by one. Raises as `check_dataset`; returns the rules."""
    rows = list(rows)
    rules = make_rules(name, method, first_row(rows, name), used, read, tokenised)
    oddities = Oddities(rules)
    for index, row in enumerate(rows):
        oddities.add_row(rules.require(row, index), index)
    oddities.report()
    return rules


def first_row(rows: Any, name: str) -> dict[str, Any]:
    """The first of some rows. Raises `ValueError` if there is none."""
    if not len(rows):
        raise ValueError(f"`{name}` is empty: training and evaluation need at least one row.")
    if not isinstance(rows[0], dict):
        raise ValueError(f"`{name}` must hold rows with named columns, got {type(rows[0]).__name__} in the first one.")
    return rows[0]


def _check_table(dataset: Dataset, rules: Rules) -> None:
    dataset, oddities = dataset.select_columns(list(rules.columns)), Oddities(rules)
    for table, numbers in _batches(dataset):
        sure = rules.surely_right(table)
        for index, row in _rows(dataset, numbers[~sure]):
            oddities.add_row(rules.require(row, index), index)
        oddities.add_table(table, numbers, sure)
    oddities.report()


def _batches(dataset: Dataset) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The rows as Arrow tables, each with the numbers of its rows. A selection or a shuffled data set is read in the
    order in which its rows are stored: gathering a million of them one by one takes a minute."""
    if dataset._indices is None:
        arrow = dataset.with_format("arrow")
        for start in range(0, len(dataset), BATCH):
            table = arrow[start : start + BATCH]
            yield table, np.arange(start, start + len(table))
        return
    places = dataset._indices.column(0).to_numpy()
    order = np.argsort(places, kind="stable")
    places = places[order]
    stored = Dataset(dataset.data, dataset.info).with_format("arrow")
    for start in range(0, len(stored), BATCH):
        low, high = np.searchsorted(places, (start, start + BATCH))
        if low < high:
            table = stored[start : start + BATCH].combine_chunks()
            yield table.take(places[low:high] - start), order[low:high]


def _rows(dataset: Dataset, numbers: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    if len(numbers) <= FEW:
        yield from ((number, dataset[number]) for number in numbers.tolist())
        return
    for some in np.split(numbers, range(1000, len(numbers), 1000)):
        yield from zip(some.tolist(), dataset.select(some).to_list(), strict=True)
