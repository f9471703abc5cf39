"""Starting an engine: once in a test run, whichever of pytest's processes asks first."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from filelock import FileLock

from trl_rdro.losses.types import LOSS_TYPES

from ..tiny import save_tiny, tiny_preferences, tiny_qwen2, with_columns
from .matrix import ENGINES, STEP_SIZE, STEPS, Cell, cells_of


WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 900
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def run_worker(launchers: list[list[str]], engine: str, cells: list[Cell], inputs: Path, output: Path) -> None:
    """Run `cells` in one launch of `engine`, which has one command per node."""
    output.mkdir()
    (output / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    # Data sets cached by another launch would hide what this one computes beforehand
    environment = {**os.environ, **ENVIRONMENT, "HF_DATASETS_CACHE": str(output / "cache")}
    nodes = []
    for i, launcher in enumerate(launchers):
        with open(output / f"node{i}.log", "w") as log:
            command = [*launcher, str(WORKER), engine, str(inputs), str(output)]
            nodes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        for node in nodes:
            node.wait(TIMEOUT)
    finally:
        for node in nodes:
            node.kill()
    done = len(list(output.glob("done.*")))
    if done != ENGINES[engine]:
        log = "\n".join((output / f"node{i}.log").read_text()[-3000:] for i in range(len(nodes)))
        raise RuntimeError(f"{done} of {ENGINES[engine]} processes of {engine} came to their end:\n{log}")


def launcher(engine: str) -> list[str]:
    if ENGINES[engine] == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--nproc_per_node", str(ENGINES[engine]), "--master_port", str(free_port())]


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
        folder = self.once(
            engine, lambda output: run_worker([launcher(engine)], engine, cells_of(engine), inputs, output)
        )
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
