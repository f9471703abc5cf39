"""Two launches with `machine_rank` 0 and 1, as on two nodes, make one run that equals a single process."""

import importlib.resources
import sys

import pytest

from ..helpers import free_port
from .conftest import read_result, run_on_nodes
from .matrix import MATRIX, require_equal


pytestmark = pytest.mark.slow

CELLS = [cell for cell in MATRIX if cell.loss in ("kldpo", "wdpo") and not cell.checkpointing and not cell.precomputed]

# As docs/compatibility.md says for GPUs, less the precision: these cells are fp32
CONFIGS = {"ddp": "multi_gpu", "zero3": "zero3"}


def node(engine: str, rank: int, port: int) -> list[str]:
    config = importlib.resources.files("trl.accelerate_configs") / f"{CONFIGS[engine]}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    nodes = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return [*launch, *nodes, *address, "--mixed_precision", "no"]


@pytest.fixture(scope="module", params=CONFIGS)
def two_nodes(request, launches):
    """The results of both nodes. Each ran one process: the worker asserts that the two made a world of two."""
    engine, port = request.param, free_port()
    inputs = launches.inputs()
    return launches.once(
        f"{engine}_two_nodes",
        lambda output: run_on_nodes([node(engine, rank, port) for rank in (0, 1)], engine, CELLS, inputs, output),
    )


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_nodes_equal_single_process(launches, two_nodes, cell):
    require_equal(read_result(two_nodes, cell), launches.result("single", cell), cell)
