"""What a user writes passes a type checker, and what is wrong does not."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # unless `make types` has filled mypy's cache
def test_user_code_passes_mypy():
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "tests/user_code.py"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
