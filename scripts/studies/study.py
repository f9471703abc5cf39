"""
What the studies share: a grid of cells that are trained and measured one by one, kept as they finish, and summed up.

A study is a module that makes a `Study`. Each of its cells is a dict that says what is trained (method, seed, ...);
`run` turns it into a dict of measurements. Finished cells are lines of `cells.jsonl` in the output folder, so that the
same command goes on where it was interrupted. When all are there, the folder also gets

    cells.csv        the same, as a table
    summary.json     mean, standard error and number of seeds of every measurement, with command, hardware and versions
    table.md         the table that docs/studies.md shows
    figure.png
"""

import argparse
import csv
import importlib
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm


sys.path.append(str(Path(__file__).resolve().parents[1]))  # the other scripts

from machine import processor_name  # noqa: E402
from smollm2 import MODEL_NAME  # noqa: E402


Row = dict[str, Any]
SIZES = ("ci", "small", "full")

# Config fields of runs so small that they are over before a GPU would pay
TINY_RUN = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "weight_decay": 0.0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass
class Study:
    """
    Args:
        module: the name of the study's file, which worker processes import.
        cells: of a size ("ci": seconds, for the tests; "small": minutes on a CPU; "full": a GPU), the cells to run.
        run: measures a cell, given the folder in which it may keep what cells share.
        table: of the finished cells (cell and measurements in one dict each), a Markdown table.
        draw: of the finished cells, a matplotlib figure.
        takes_model: for studies of language models: `--model` names another than the default, and cells have the
            `model` and the `size`.
    """

    module: str
    cells: Callable[[str], list[Row]]
    run: Callable[[Row, Path], Row]
    table: Callable[[list[Row]], str]
    draw: Callable[[list[Row]], Any]
    takes_model: bool = False


def main(study: Study, argv: list[str] | None = None) -> list[Row]:
    """The command line of a study. Returns the finished cells."""
    name, description = study.module, sys.modules[study.run.__module__].__doc__.strip()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--output_dir", type=Path, help=f"default: runs/studies/{name}-SIZE")
    parser.add_argument("--workers", type=int, default=1, help="cells to run at a time, each in a process")
    if study.takes_model:
        parser.add_argument("--model", default=MODEL_NAME, help="id or directory (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = args.output_dir or Path("runs") / "studies" / f"{name}-{args.size}"
    folder.mkdir(parents=True, exist_ok=True)

    cells = study.cells(args.size)
    if study.takes_model:
        cells = [{"model": args.model, "size": args.size, **cell} for cell in cells]
    rows = run_cells(study, cells, folder, args.workers)
    write_results(study, rows, folder, shlex.join(["python", f"scripts/studies/{name}.py", *(argv or sys.argv[1:])]))
    print(study.table(rows))
    print(f"{folder}/: cells.jsonl, cells.csv, summary.json, table.md, figure.png")
    return rows


def run_cells(study: Study, cells: list[Row], folder: Path, workers: int) -> list[Row]:
    """Run the cells that are not in `cells.jsonl` yet. Returns all of them, in the order of `cells`."""
    record = folder / "cells.jsonl"
    finished = {key(row["cell"]): row for row in read_lines(record)}
    missing = [cell for cell in cells if key(cell) not in finished]
    progress = tqdm(total=len(cells), initial=len(cells) - len(missing), unit="cell", desc=study.module)
    with progress, open(record, "a") as file:
        for row in _results(study, missing, folder, workers):
            file.write(json.dumps(row) + "\n")
            file.flush()
            finished[key(row["cell"])] = row
            progress.update()
    return [{**cell, **finished[key(cell)]["result"]} for cell in cells]


def key(cell: Row) -> str:
    return json.dumps(cell, sort_keys=True)


def read_lines(record: Path) -> Iterator[Row]:
    """The whole lines of a file that may end in the half of one."""
    if record.exists():
        text = record.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            record.write_text(whole)
        yield from map(json.loads, whole.splitlines())


def _results(study: Study, cells: list[Row], folder: Path, workers: int) -> Iterator[Row]:
    if workers == 1:
        quiet()
        yield from (measure(study.run, cell, folder) for cell in cells)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=quiet, initargs=(threads,)) as pool:
        futures = [pool.submit(_measure_by_name, study.module, cell, folder) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _measure_by_name(module: str, cell: Row, folder: Path) -> Row:
    return measure(importlib.import_module(module).run, cell, folder)


def measure(run: Callable[[Row, Path], Row], cell: Row, folder: Path) -> Row:
    started = time.monotonic()
    result = run(cell, folder)
    return {"cell": cell, "result": result, "seconds": round(time.monotonic() - started, 2)}


def quiet(threads: int | None = None) -> None:
    """Of a hundred short runs nobody reads the libraries' notices."""
    import datasets
    import torch
    import transformers

    if threads is not None:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def train(trainer: Any) -> None:
    """`trainer.train()`, without its last line."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()


# Results


def group(rows: list[Row], by: list[str]) -> dict[tuple, list[Row]]:
    """Rows by the values of some of their columns, in the order in which they first occur."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    return groups


def mean_and_error(rows: list[Row], column: str) -> tuple[float, float | None]:
    """Mean over the rows and its standard error, from the spread between them (None for one row)."""
    values = [row[column] for row in rows if row.get(column) is not None]
    if not values:
        return math.nan, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def cell_text(rows: list[Row], column: str, form: str = ".3f") -> str:
    """`mean ± standard error` for a table."""
    mean, error = mean_and_error(rows, column)
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form.removeprefix('+')}}"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def error_bars(axes: Any, rows: list[Row], x: str, y: str, **style: Any) -> None:
    """The mean of `y` over the seeds, and its standard error, against `x`."""
    points = [(value, *mean_and_error(members, y)) for (value,), members in group(rows, [x]).items()]
    xs, means, errors = zip(*sorted(points), strict=True)
    axes.errorbar(xs, means, [error or 0.0 for error in errors], marker="o", markersize=3, **style)


def write_results(study: Study, rows: list[Row], folder: Path, command: str) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "cells.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

    lines = list(read_lines(folder / "cells.jsonl"))
    settings = [name for name in columns if name in lines[0]["cell"] and name != "seed"]
    measured = [name for name in columns if isinstance(lines[0]["result"].get(name), int | float)]
    summary = []
    for values, members in group(rows, settings).items():
        figures = {}
        for name in measured:
            mean, error = mean_and_error(members, name)
            if not math.isnan(mean):
                figures[name] = {"mean": mean, "standard_error": error}
        summary.append({**dict(zip(settings, values, strict=True)), "seeds": len(members), **figures})
    seconds = round(sum(line["seconds"] for line in lines), 1)
    facts = {"command": command, **provenance(), "cell_seconds": seconds, "cells": summary}
    (folder / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "table.md").write_text(study.table(rows))
    study.draw(rows).savefig(folder / "figure.png", dpi=100)


def provenance() -> Row:
    """Hardware, versions and date."""
    import datasets
    import torch
    import transformers
    import trl

    import trl_rdro

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    modules = (trl_rdro, trl, transformers, datasets, torch)
    return {
        "hardware": gpu or f"{processor_name()}, {os.cpu_count()} cores, no GPU",
        "versions": {module.__name__: module.__version__ for module in modules},
        "date": datetime.now(UTC).date().isoformat(),
    }
