"""What is odd in data without being wrong: counted in the same pass, said in a warning."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..log import get_logger
from .arrow import is_text, is_true, lengths, no_rows
from .messages import message_fields
from .rules import Rules, as_array, says_nothing


logger = get_logger(__name__)

SAMPLE = 1000  # rows in which it is looked for repeated prompts
USUAL = 0.9  # the share of them from which on it is no accident: a completion may well quote its prompt
EQUAL = "`{}` and `rejected` are the same"
BLANK = "`{}` has no text"
REPEATED = "`{}` begins with the prompt, which is then there twice"


class Oddities:
    """Counts of what is odd in the rows of a data set, with the first row of each."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.rows, self.sampled = 0, 0
        self.found: dict[tuple[str, str], tuple[int, int]] = {}  # sentence, column -> number of rows, the first
        self.completions = [column for column in rules.contents if column != "prompt"]

    def add_row(self, row: dict[str, Any], index: int) -> None:
        """Look at a row that is right."""
        self.rows += 1
        for column in self.completions:
            if says_nothing(row[column]):
                self._add(BLANK, column, 1, index)
        if "chosen" in self.completions and row["chosen"] == row["rejected"]:
            self._add(EQUAL, "chosen", 1, index)
        if self.sampled < SAMPLE:
            self._look_for_prompt(row, index)

    def add_table(self, table: pa.Table, numbers: np.ndarray, sure: np.ndarray) -> None:
        """Look at the rows of a table that are surely right, and so not blank. `numbers`: theirs in the data set."""
        self.rows += int(sure.sum())
        if "chosen" in self.completions and sure.any():
            equal = _equal(*(as_array(table[column]) for column in ("chosen", "rejected")))
            self._add_all(EQUAL, "chosen", numbers[equal & sure])
        if self.sampled < SAMPLE and "prompt" in self.rules.columns and self.completions:
            places = np.flatnonzero(sure)[: SAMPLE - self.sampled]
            rows = table.select(["prompt", *self.completions]).take(pa.array(places)).to_pylist()
            for number, row in zip(numbers[places].tolist(), rows, strict=True):
                self._look_for_prompt(row, number)

    def report(self) -> None:
        """Warn, or refuse a column that has no text anywhere.

        Raises:
            `ValueError`: if a column of completions is blank in every row.
        """
        for (sentence, column), (count, first) in self.found.items():
            if sentence == BLANK and 1 < count == self.rows:
                raise ValueError(
                    f"`{self.rules.name}`: the column `{column}` has no text in any row. Give the completions in it."
                )
            rows = self.sampled if sentence == REPEATED else self.rows
            if sentence != REPEATED or count >= USUAL * rows:
                what = f"{sentence.format(column)} in {count} of {rows} rows, the first of them row {first}"
                logger.warning(f"`{self.rules.name}`: {what} (counted from 0).")

    def _look_for_prompt(self, row: dict[str, Any], index: int) -> None:
        self.sampled += 1
        prompt = row.get("prompt")
        for column in self.completions:
            if prompt and row[column][: len(prompt)] == prompt:
                self._add(REPEATED, column, 1, index)

    def _add(self, sentence: str, column: str, count: int, first: int) -> None:
        before, earliest = self.found.get((sentence, column), (0, first))
        self.found[sentence, column] = before + count, min(earliest, first)

    def _add_all(self, sentence: str, column: str, numbers: np.ndarray) -> None:
        if len(numbers):
            self._add(sentence, column, len(numbers), int(numbers.min()))


def _equal(left: pa.Array, right: pa.Array) -> np.ndarray:
    """In which rows two columns of texts, or of messages with texts, are the same."""
    if is_text(left.type) and is_text(right.type):
        return is_true(pc.equal(left, right.cast(left.type)))
    fields = message_fields(left), message_fields(right)
    if None in fields:
        return no_rows(left)
    same = lengths(left) == lengths(right)
    rows = [np.repeat(np.arange(len(same)), lengths(array)) for array in (left, right)]
    masks = [pa.array(same[numbers]) for numbers in rows]
    compared = rows[0][same[rows[0]]]
    for a, b in zip(fields[0][:2], fields[1][:2], strict=True):
        equal = is_true(pc.equal(a.filter(masks[0]), b.filter(masks[1]).cast(a.type)))
        same[compared[~equal]] = False
    return same
