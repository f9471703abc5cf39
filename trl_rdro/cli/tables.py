"""Tables for a terminal."""

import shutil
import sys
import textwrap
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """
    A line for each row, its columns padded to their widest cell.

    Args:
        rows: cells, as many in each row.
        numbers: align all columns but the first at the right. Otherwise all are texts, and in a terminal the last one
            is shortened to what is left of the line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if not numbers:
        room = max(shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * (len(widths) - 1), 40)
        if sys.stdout.isatty():
            rows = [[*cells, textwrap.shorten(last, room, placeholder=" ...")] for *cells, last in rows]
    return ["  ".join(_padded(row, widths, numbers)).rstrip() for row in rows]


def _padded(row: Sequence[str], widths: Sequence[int], numbers: bool) -> list[str]:
    return [
        cell.rjust(width) if numbers and i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
