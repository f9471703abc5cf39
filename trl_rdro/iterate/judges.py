"""
Who says which completion is better: reward functions, a preference function, or a file of labels.

A judge compares two completions of a prompt by the probability that the first wins; one that gives rewards also scores
single completions. Prompts are rows of the data set, whose other columns go to the functions as keyword arguments.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checks.datasets import check_rows
from ..errors import UserError, user_error
from ..run.files import Row, read_rows
from .config import IterateConfig
from .functions import ask, load_function, name_of, source_of


class MissingLabels(ValueError):
    """The labelled file lacks these rows."""

    def __init__(self, rows: list[Row]):
        super().__init__(f"{len(rows)} rows have no label")
        self.rows = rows


class Judge:
    """Compares completions. `gives_rewards` tells whether it also scores them."""

    gives_rewards = True
    functions: Sequence[Callable] = ()

    def source(self) -> str | None:
        """A checksum of the text of its functions and of what they hold (not of what they call), or None for a file of
        labels, which may grow."""
        texts = [source_of(function) for function in self.functions]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12] if texts else None

    def rewards(self, rows: Sequence[Row], completions: Sequence[str]) -> list[float]:
        """The reward of each completion; `rows` has its prompt's row."""
        raise NotImplementedError

    def preferences(self, rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """The probability that each of `first` beats its counterpart in `second`."""
        pairs = zip(self.rewards(rows, first), self.rewards(rows, second), strict=True)
        return [0.5 if a == b else float(a > b) for a, b in pairs]


class RewardFunctions(Judge):
    """The weighted sum of reward functions with TRL's signature."""

    def __init__(self, functions: Sequence[Callable[..., list[float]]], weights: Sequence[float] | None):
        self.functions = functions
        self.weights = [1.0] * len(functions) if weights is None else weights

    def rewards(self, rows, completions):
        totals = [0.0] * len(completions)
        arguments = {**_columns(rows), "completions": _as_messages(rows, completions)}
        for function, weight in zip(self.functions, self.weights, strict=True):
            values = ask(function, len(rows), prompts=[row["prompt"] for row in rows], **arguments)
            totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
        if bad := [total for total in totals if not math.isfinite(total)]:
            raise UserError(
                f"The weighted rewards of `{'`, `'.join(map(name_of, self.functions))}` sum to {bad[0]}, got weights "
                f"{self.weights}. Let the functions return smaller numbers, or lower `reward_weights`."
            )
        return totals


class PreferenceFunction(Judge):
    gives_rewards = False

    def __init__(self, function: Callable[..., list[float]]):
        self.function, self.functions = function, [function]

    def preferences(self, rows, first, second):
        prompts = [row["prompt"] for row in rows]
        conversations = {"first": _as_messages(rows, first), "second": _as_messages(rows, second)}
        values = ask(self.function, len(rows), prompts=prompts, **conversations, **_columns(rows))
        if bad := [value for value in values if not 0 <= value <= 1]:
            raise UserError(f"`{name_of(self.function)}` must return probabilities in [0, 1], got {bad[0]!r}.")
        return values


class LabelledScores(Judge):
    """Scores looked up in rows of prompt, completion, score; the mean where there are several."""

    def __init__(self, rows: list[Row]):
        self.labels = _collect((_key(row["prompt"], row["completion"]), float(row["score"])) for row in rows)

    def rewards(self, rows, completions):
        wanted = [_key(row["prompt"], text) for row, text in zip(rows, completions, strict=True)]
        missing = {
            key: {"prompt": row["prompt"], "completion": text, "score": None}
            for key, row, text in zip(wanted, rows, completions, strict=True)
            if key not in self.labels
        }
        if missing:
            raise MissingLabels(list(missing.values()))
        return [self.labels[key] for key in wanted]


class LabelledPairs(Judge):
    """Shares of wins looked up in rows of prompt, chosen, rejected."""

    gives_rewards = False

    def __init__(self, rows: list[Row]):
        wins = [(_key(row["prompt"], row["chosen"], row["rejected"]), 1.0) for row in rows]
        losses = [(_key(row["prompt"], row["rejected"], row["chosen"]), 0.0) for row in rows]
        self.labels = _collect([*wins, *losses])

    def preferences(self, rows, first, second):
        triples = list(zip(rows, first, second, strict=True))
        missing = {
            _key(row["prompt"], a, b): {"prompt": row["prompt"], "chosen": a, "rejected": b}
            for row, a, b in triples
            if a != b and _key(row["prompt"], a, b) not in self.labels
        }
        if missing:
            raise MissingLabels(list(missing.values()))
        return [0.5 if a == b else self.labels[_key(row["prompt"], a, b)] for row, a, b in triples]


def make_judge(config: IterateConfig) -> Judge:
    """The judge that the configuration names. Raises `UserError` for what cannot be found."""
    if config.reward_funcs:
        return RewardFunctions([load_function(path) for path in config.reward_funcs], config.reward_weights)
    if config.preference_func:
        return PreferenceFunction(load_function(config.preference_func))
    assert config.labelled_file is not None  # one of the three is given
    return _read_labels(Path(config.labelled_file))


def _read_labels(path: Path) -> Judge:
    if not path.is_file():
        raise UserError(f"`labelled_file` must be a file of JSON lines, and {path} is not a file.")
    with user_error(OSError, ValueError, RecursionError, prefix=f"`labelled_file` {path} is not JSON lines: "):
        rows = read_rows(path)
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"`labelled_file` {path} must have a mapping in each line, and at least one.")
    kinds = (
        (LabelledScores, "scores", ("prompt", "completion", "score")),
        (LabelledPairs, "preferences", ("prompt", "chosen", "rejected")),
    )
    for kind, method, columns in kinds:
        if set(columns) <= set(rows[0]):
            with user_error(ValueError):
                check_rows(rows, f"labelled_file={path}", method)
            return kind(rows)
    raise UserError(
        "`labelled_file` must have the columns prompt, completion, score or prompt, chosen, rejected; it has "
        f"{', '.join(sorted(rows[0]))}."
    )


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns besides the prompt, as TRL passes them to reward functions."""
    return (
        {key: [row.get(key) for row in rows] for key in rows[0] if key not in ("prompt", "completion")} if rows else {}
    )


def _as_messages(rows: Sequence[Row], completions: Sequence[str]) -> list[Any]:
    """Completions in the format of their prompts: text, or a conversation of one message."""
    return [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, completions, strict=True)
    ]


def _key(*parts: Any) -> str:
    """Prompt and completions as one string; a conversation of one answer is that answer's text."""
    prompt, *completions = parts
    return json.dumps([prompt, *(text if isinstance(text, str) else text[-1]["content"] for text in completions)])


def _collect(labels: Any) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for key, value in labels:
        values.setdefault(key, []).append(value)
    return {key: sum(several) / len(several) for key, several in values.items()}
