"""
What the data preparation scripts share: reading rows as a stream, and writing JSON lines so that a killed run goes on.

The output only grows. Beside it lies `.<output>.state.json` (a dot file, which `load_dataset` does not take for data):
how many input rows are behind, and the length of the output at that point. A run that finds both cuts the output to
that length, skips those rows, and continues; one that finds the settings of another run refuses. When all is done the
state file says so, and running again does nothing.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from tqdm import tqdm


BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

Row = dict[str, Any]


def stream(source: str, split: str) -> IterableDataset:
    """The rows of a hub data set, a local directory or a local file, one after another."""
    suffix = Path(source).suffix
    if Path(source).is_file():
        if suffix not in BUILDERS:
            sys.exit(f"cannot read {source}: its type is not one of {', '.join(BUILDERS)}")
        return load_dataset(BUILDERS[suffix], data_files=source, split="train", streaming=True)
    if suffix in BUILDERS:
        sys.exit(f"no such file: {source}")
    return load_dataset(source, split=split, streaming=True)


class Output:
    """A JSON lines file that is written in steps, each of which either counts as a whole or not at all."""

    def __init__(self, path: str | Path, settings: Row):
        self.path = Path(path)
        self.state_path = self.path.with_name(f".{self.path.name}.state.json")
        self.settings = settings
        self.rows_read = self.rows_written = self.bytes = 0
        self.done = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self._resume()
        elif self.path.exists():
            sys.exit(f"{self.path} exists and was not begun by this script: remove it or name another file")
        else:
            self._write_state()  # before the output, which is refused without one
        if self.done:
            return
        self._file = open(self.path, "ab")  # noqa: SIM115  (closed by `finish`)
        self._file.truncate(self.bytes)

    def _resume(self) -> None:
        state = json.loads(self.state_path.read_text())
        if state["settings"] != self.settings:
            sys.exit(
                f"{self.path} was begun with other settings ({state['settings']}): name another file or remove it"
            )
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < state["bytes"]:
            sys.exit(f"{self.path} is shorter than {self.state_path} says: remove both and start again")
        self.bytes = state["bytes"]
        self.rows_read, self.rows_written, self.done = state["rows_read"], state["rows_written"], state["done"]
        print(f"{self.path}: {'complete' if self.done else 'resuming'} after {self.rows_read} rows", file=sys.stderr)

    def step(self, rows_read: int, rows: Iterable[Row]) -> None:
        """Append `rows`, which come from the next `rows_read` rows of the input."""
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self.rows_written += 1
        self.rows_read += rows_read
        self._save_state()

    def finish(self) -> None:
        self.done = True
        self._save_state()
        self._file.close()
        print(f"{self.path}: {self.rows_written} rows from {self.rows_read}", file=sys.stderr)

    def _save_state(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.bytes = self._file.tell()
        self._write_state()

    def _write_state(self) -> None:
        state = {"rows_read": self.rows_read, "rows_written": self.rows_written, "bytes": self.bytes}
        state |= {"done": self.done, "settings": self.settings}
        partial = self.state_path.with_name(self.state_path.name + ".part")
        with open(partial, "w") as file:
            file.write(json.dumps(state))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.state_path)


def remaining(rows: Iterable[Row], output: Output, limit: int | None, unit: str = "row") -> Iterator[Row]:
    """The rows that are not behind yet, with a progress bar."""
    if hasattr(rows, "skip"):
        rows = rows.skip(output.rows_read)
    else:
        rows = islice(rows, output.rows_read, None)
    left = None if limit is None else max(limit - output.rows_read, 0)
    total = limit
    return iter(tqdm(islice(rows, left), initial=output.rows_read, total=total, unit=f" {unit}s", mininterval=1.0))
