"""What the columns beside the texts hold: how numbers are distributed, and how often each name occurs."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..checks.columns import COLUMNS, Number


MAX_NAMES = 10
QUANTILES = {"5 %": 0.05, "50 %": 0.5, "95 %": 0.95}


def percentile(ordered: list[Any], q: float) -> Any:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def column_lines(columns: dict[str, list[Any]]) -> Iterator[str]:
    """A line for each of some `checks.columns.COLUMNS`, whose values are known to be right."""
    for name, values in columns.items():
        yield f"{name}: {_distribution(values) if isinstance(COLUMNS[name], Number) else _counts(values)}"


def _distribution(values: list[float]) -> str:
    ordered = sorted(values)
    figures = {"mean": sum(values) / len(values), "min": ordered[0]}
    figures |= {title: percentile(ordered, q) for title, q in QUANTILES.items()} | {"max": ordered[-1]}
    zeros = sum(value == 0 for value in values)
    return ", ".join(f"{title} {value:.4g}" for title, value in figures.items()) + f", {zeros} are 0" * (zeros > 0)


def _counts(values: list[Any]) -> str:
    counts = Counter(map(str, values)).most_common()
    shown = [f"{name[:40]} {count} ({count / len(values):.1%})" for name, count in counts[:MAX_NAMES]]
    return f"{len(counts)} in all: " + ", ".join(shown) + ", ..." * (len(counts) > MAX_NAMES)
