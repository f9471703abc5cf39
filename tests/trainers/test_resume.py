"""A run that was killed, whenever, goes on where it was and ends with the weights of an unbroken one."""

import json
import signal
from pathlib import Path

import pytest
import torch

from trl_rdro.losses.types import of_family
from trl_rdro.trainers.safeguards import is_complete, last_complete_checkpoint

from .. import processes
from ..loss_cases import KINDS
from ..training import make_trainer, same_parameters
from . import crash_worker


RUNS = [
    *[pytest.param(loss, False, 1, id=loss) for loss in KINDS],
    *[pytest.param(loss, True, 1, id=f"{loss}-unpaired") for loss in of_family("density_ratio")],
    # ZeRO-3 has its own checkpoints; a loss that is computed in one forward, and the one that takes three
    *[pytest.param(loss, False, 2, id=f"{loss}-zero3") for loss in ("rdro", "wdpo")],
]


@pytest.mark.slow
@pytest.mark.parametrize("loss, unpaired, world", RUNS)
def test_kill_9_and_the_same_command_again(qwen2, tmp_path, loss, unpaired, world):
    """Killed between checkpoints, then while one is being written."""
    if world > 1:
        pytest.importorskip("deepspeed")
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(output_dir: Path, die_at: str = "") -> tuple[int, str]:
        """The exit code of the first process, and what all have printed."""
        log = tmp_path / f"{output_dir.name} {die_at}.log"
        code, *_ = processes.run(
            crash_worker.main, qwen2, str(output_dir), loss, unpaired, die_at, log=log, processes=world
        )
        return code, log.read_text()

    code, printed = run(whole)
    assert code == 0, printed[-2000:]
    for die_at in ("step 4", "writing 6"):  # checkpoints at 3, 6 and 9 of 9 steps
        code, printed = run(broken, die_at)
        assert code == -signal.SIGKILL, printed[-2000:]
    assert (broken / "checkpoint-6").exists() and not is_complete(broken / "checkpoint-6")
    code, printed = run(broken)
    assert code == 0, printed[-2000:]
    assert "checkpoint-6 was not written to its end" in printed
    assert "Resuming from" in printed and "checkpoint-3" in printed
    assert same_parameters(*(torch.load(path / "final.pt") for path in (whole, broken)))


def test_only_complete_checkpoints_are_resumed_from(qwen2, tmp_path, messages):
    trainer = make_trainer(qwen2, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert any("starting from the beginning" in line for line in messages())
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="not a checkpoint that was written to its end"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps([]))
    assert last_complete_checkpoint(tmp_path) is None


def test_a_checkpoint_that_is_written_over_is_incomplete_meanwhile(qwen2, tmp_path):
    """A run that starts again over the checkpoints of an earlier one must not leave a mixture that looks complete."""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(qwen2, tmp_path, **settings).train()
    again, seen = make_trainer(qwen2, tmp_path, **settings), []
    save_optimizer = again._save_optimizer_and_scheduler
    again._save_optimizer_and_scheduler = lambda path: (seen.append(is_complete(Path(path))), save_optimizer(path))
    again.train()
    assert seen == [False] and is_complete(tmp_path / "checkpoint-1")
