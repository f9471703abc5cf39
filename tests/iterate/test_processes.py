"""A loop that is killed in any phase ends with the same adapter; two processes make the same data as one."""

import filecmp
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .. import processes
from . import worker


DATA = ("samples.jsonl", "judged.jsonl", "train.jsonl", "monitor.jsonl", "probe.json", "report.json")
MOMENTS = {
    "sampling": "round_001/samples.jsonl.chunks/draw-policy-00001.json",
    "scoring": "round_001/samples.jsonl.chunks/score-base-00000.json",
    "judging": "round_001/judged.jsonl",
    "pairing": "round_001/train.jsonl",
    "training, before the checkpoint": "step 1",
    "training, after it": "step 3",
    "saving": "round_001/model",
    "monitoring": "round_001/monitor.jsonl",
    "reporting": "round_001/report.json",
    "finishing": "final",
}


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory) -> Path:
    output, log = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("log") / "log"
    assert processes.run(worker.run, model, str(output), log=log) == [0], log.read_text()[-3000:]
    return output


@pytest.mark.slow
def test_killed_in_every_phase_ends_with_the_same_adapter(model, uninterrupted, tmp_path):
    output, log = tmp_path / "killed", tmp_path / "log"
    for phase, moment in MOMENTS.items():
        assert processes.run(worker.run, model, str(output), moment, log=log) == [-signal.SIGKILL], phase
    for signum in (signal.SIGTERM, signal.SIGINT):
        codes = processes.run(worker.run, model, str(output), "final", signum, log=log)
        assert codes == [128 + signum] and "Traceback" not in log.read_text()
    assert not (output / "final").exists()
    assert processes.run(worker.run, model, str(output), log=log) == [0], log.read_text()[-3000:]
    for name in ("final/adapter_model.safetensors", *(f"round_{i:03d}/{name}" for i in range(2) for name in DATA)):
        assert filecmp.cmp(uninterrupted / name, output / name, shallow=False), name
    left = [
        path.name for path in output.rglob("*") if path.name.endswith((".part", ".chunks")) or path.name == "trainer"
    ]
    assert not left
    # The adapter moved, so that equality says something
    first, last = (output / f"round_{i:03d}" / "model" / "adapter_model.safetensors" for i in range(2))
    assert not filecmp.cmp(first, last, shallow=False)


@pytest.mark.slow
def test_a_second_loop_into_the_directory_is_refused_and_the_first_goes_on(model, uninterrupted, tmp_path):
    output, log, second_log = tmp_path / "both", tmp_path / "first", tmp_path / "second"
    reached, release = tmp_path / "reached", tmp_path / "release"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(
            processes.run, worker.run_and_wait, model, str(output), str(reached), str(release), log=log
        )
        while not reached.exists() and not first.done():
            time.sleep(0.05)
        try:
            code = processes.run(worker.run, model, str(output), log=second_log)
        finally:
            release.touch()  # or else the pool would wait for the first
        assert code == [1]
        assert first.result() == [0], log.read_text()[-3000:]
    assert f"Another run is writing to `output_dir='{output}'`" in second_log.read_text()
    weights = "final/adapter_model.safetensors"
    assert filecmp.cmp(uninterrupted / weights, output / weights, shallow=False)


@pytest.mark.slow
def test_two_processes_make_the_same_data(model, uninterrupted, tmp_path):
    """From the same policies: what two processes train differs by the rounding of the averaged gradients."""
    output = tmp_path / "two"
    shutil.copytree(uninterrupted / "round_000" / "model", output / "round_000" / "model")
    log = tmp_path / "log"
    assert processes.run(worker.run_in_a_world, model, str(output), log=log, processes=2) == [0, 0], log.read_text()
    assert (output / "world_size").read_text() == "2"
    same = ["base.jsonl", *(f"round_000/{name}" for name in DATA), *(f"round_001/{name}" for name in DATA[:3])]
    for name in same:
        assert filecmp.cmp(uninterrupted / name, output / name, shallow=False), name
    assert (output / "final" / "adapter_model.safetensors").is_file()
