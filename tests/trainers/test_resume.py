"""A run that was killed, whenever, goes on where it was and ends with the weights of an unbroken one."""

import os
import signal
from pathlib import Path

import pytest
import torch

from trl_rdro.losses.types import of_family
from trl_rdro.run.completeness import is_complete

from .. import processes
from ..loss_cases import KINDS
from ..training import same_parameters
from . import crash_worker


RUNS = [
    *[pytest.param(loss, False, False, 1, id=loss) for loss in (*KINDS, "drdpo")],
    *[pytest.param(loss, True, False, 1, id=f"{loss}-unpaired") for loss in of_family("density_ratio")],
    *[pytest.param(loss, False, True, 1, id=f"{loss}-packed") for loss in ("kldpo", "repo")],
    # ZeRO-3 has its own checkpoints; a loss that is computed in one forward, and the one that takes three
    *[pytest.param(loss, False, False, 2, id=f"{loss}-zero3") for loss in ("rdro", "wdpo")],
]


@pytest.mark.slow
@pytest.mark.parametrize("loss, unpaired, packed, world", RUNS)
def test_kill_9_and_the_same_command_again(qwen2, tmp_path, loss, unpaired, packed, world):
    """Killed between checkpoints, while one is being written, and the last time with the newest one damaged."""
    if world > 1:
        pytest.importorskip("deepspeed")
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(output_dir: Path, die_at: str = "") -> tuple[int, str]:
        """The exit code of the first process, and what all have printed."""
        log = tmp_path / f"{output_dir.name} {die_at}.log"
        code, *_ = processes.run(
            crash_worker.main, qwen2, str(output_dir), loss, unpaired, packed, die_at, log=log, processes=world
        )
        return code, log.read_text()

    code, printed = run(whole)
    assert code == 0, printed[-2000:]
    for die_at in ("step 4", "writing 6"):  # checkpoints at 3, 6 and 9 of 9 steps
        code, printed = run(broken, die_at)
        assert code == -signal.SIGKILL, printed[-2000:]
    assert (broken / "checkpoint-6").exists() and not is_complete(broken / "checkpoint-6")
    code, printed = run(broken, "step 8")
    assert code == -signal.SIGKILL, printed[-2000:]
    assert "checkpoint-6 is not complete and is passed over: it was not written to its end" in printed
    assert "Resuming from" in printed and "checkpoint-3" in printed
    # The state of the optimiser, or the last process's part of it
    damaged = sorted((broken / "checkpoint-6").rglob("*optim*.pt"))[-1]
    os.truncate(damaged, damaged.stat().st_size - 1)
    code, printed = run(broken)
    assert code == 0, printed[-2000:]
    assert f"checkpoint-6 is not complete and is passed over: {damaged.name} is damaged" in printed
    assert same_parameters(*(torch.load(path / "final.pt") for path in (whole, broken)))
