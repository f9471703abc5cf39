"""The prompts of a run, in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..log import get_logger
from .files import Row


logger = get_logger(__name__)

Ids = list[int]


@dataclass
class Prompt:
    """A row of the data set, and its prompt in tokens."""

    row: Row
    ids: Ids


def tokenize(tokenizer: Any, rows: Sequence[Row]) -> list[Prompt]:
    """Rows with their prompts as the model reads them, by the chat template where they are conversations."""
    prompts = []
    for row in rows:
        if isinstance(row["prompt"], str):
            ids = tokenizer(row["prompt"])["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        prompts.append(Prompt(row, list(ids)))
    return prompts


def short_enough(prompts: list[Prompt], max_length: int | None, max_completion_length: int) -> list[Prompt]:
    """The prompts that leave room for a completion. Raises `UserError` if there are none."""
    if max_length is None:
        return prompts
    room = max_length - max_completion_length
    kept = [prompt for prompt in prompts if len(prompt.ids) <= room]
    if not kept:
        raise UserError(
            f"No prompt fits: `max_length={max_length}` leaves {room} tokens for it beside "
            f"`max_completion_length={max_completion_length}`. Raise `max_length`."
        )
    if len(kept) < len(prompts):
        logger.warning(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {room} tokens.")
    return kept
