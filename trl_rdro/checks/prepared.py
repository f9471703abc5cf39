"""What is looked at when rows become tokens: that some are left, that they have tokens, and that the model knows
them."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from trl import is_conversational

from ..errors import UserError
from ..log import get_logger
from .arrow import lengths
from .rules import as_array


logger = get_logger(__name__)

BATCH = 50_000


def check_prepared(dataset: Any, name: str, max_length: int | None, rows: int | None) -> None:
    """
    Refuse a prepared data set that nothing can be learnt from, or that holds tokens which the model does not know.
    Streams are passed over.

    Args:
        rows: the number of the model's embeddings, if known.

    Raises:
        `ValueError`: with one sentence.
    """
    if not isinstance(dataset, Dataset):
        return
    if not len(dataset):
        raise ValueError(
            f"No row of `{name}` has a prompt shorter than `max_length={max_length}` tokens: nothing is left to "
            f"{'train on' if name == 'train_dataset' else 'evaluate'}. Raise `max_length`."
        )
    columns = [column for column in ("chosen_ids", "rejected_ids", "completion_ids") if column in dataset.column_names]
    arrow = dataset.select_columns(["prompt_ids", *columns]).with_format("arrow")
    prompts_have_tokens = False
    for start in range(0, len(arrow), BATCH):
        table = arrow[start : start + BATCH]
        for column in table.column_names:
            ids = as_array(table[column])
            empty = np.flatnonzero(lengths(ids) == 0)
            if column != "prompt_ids" and len(empty):
                raise ValueError(
                    f"Row {start + empty[0]} of the prepared `{name}` has no tokens in `{column}`: the tokenizer "
                    "knows nothing of its text. Give the model's own."
                )
            largest = pc.max(ids.flatten()).as_py()
            prompts_have_tokens |= column == "prompt_ids" and largest is not None
            if rows is not None and largest is not None and largest >= rows:
                raise ValueError(
                    f"`{name}` has the token {largest} in `{column}`, and the model has {rows} embeddings only: give "
                    "the model's own tokenizer, or resize the model (`resize_token_embeddings`)."
                )
    if not prompts_have_tokens:  # completions have the token that ends them at least
        raise ValueError(
            f"No prompt of the prepared `{name}` has tokens: the tokenizer knows nothing of their text. Give the "
            "model's own."
        )


def require_end(dataset: Any, processing_class: Any) -> None:
    """Refuse text whose completions TRL cannot end; of messages the chat template does it. Raises `UserError`."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.eos_token is None and not is_conversational(next(iter(dataset))):
        raise UserError(
            "The data are text, and the tokenizer has no end token (`eos_token`) to end a completion with. Set one in "
            "its tokenizer_config.json, or give the data as messages."
        )


def warn_of_date(dataset: Any, processing_class: Any) -> None:
    """Say that a chat template writes today's date into the prompts, so that another day trains on others."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    template = getattr(tokenizer, "chat_template", None)
    if "strftime_now" in str(template or "") and "chat_template_kwargs" not in (dataset.column_names or ()):
        logger.warning(
            "The chat template writes today's date into every prompt: resumed or scored on another day, a run sees "
            'other prompts. To pin it, give the data a column `chat_template_kwargs` with {"date_string": "26 Jul '
            '2024"} in each row (if the template reads `date_string`), or take `strftime_now` out of the template.'
        )
