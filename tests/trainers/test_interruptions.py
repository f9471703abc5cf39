"""A run that is killed, stopped or damaged, and started again by the same command, ends with the uninterrupted run's
weights to the last bit."""

import filecmp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from trl_rdro.run.completeness import fault, is_complete, last_complete_checkpoint

from .. import processes
from ..helpers import ROOT
from ..tiny import cpu_args, tiny_preferences, with_columns
from . import interruption_worker


@pytest.fixture(scope="module")
def inputs(qwen2, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("inputs")
    with_columns(tiny_preferences(40), ["grdpo"]).to_json(str(root / "pairs.jsonl"))
    return {"model_name_or_path": qwen2, "dataset_name": str(root / "pairs.jsonl")}


def command(method: str, inputs: dict, output: Path, **settings) -> list[str]:
    settings = cpu_args(
        **inputs,
        output_dir=str(output),
        max_steps=9,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=3,
        resume_from_checkpoint=True,
        **settings,
    )
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return [method, "--config", str(path)]


RUNS = {
    "kldpo": ("dpo", {"loss_type": "kldpo", "gradient_accumulation_steps": 2}),
    "wdpo": ("dpo", {"loss_type": "wdpo", "wdpo_rho": 1.0}),
    "kto rdro": ("kto", {"loss_type": "rdro", "gradient_accumulation_steps": 2}),
    "sigmoid": ("dpo", {"loss_type": "sigmoid"}),
    "kto": ("kto", {"loss_type": "kto"}),
    "packed grdpo": ("dpo", {"loss_type": "grdpo", "padding_free": True, "gradient_accumulation_steps": 2}),
    "lora with dropout": (
        "dpo",
        {
            "loss_type": "rdro",
            "use_peft": True,
            "lora_target_modules": "all-linear",
            "lora_dropout": 0.1,
            "disable_dropout": False,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_interrupted_in_every_way_a_run_ends_with_the_same_weights(inputs, tmp_path, run):
    method, settings = RUNS[run]
    weights = "adapter_model.safetensors" if settings.get("use_peft") else "model.safetensors"
    broken = tmp_path / "broken"
    argv = command(method, inputs, broken, **settings)

    def run_once(argv: list[str], moment: str | None) -> tuple[int, str]:
        log = tmp_path / f"{argv[2].rsplit('/')[-1]} {moment}.log"
        (code,) = processes.run(interruption_worker.run, argv, moment, log=log)
        return code, log.read_text()

    def stopped(moment: str, expected: int) -> str:
        code, printed = run_once(argv, moment)
        assert code == expected and "Traceback" not in printed, printed[-3000:]
        return printed

    code, printed = run_once(command(method, inputs, tmp_path / "whole", **settings), None)
    assert code == 0, printed[-3000:]
    assert "SIGTERM: there is no complete checkpoint yet" in stopped("SIGTERM step 2", 143)
    stopped("SIGKILL step 4", -9)
    assert last_complete_checkpoint(broken) == str(broken / "checkpoint-3")
    said = stopped("SIGINT step 5", 130)
    assert (
        said.count("trl-rdro: stopped by SIGINT: the same command with `resume_from_checkpoint: true` goes on ") == 1
    )
    stopped("SIGKILL writing 6", -9)
    assert (broken / "checkpoint-6").exists() and not is_complete(broken / "checkpoint-6")
    said = stopped("SIGTERM step 8", 143)
    assert "checkpoint-6 is not complete and is passed over: it was not written to its end" in said
    assert "Resuming from" in said and f"goes on from {broken / 'checkpoint-6'}." in said
    os.truncate(broken / "checkpoint-6" / "optimizer.pt", 1000)
    code, printed = run_once(argv, None)
    assert code == 0, printed[-3000:]
    assert "checkpoint-6 is not complete and is passed over: optimizer.pt is damaged" in printed
    assert filecmp.cmp(tmp_path / "whole" / weights, broken / weights, shallow=False)
    first = tmp_path / "whole" / "checkpoint-3" / weights
    assert not filecmp.cmp(first, broken / weights, shallow=False), "equality says something"
    assert fault(broken / "checkpoint-9") is None


def wait_for(condition, process, seconds: int = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seconds_after_launch", [None, 1.5])
def test_a_signal_while_libraries_are_imported(inputs, tmp_path, seconds_after_launch):
    """In the command itself, and in the training process: no traceback, however early."""
    argv = command("dpo", inputs, tmp_path / "out", loss_type="rdro")
    start = [sys.executable, "-m", "trl_rdro.cli", *argv]
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    if seconds_after_launch is None:
        time.sleep(2)
    else:
        wait_for(lambda: psutil.Process(process.pid).children(), process)
        time.sleep(seconds_after_launch)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert sum(line.startswith("trl-rdro: stopped by SIGINT") for line in said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


LAUNCHERS = {
    "one process": ([], ["-m", "trl_rdro.cli"]),
    "two processes": (["--num_processes", "2", "--num_machines", "1", "--multi_gpu"], ["-m", "trl_rdro.cli"]),
    "accelerate launch": (
        [],
        ["-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "trl_rdro.cli.train"],
    ),
    "torchrun": ([], ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "trl_rdro.cli.train"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, signum, whole_group",
    [
        ("one process", signal.SIGTERM, False),
        ("one process", signal.SIGINT, True),
        ("two processes", signal.SIGTERM, False),
        ("accelerate launch", signal.SIGTERM, False),
        ("torchrun", signal.SIGTERM, False),
    ],
)
def test_a_signal_ends_the_whole_tree(inputs, tmp_path, launcher, signum, whole_group):
    """From a terminal Ctrl-C reaches the whole process group, `kill` the launcher only."""
    output = tmp_path / "out"
    argv = command("dpo", inputs, output, loss_type="rdro", rdro_alpha=0.4)
    settings = yaml.safe_load(Path(argv[2]).read_text()) | {
        "max_steps": 100_000,
        "save_steps": 20,
        "save_total_limit": 2,
    }
    Path(argv[2]).write_text(yaml.safe_dump(settings))
    flags, start = LAUNCHERS[launcher]
    process = subprocess.Popen(
        [sys.executable, *start, *argv, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: last_complete_checkpoint(output), process)
        tree = psutil.Process(process.pid).children(recursive=True)
        assert tree
        start = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, signum)
        _, said = process.communicate(timeout=30)
        gone, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive and time.monotonic() - start < 15
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    name = signal.Signals(signum).name if launcher != "accelerate launch" else "SIGTERM"
    said_here = [line for line in said.splitlines() if line.startswith("trl-rdro: stopped by")]
    assert len(said_here) == 1, said[-3000:]
    assert said_here[0].startswith(
        f"trl-rdro: stopped by {name}: the same command with `resume_from_checkpoint: true`"
    )
    assert last_complete_checkpoint(output) in said_here[0]
    if "trl_rdro.cli" in start_of(launcher):  # the others' own ends are theirs
        assert process.returncode == 128 + signum
        assert "Traceback" not in said, said[-3000:]


def start_of(launcher: str) -> list[str]:
    return LAUNCHERS[launcher][1]
