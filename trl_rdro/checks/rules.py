"""The rules for the rows of one data set: which columns it has to have, and what a row may hold."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .arrow import is_text, is_true, lengths, no_rows
from .columns import (
    ALWAYS,
    COLUMNS,
    DROP,
    LABELLED,
    PAIRS,
    PREFERENCES,
    PROMPTS,
    SCORES,
    TOKENISED_LABELLED,
    TOKENISED_PAIRS,
    Content,
    Kind,
    plain,
)
from .messages import ends_blank, message_fields


DESCRIPTIONS = {
    "dpo": "a preference data set",
    "kto": "an unpaired preference data set (prompt, completion, label)",
    "prompts": "a data set of prompts",
    "scores": "a file of scores",
    "preferences": "a file of preferences",
}
FORMS: dict[type | None, str] = {str: "text", list: "a list of messages"}


@dataclass(frozen=True)
class Rules:
    """What the rows of the data set `name` have to be.

    Attributes:
        columns: the columns that are looked at.
        form: `str` or `list`, which all texts of the data set share; None where they need not, and for token ids.
    """

    name: str
    columns: dict[str, Kind]
    form: type | None = None

    @property
    def contents(self) -> list[str]:
        return [column for column, kind in self.columns.items() if isinstance(kind, Content)]

    @property
    def extracts_prompt(self) -> bool:
        """Whether the prompt is what `chosen` and `rejected` begin with alike."""
        return "chosen" in self.columns and "prompt" not in self.columns

    def wrong(self, row: dict[str, Any]) -> tuple[str, str, str] | None:
        """The column of a row that is wrong, what is wrong with it, and what to do."""
        # Rows of a stream may have columns that its first row has not
        for column, kind in {**self.columns, **{name: ALWAYS[name] for name in ALWAYS if name in row}}.items():
            if wrong := kind.wrong(row.get(column)):
                return column, *wrong
            if isinstance(kind, Content) and self.form is not None and type(row[column]) is not self.form:
                return column, *self._other_form(row[column])
        if plain(row.get("label")) is True and "completion" in self.columns and says_nothing(row["completion"]):
            return "completion", "has no text, and is labelled as preferred", f"{DROP}."
        if self.extracts_prompt and not _begin_alike(row["chosen"], row["rejected"]):
            return (
                "chosen",
                f"must begin with the prompt, as `rejected` does, but their {_first(self.form)} differ or are all "
                "there is, and there is no column `prompt`",
                "Add the column `prompt`.",
            )
        return None

    def _other_form(self, value: Any) -> tuple[str, str]:
        completion = next((column for column in self.contents if column != "prompt"), "prompt")
        return (
            f"is {FORMS[type(value)]}, and `{completion}` of the first row {FORMS[self.form]}",
            "Give all of them in one form: a text t is the messages "
            '`[{"role": "user", "content": t}]` as a prompt and the same with "assistant" as a completion. If the '
            "completions are conversations that repeat the prompt, remove the column `prompt`.",
        )

    def require(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Give back a row that is right.

        Raises:
            `ValueError`: with a sentence that names the data set, the row, the column, the value and the remedy.
        """
        if wrong := self.wrong(row):
            column, what, remedy = wrong
            raise ValueError(f"`{self.name}`, row {index} (counted from 0): the column `{column}` {what}. {remedy}")
        return row

    def surely_right(self, table: pa.Table) -> np.ndarray:
        """For each row of a table, `(n,)`: whether `wrong` certainly finds nothing."""
        arrays = {column: as_array(table[column]) for column in self.columns}
        result = np.ones(len(table), dtype=bool)
        for column, kind in self.columns.items():
            result &= kind.surely_right(arrays[column])
            if isinstance(kind, Content) and is_text(arrays[column].type) != (self.form is str):
                return np.zeros(len(table), dtype=bool)
        if self.extracts_prompt:
            result[result] = _surely_begin_alike(
                *(arrays[column].filter(pa.array(result)) for column in ("chosen", "rejected"))
            )
        return result


def says_nothing(content: str | list[dict[str, Any]]) -> bool:
    """Whether a right text or list of messages ends without text."""
    return ends_blank(content) if isinstance(content, list) else not content.strip()


def _begin_alike(chosen: Any, rejected: Any) -> bool:
    """Whether TRL's `extract_prompt` finds a prompt: the last entry of the shorter one never belongs to it."""
    return min(len(chosen), len(rejected)) > 1 and chosen[0] == rejected[0]


def _first(form: type | None) -> str:
    return "first characters" if form is str else "first messages"


def _surely_begin_alike(chosen: pa.Array, rejected: pa.Array) -> np.ndarray:
    if not len(chosen):
        return no_rows(chosen)
    if is_text(chosen.type):
        firsts = [pc.utf8_slice_codeunits(array, 0, 1) for array in (chosen, rejected)]
        longer = [pc.greater(pc.utf8_length(array), 1) for array in (chosen, rejected)]
        return is_true(pc.and_(pc.equal(*firsts), pc.and_(*longer)))
    result = (lengths(chosen) > 1) & (lengths(rejected) > 1)
    first, second = (message_fields(pc.list_slice(array, 0, 1)) for array in (chosen, rejected))
    if first is None or second is None:
        return no_rows(chosen)
    for left, right in zip(first[:2], second[:2], strict=True):
        result &= is_true(pc.equal(left, right.cast(left.type)))
    return result


def as_array(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, its dictionary-encoded texts written out."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of no chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


# Columns


def make_rules(
    name: str,
    method: str,
    first_row: dict[str, Any],
    used: tuple[str, ...] = (),
    read: tuple[str, ...] = (),
    tokenised: bool = True,
) -> Rules:
    """The rules that the columns of the first row call for.

    Args:
        name: the data set's, for messages.
        method: "dpo", "kto" (which also takes pairs), "prompts", or what a file of labels holds, "scores" or
            "preferences".
        used: further columns of `COLUMNS` that have to be there.
        read: further columns of `COLUMNS` that are looked at where they are there.
        tokenised: whether token ids may take the place of text.

    Raises:
        `ValueError`: if a column is missing or there twice, or tokens are given where text is needed.
    """
    wanted = _wanted(method, set(first_row))
    is_tokenised = "prompt_ids" in wanted
    if is_tokenised and not tokenised:
        raise ValueError(f"`{name}` is tokenised already (`prompt_ids`): text is needed here. Give the text columns.")
    _require_columns(name, method, wanted, first_row)
    _require_used(name, used, first_row)
    for column in wanted:
        if f"{column}.1" in first_row:
            raise ValueError(
                f"`{name}` has the column `{column}` twice (the second is read as `{column}.1`): remove or rename one "
                "of the two."
            )
    columns = wanted | {column: COLUMNS[column] for column in (*used, *read) if column in first_row}
    columns |= {column: kind for column, kind in ALWAYS.items() if column in first_row}
    if is_tokenised or method in ("scores", "preferences"):
        return Rules(name, columns)
    leading = [first_row[column] for column in ("chosen", "completion", "rejected", "prompt") if column in wanted]
    return Rules(name, columns, next((type(value) for value in leading if isinstance(value, str | list)), str))


def _wanted(method: str, present: set[str]) -> dict[str, Kind]:
    given = {"prompts": PROMPTS, "scores": SCORES, "preferences": PREFERENCES}
    if method in given:
        return given[method]
    paired = method == "dpo" or {"chosen", "rejected"} <= present
    text, ids = (PAIRS, TOKENISED_PAIRS) if paired else (LABELLED, TOKENISED_LABELLED)
    if "prompt_ids" in present and not text.keys() <= present:
        return ids
    if paired and "prompt" not in present:
        return {column: kind for column, kind in text.items() if column != "prompt"}
    return text


def _require_used(name: str, used: tuple[str, ...], first_row: dict[str, Any]) -> None:
    missing = [column for column in used if column not in first_row]
    if missing:
        raise ValueError(
            f"`{name}` lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}, which the loss reads; it has "
            f"{', '.join(sorted(map(str, first_row)))}. Add the column, or use another loss."
        )


def _require_columns(name: str, method: str, wanted: Iterable[str], first_row: dict[str, Any]) -> None:
    missing = sorted(set(wanted) - set(first_row))
    if not missing:
        return
    if method == "dpo" and {"completion", "label"} <= set(first_row):
        hint = "It looks like unpaired data (`completion`, `label`): use `KTOTrainer` (`trl-rdro kto`) for it."
    else:
        near = {}
        for column in missing:
            tidied = {str(other).strip().lower(): other for other in first_row if other not in wanted}
            if found := difflib.get_close_matches(column, tidied, n=1, cutoff=0.8):
                near[column] = tidied[found[0]]
        renames = "".join(f".rename_column({old!r}, {new!r})" for new, old in near.items())
        hint = f"Rename the columns (`dataset{renames or '.rename_column'}`)" + (
            ", and give the prompt as `prompt`." if method == "dpo" else "."
        )
    raise ValueError(
        f"`{name}` lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} of {DESCRIPTIONS[method]}; it has "
        f"{', '.join(sorted(map(str, first_row)))}. {hint}"
    )
