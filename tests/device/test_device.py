"""The trainers on a device that is not the CPU, without one: nothing lies in the wrong place, nothing waits that need
not, and the numbers are the CPU's. The next best thing to a GPU."""

import json
from pathlib import Path

import pytest

from .. import processes
from . import worker
from .cases import CASES
from .fake_device import NAME, missing


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=f"no device can be built: {missing()}"),
]
# Looking at the metrics is one wait in a micro-batch, and so is looking at TRL's own loss. A step ends with the
# gradient's norm, and what a loss has learned.
PER_BATCH = {"means_and_more": 1}
PER_STEP = {"Safeguards._get_grad_norm": 1, "LossState.on_step_end": 3, "StepWeights.mean": 1}


def results_on(device: str, folder: Path) -> dict:
    (code,) = processes.run(worker.main, device, str(folder), log=folder / "log")
    assert code == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "results.json").read_text())


def too_many(name: str, waits: dict[str, float]) -> dict[str, float]:
    """The functions of ours that let the host wait more often than they may."""
    case = CASES[name]
    allowed = PER_BATCH | case.waits | {function: n / case.micro_batches for function, n in PER_STEP.items()}
    return {function: n for function, n in waits.items() if n > allowed.get(function, 0)}


def test_on_a_device(tmp_path):
    """In one test, because every process that asked would build the device and import everything anew."""
    folders = {device: tmp_path / device for device in ("cpu", NAME)}
    for folder in folders.values():
        folder.mkdir()
    on_device, on_cpu = results_on(NAME, folders[NAME]), results_on("cpu", folders["cpu"])["cases"]

    cases = on_device["cases"]
    assert cases.keys() == CASES.keys()
    assert {name: result["faults"] for name, result in cases.items() if result["faults"]} == {}
    assert {name: found for name in cases if (found := too_many(name, cases[name]["waits"]))} == {}
    for name, expected in on_cpu.items():
        assert len(cases[name]["log"]) == len(expected["log"]) > 0
        for ours, theirs in zip(cases[name]["log"], expected["log"], strict=True):
            numbers = {key: value for key, value in theirs.items() if not key.endswith("wdpo/gap")}  # of rounding
            assert {key: ours[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6), name

    # Both passes see the same masks: with others the gap would be above 1
    assert max(entry["wdpo/gap"] for entry in cases["wdpo dropout"]["log"] if "wdpo/gap" in entry) < 0.02
    assert on_device["noise"] == {"drawn": True, "restored": True, "same": True}
    assert on_device["sampling"]["faults"] == []
    assert on_device["sampling"]["scores"] == pytest.approx(on_device["sampling"]["on_cpu"], rel=1e-5)
    # And mistakes made on purpose are seen
    assert {kind: kind in noted for kind, noted in on_device["watch"].items()} == dict.fromkeys(
        on_device["watch"], True
    )
