"""Files that are there as a whole or not at all: written beside their place, then renamed."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


Row = dict[str, Any]


def partial(path: Path) -> Path:
    """Where `path` is written until it is complete."""
    return path.with_name(path.name + ".part")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial(path), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial(path), path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    # Not `splitlines`, which would also cut at the line separators that JSON leaves inside strings
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
