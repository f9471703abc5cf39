"""
The columns of preference data, and what their values may be.

`COLUMNS` and `PAIRS`, `LABELLED`, `PROMPTS` are the whole description; a new column is one line there. Each kind of
column has two methods that say the same: `wrong(value)` is the rule, with words for the user, and
`surely_right(array)` marks the rows of an Arrow column in which it certainly finds nothing, so that only the others
have to be looked at one by one.
"""

import json
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import messages
from .arrow import is_blank, is_list, is_text, is_true, lengths, no_rows


DROP = messages.DROP

Wrong = tuple[str, str] | None  # what is wrong with a value ("must be ..."), and what to do


def show(value: Any) -> str:
    """A value for a message."""
    if value is None:
        return "null"
    if isinstance(value, str) and not value.strip():
        return "no text but white space" if value else "an empty text"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def plain(value: Any) -> Any:
    """The Python number or boolean in a NumPy scalar or a tensor, which formatted data sets give."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


@dataclass(frozen=True)
class Content:
    """Text, or a list of messages. What says nothing is wrong as a prompt or as a preferred answer, and may well be
    right as the worse of two answers."""

    is_prompt: bool = False
    may_be_blank: bool = False

    def wrong(self, value: Any) -> Wrong:
        if isinstance(value, list):
            return messages.wrong_messages(value, self.is_prompt, self.may_be_blank)
        if not isinstance(value, str):
            return f"must be text or a list of messages, got {show(value)}", f"{DROP}, or convert the column."
        if not self.may_be_blank and not value.strip():
            return f"must have text, got {show(value)}", f"{DROP}."
        return None

    def surely_right(self, array: pa.Array) -> np.ndarray:
        if not is_text(array.type):
            return messages.surely_right(array, self.is_prompt)
        return is_true(pc.is_valid(array)) & ~is_blank(array)


@dataclass(frozen=True)
class Label:
    """True (preferred) or False."""

    def wrong(self, value: Any) -> Wrong:
        value = plain(value)
        if isinstance(value, bool):
            return None
        return (
            f"must be True (preferred) or False, got {show(value)}",
            "Drop rows without a label, and convert others, e.g. "
            '`dataset.map(lambda row: {"label": row["label"] == 1})`.',
        )

    def surely_right(self, array: pa.Array) -> np.ndarray:
        return is_true(pc.is_valid(array)) if pa.types.is_boolean(array.type) else no_rows(array)


@dataclass(frozen=True)
class Number:
    """A finite number in [low, high], with the ends left out where `open_ends`."""

    expected: str
    low: float = -math.inf
    high: float = math.inf
    open_ends: bool = False

    def wrong(self, value: Any) -> Wrong:
        value = plain(value)
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            number = float(value)
            inside = self.low < number < self.high if self.open_ends else self.low <= number <= self.high
            if inside:
                return None
        return f"must be {self.expected}, got {show(value)}", "Correct or drop such rows, or remove the column."

    def surely_right(self, array: pa.Array) -> np.ndarray:
        if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type)):
            return no_rows(array)
        above, below = (pc.greater, pc.less) if self.open_ends else (pc.greater_equal, pc.less_equal)
        array = array.cast(pa.float64(), safe=False)
        return is_true(pc.and_(pc.is_finite(array), pc.and_(above(array, self.low), below(array, self.high))))


@dataclass(frozen=True)
class TokenIds:
    """A list of token ids."""

    def wrong(self, value: Any) -> Wrong:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list) and value and all(_is_whole(token) and token >= 0 for token in value):
            return None
        return f"must be a list of token ids, got {show(value)}", f"{DROP}, or give the text instead."

    def surely_right(self, array: pa.Array) -> np.ndarray:
        if not is_list(array.type) or not pa.types.is_integer(array.type.value_type):
            return no_rows(array)
        counts, tokens = lengths(array), array.flatten()
        result = counts > 0
        good = is_true(pc.greater_equal(tokens, pa.scalar(0, tokens.type)))
        result[np.repeat(np.arange(len(array)), counts)[~good]] = False
        return result


@dataclass(frozen=True)
class Name:
    """Text or a whole number that names something."""

    def wrong(self, value: Any) -> Wrong:
        value = plain(value)
        if _is_whole(value) or (isinstance(value, str) and value.strip()):
            return None
        return f"must be a name or a whole number, got {show(value)}", "Fill it in, or drop such rows."

    def surely_right(self, array: pa.Array) -> np.ndarray:
        if is_text(array.type):
            return is_true(pc.is_valid(array)) & ~is_blank(array)
        return is_true(pc.is_valid(array)) if pa.types.is_integer(array.type) else no_rows(array)


@dataclass(frozen=True)
class Tools:
    """The tools of a chat template: nothing, a list, or a list as JSON text."""

    def wrong(self, value: Any) -> Wrong:
        found = value
        if isinstance(value, str):
            try:
                found = json.loads(value)
            except ValueError:
                found = value
        if found is None or (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
            return None
        return (
            f"must be a list of tools, each a mapping (its JSON schema), as it is or as JSON, got {show(value)}",
            "Correct such rows.",
        )

    def surely_right(self, array: pa.Array) -> np.ndarray:
        missing = ~is_true(pc.is_valid(array))
        if is_list(array.type) and pa.types.is_struct(array.type.value_type) and not array.flatten().null_count:
            return np.ones(len(array), dtype=bool)
        return missing


@dataclass(frozen=True)
class Present:
    """Anything that is there, of one of these Python types."""

    expected: str
    types: tuple[type, ...] = (object,)

    def wrong(self, value: Any) -> Wrong:
        if value is not None and isinstance(value, self.types):
            return None
        return f"must be {self.expected}, got {show(value)}", "Fill it in, or drop such rows."

    def surely_right(self, array: pa.Array) -> np.ndarray:
        certain = self.types == (object,) or (self.types == (dict,) and pa.types.is_struct(array.type))
        return is_true(pc.is_valid(array)) if certain else no_rows(array)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


Kind = Content | Label | Number | TokenIds | Name | Tools | Present
Kinds = dict[str, Kind]  # by column

# A sum of rounded log-probabilities may come out a little above 0
LOG_PROBABILITY = Number("a log-probability: finite and at most 0", high=0.01)

PROMPTS: Kinds = {"prompt": Content(is_prompt=True)}
PAIRS: Kinds = {
    "prompt": Content(is_prompt=True),
    "chosen": Content(),
    "rejected": Content(may_be_blank=True),
}
LABELLED: Kinds = {
    "prompt": Content(is_prompt=True),
    "completion": Content(may_be_blank=True),
    "label": Label(),
}
TOKENISED_PAIRS: Kinds = {"prompt_ids": TokenIds(), "chosen_ids": TokenIds(), "rejected_ids": TokenIds()}
TOKENISED_LABELLED: Kinds = {"prompt_ids": TokenIds(), "completion_ids": TokenIds(), "label": Label()}

# What a person or a program has said of completions, which may be silent ones, preferred or not
SCORES: Kinds = {
    "prompt": Content(is_prompt=True),
    "completion": Content(may_be_blank=True),
    "score": Number("a finite number"),
}
PREFERENCES: Kinds = {
    "prompt": Content(is_prompt=True),
    "chosen": Content(may_be_blank=True),
    "rejected": Content(may_be_blank=True),
}

# Looked at wherever they are, since the trainers and the collators read them then
ALWAYS: Kinds = {
    "ref_chosen_logps": LOG_PROBABILITY,
    "ref_rejected_logps": LOG_PROBABILITY,
    "ref_logps": LOG_PROBABILITY,
    "tools": Tools(),
    "chat_template_kwargs": Present("the keyword arguments of a chat template, as a dictionary", (dict,)),
    "image": Present("an image"),
    "images": Present("a list of images"),
}

# Looked at where a setting declares that it uses them
COLUMNS: Kinds = {
    "weight": Number("a finite number of at least 0", low=0),
    # Below 1/2 the other completion is the preferred one
    "preference_probability": Number("a probability from 0.5 (a tie) to 1", low=0.5, high=1),
    "second_ref_chosen_logps": LOG_PROBABILITY,
    "second_ref_rejected_logps": LOG_PROBABILITY,
    "preferred_fraction": Number("a number between 0 and 1, both excluded", low=0, high=1, open_ends=True),
    "group": Name(),
    "annotator": Name(),
    "score": SCORES["score"],
}
