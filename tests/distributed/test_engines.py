"""The same training on every engine: losses, gradient norms and parameters equal those of a single process."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from trl_rdro.compat import engines
from trl_rdro.losses.types import of_family
from trl_rdro.trainers.normalisation import NAME

from .matrix import CELLS, ENGINES, REFUSED, SPLIT_ENGINES, Cell, require_equal, runs, split_cells


pytestmark = pytest.mark.slow

DISTRIBUTED = [engine for engine in ENGINES if engine != "single"]


def each(engines, cells):
    """`(engine, cell)` of all that can be run."""
    pairs = [(engine, cell) for engine in engines for cell in cells if runs(engine, cell)]
    return pytest.mark.parametrize(
        ("engine", "cell"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}") for pair in pairs]
    )


@each(DISTRIBUTED, CELLS)
def test_equals_single_process(launches, engine, cell):
    require_equal(launches.result(engine, cell), launches.result("single", cell), cell)


def test_a_cell_is_known_by_its_name():
    assert len({cell.name for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.packed], ids=lambda cell: cell.name)
def test_packed_equals_padded(launches, cell):
    """With the above, on every engine."""
    padded = replace(cell, packed=False)
    require_equal(launches.result("single", cell), launches.result("single", padded), cell)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell_trains(launches, cell):
    """What the others are compared with is a run that moves, and whose steps differ."""
    run = launches.result("single", cell)
    assert len(run["loss"]) == len(set(run["loss"])) == cell.steps
    assert all(norm > 0 for norm in run["grad_norm"])
    moved = [name for name, value in run["after"].items() if not value.equal(run["before"][name])]
    assert len(moved) == len(run["after"])


@pytest.mark.parametrize(
    ("engine", "cell"),
    [
        pytest.param(engine, cell, id=f"{engine}-{cell.name}")
        for engine in SPLIT_ENGINES
        for cell in split_cells(ENGINES[engine])
    ],
)
def test_split_invariance(launches, engine, cell):
    """One step of the same eight samples, cut into ranks and micro-batches. A loss that couples a micro-step
    (`wdpo_rms`: the root spans its ranks) only where that is the whole batch."""
    whole = Cell(cell.loss, micro_batch=8, steps=1)
    require_equal(launches.result(engine, cell), launches.result("single", whole), cell)


@each(DISTRIBUTED, [cell for cell in CELLS if cell.loss in of_family("density_ratio")])
def test_the_test_of_the_reference_spans_the_ranks(launches, engine, cell):
    logs = zip(launches.result(engine, cell)["logs"], launches.result("single", cell)["logs"], strict=True)
    for of_ranks, of_one in logs:
        assert of_ranks[NAME] == pytest.approx(of_one[NAME], abs=1e-3 if cell.dtype == "fp32" else 0.3)


@each(ENGINES, [cell for cell in CELLS if cell.loss == "wdpo"])
def test_central_difference(launches, engine, cell):
    """The slope that WDPO measures is the gradient's norm: also where an engine computes or returns bf16."""
    gaps = [log["wdpo/gap"] for log in launches.result(engine, cell)["logs"]]
    assert max(gaps) < (1e-3 if cell.dtype == "fp32" else 0.03)


def test_two_forwards_are_refused_with_reentrant_checkpointing(launches):
    for refused in REFUSED:
        with pytest.raises(pytest.fail.Exception, match="`wdpo` makes two forwards for one backward where"):
            launches.result(*refused)


def test_one_sided_refuses_deepspeed():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    assert engines.reason_for_one_backward(accelerator) == "DeepSpeed takes each backward pass for a micro-batch"


def test_wdpo_refuses_fsdp1():
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match="`wdpo` does not run with FSDP1.* Use FSDP2"):
        engines.refuse_fsdp1(accelerator, "wdpo")
