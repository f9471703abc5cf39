"""A file in the working directory that is called as a module of Python or of a library does not stand in for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils import launch as accelerate_launch

from trl_rdro.cli import launch
from trl_rdro.run.search_path import VARIABLE, restore_search_path

from ..helpers import ROOT


SHADOWS = ("json", "torch", "yaml", "typing", "accelerate", "trl", "sitecustomize")
COMMAND = "import sys; from trl_rdro.cli import main; sys.exit(main())"  # as the installed script is


@pytest.fixture
def shadowed(tmp_path, monkeypatch) -> Path:
    """A working directory with such files, each of which ends the process that imports it."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"import os; os.write(2, b'{name} is shadowed'); os._exit(77)")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dpo", "iterate"])
@pytest.mark.usefixtures("shadowed")
def test_launched_processes_import_the_libraries(command, data):
    """To the point at which the launched process looks for the model."""
    argv = ["--model_name_or_path", "/no/model", "--dataset_name", data, "--use_cpu", "--bf16", "false"]
    argv += ["--reward_funcs", "judge.score"] * (command == "iterate")
    Path("judge.py").write_text("def score(completions, **_): return [0.0] * len(completions)\n")
    result = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, command, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "shadowed" not in result.stderr
    assert result.returncode == 2 and "cannot load the model /no/model" in result.stderr, result.stderr[-2000:]


@pytest.mark.parametrize("existing", [None, "/a:/b"])
def test_what_a_launched_process_is_told(existing, shadowed, monkeypatch):
    """By accelerate's own launcher of DeepSpeed, which would add the working directory."""
    seen = {}

    def note(args):
        args.deepspeed_fields_from_accelerate_config = ""
        _, environment = accelerate_launch.prepare_deepspeed_cmd_env(args)
        seen.update(environment)

    if existing is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", existing)
    monkeypatch.setattr(launch, "launch_command", note)
    argv = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch.launch_module("trl_rdro.cli.train", ["dpo"], argv)
    assert seen[VARIABLE] == "1" and str(shadowed) not in seen.get("PYTHONPATH", "")
    assert VARIABLE not in os.environ
    assert "shadow" in accelerate_launch.env_var_path_add("PYTHONPATH", "shadow")


def test_what_a_launched_process_starts_searches_as_usual(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    restore_search_path()
    assert VARIABLE not in os.environ
