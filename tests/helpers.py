"""What tests of several folders need that is neither a model nor a training run."""

import math
import os
import socket
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trl_rdro.run.lock import only_run_in


ROOT = Path(__file__).parents[1]


def run_process(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command in a process of its own that finds this package and these tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, timeout=600
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(capsys, code: int) -> str:
    """The message of a refused command: one line on stderr, exit code 2."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-rdro: error: ")]
    assert code == 2
    assert len(lines) == 1
    return lines[0].removeprefix("trl-rdro: error: ")


def is_png(path: Path) -> bool:
    """Whether the file is a whole PNG."""
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"


def hold(directory: str, ready, how: str) -> None:
    """Hold the lock of a run in `directory` for a minute."""
    with only_run_in(directory):
        # As a data loader does, whose worker outlives the killed process
        if how == "fork" and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        ready.set()
        time.sleep(60)


def spoil(checkpoint: Path) -> None:
    """Make the weights in a directory NaN, as a version that looks at nothing would have saved them."""
    (path,) = checkpoint.glob("*model.safetensors")
    save_file({name: torch.full_like(value, math.nan) for name, value in load_file(path).items()}, path)
    (checkpoint / "manifest.json").unlink(missing_ok=True)
