"""`gpu_check` runs on a CPU as far as it goes, and calls that untested."""

import json
import os
import subprocess
import sys

import pytest

from ..helpers import ROOT
from .gpu_check import CHECKS


@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    output = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "tests.distributed.gpu_check",
        "--output",
        str(output),
        "--only",
        "sdpa",
        "fp16",
        "zero3",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--losses", "wdpo"], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads(output.read_text())
    assert report["device"] == "cpu" and report["date"] and report["versions"]["torch"]
    assert {check["status"] for check in report["checks"].values()} == {"untested"}
    assert "on_cpu" not in report["checks"]["fp16"] and "on_cpu" not in report["checks"]["zero3"]
    sdpa = report["checks"]["sdpa"]["on_cpu"]
    assert sdpa["status"] == "passed"
    assert 0 < sdpa["errors"]["wdpo"]["update"] < 1e-3


def test_the_committed_report_names_every_check():
    report = json.loads((ROOT / "docs" / "gpu_check.json").read_text())
    assert {name: check["what"] for name, check in report["checks"].items()} == {
        name: check.what for name, check in CHECKS.items()
    }
