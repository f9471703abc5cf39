"""`gpu_check` runs on a CPU as far as it goes, and calls that untested."""

import json
import os
import subprocess
import sys

import pytest

from ..helpers import ROOT
from .gpu_check import CHECKS, main


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


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("2,3", "2,3")])
def test_one_gpu_unless_told_otherwise(tmp_path, monkeypatch, given, used):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")  # so that it is put back
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--only", "fp16", "--losses", "rdro", "--output", f"{tmp_path}/r.json"]
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main() == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used
