"""Starting an engine: once in a test run, whichever of pytest's processes asks first."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from filelock import FileLock

from trl_rdro.losses.types import LOSS_TYPES

from .. import processes
from ..tiny import save_tiny, tiny_preferences, tiny_qwen2, with_columns
from . import worker
from .matrix import ENGINES, STEP_SIZE, STEPS, Cell, cells_of


def write_inputs(folder: Path) -> None:
    """The models and the data of all cells, on disk: precomputing needs files, and all processes read the same."""
    for name, seed in (("policy", 1), ("reference", 0)):
        # Weights that bf16 can represent: ZeRO rounds them in bf16 cells, and is to start where the others do
        rounded = tiny_qwen2(seed=seed).bfloat16().float()
        path = save_tiny(folder / name, seed=seed)
        rounded.save_pretrained(path)
    pairs = list(tiny_preferences(STEPS * STEP_SIZE))
    # Ten of the 24 are preferred, so that class weights matter
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if i % 12 < 5 else "rejected"], "label": i % 12 < 5}
        for i, pair in enumerate(pairs)
    ]
    weights = [(1.0, 0.5, 2.0)[i % 3] for i in range(len(pairs))]
    annotators = [("ann", "bo", "ann", "cy", "bo")[i % 5] for i in range(len(pairs))]
    columns = with_columns(Dataset.from_list(pairs), LOSS_TYPES)
    columns = columns.add_column("weight", weights).add_column("annotator", annotators)
    for name, examples in (("pairs", pairs), ("unpaired", rows), ("pairs_with_columns", columns.to_list())):
        Dataset.from_list(examples).to_json(folder / f"{name}.jsonl")


def run_cells(engine: str, cells: list[Cell], inputs: Path, output: Path) -> None:
    """Run `cells` in one start of `engine`."""
    write_cells(cells, output)
    processes.run(worker.main, engine, str(inputs), str(output), log=output / "log", processes=ENGINES[engine])
    require_done(engine, output)


def run_on_nodes(launchers: list[list[str]], engine: str, cells: list[Cell], inputs: Path, output: Path) -> None:
    """Run `cells` in one launch of `engine` by commands, one for each node."""
    write_cells(cells, output)
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    nodes = []
    with open(output / "log", "a") as log:
        for launcher in launchers:
            command = [*launcher, worker.__file__, engine, str(inputs), str(output)]
            nodes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        for node in nodes:
            node.wait(processes.TIMEOUT)
    finally:
        for node in nodes:
            node.kill()
    require_done(engine, output)


def write_cells(cells: list[Cell], output: Path) -> None:
    output.mkdir()
    (output / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))


def require_done(engine: str, output: Path) -> None:
    done = len(list(output.glob("done.*")))
    if done != ENGINES[engine]:
        log = (output / "log").read_text()[-6000:]
        raise RuntimeError(f"{done} of {ENGINES[engine]} processes of {engine} came to their end:\n{log}")


class Launches:
    """The results of launches, by engine and cell."""

    def __init__(self, root: Path):
        self.root = root

    def once(self, name: str, action: Callable[[Path], None]) -> Path:
        """The folder `name`, made by `action` in the first process that needs it; its failure is everybody's."""
        folder, marker = self.root / name, self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not marker.exists():
                try:
                    action(folder)
                    marker.write_text("")
                except Exception as error:
                    marker.write_text(f"{error}" or type(error).__name__)
                    raise
        if failure := marker.read_text():
            pytest.fail(f"{name}: {failure}", pytrace=False)
        return folder

    def inputs(self) -> Path:
        return self.once("inputs", write_inputs)

    def result(self, engine: str, cell: Cell) -> dict[str, Any]:
        inputs = self.inputs()
        folder = self.once(engine, lambda output: run_cells(engine, cells_of(engine), inputs, output))
        return read_result(folder, cell)


def read_result(folder: Path, cell: Cell) -> dict[str, Any]:
    if failures := sorted(folder.glob(f"{cell.name}.rank*.err")):
        pytest.fail("\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in failures), pytrace=False)
    return torch.load(folder / f"{cell.name}.pt")


@pytest.fixture(scope="session")
def launches(tmp_path_factory) -> Iterator[Launches]:
    base = tmp_path_factory.getbasetemp()
    # With pytest-xdist each process has a folder of its own below the one they share
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "engines"
    root.mkdir(exist_ok=True)
    yield Launches(root)
