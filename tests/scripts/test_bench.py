"""`scripts/bench.py`: that it measures what it says. Nothing here depends on how fast anything is."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import bench
import bench_runs
import bench_table
import pytest
import torch

from trl_rdro.tools import memory as estimate


TINY = bench.sizes()["ci"].plain[0]


@pytest.mark.slow
def test_the_sections_run_and_another_call_keeps_the_rest(tmp_path, monkeypatch, capsys):
    output = tmp_path / "bench.json"

    def run(*sections: str) -> str:
        command = ["bench.py", "--size", "ci", "--output", str(output), "--sections", *sections]
        monkeypatch.setattr(sys, "argv", command)
        assert bench.main() == 0
        return capsys.readouterr().out

    printed = run("1", "2", "3", "4", "6")
    report = json.loads(output.read_text())
    assert report["device"] and report["date"] and report["threads"] == 1 and report["versions"]["trl"]

    compared = [row for number in "123" for row in report["sections"][number]]
    assert [(row["what"].split()[0], row["against"]) for row in compared] == [
        *[(loss, "sigmoid") for loss in ("ddro", "rdro", "kldpo")],
        *[(loss, theirs) for theirs in ("apo_zero_unpaired", "kto") for loss in ("ddro", "rdro")],
        ("kldpo", "sigmoid"),
        ("kldpo", "sigmoid"),
        ("wdpo", "sigmoid"),
        ("wdpo", "sigmoid"),
        ("wdpo", "wdpo, double backward"),
    ]
    for row in compared:
        for side in ("ours", "theirs"):
            assert row[side]["ms"] > 0 and row[side]["bytes"] > 0
        assert row["time"]["ratio"] == pytest.approx(row["ours"]["ms"] / row["theirs"]["ms"])
        assert row["time"]["low"] <= row["time"]["ratio"] <= row["time"]["high"]
        assert row["memory"]["ratio"] == row["ours"]["bytes"] / row["theirs"]["bytes"]
    # Bytes are exact: these losses hold nothing that TRL's does not
    assert all(row["memory"]["ratio"] <= 1 for row in report["sections"]["1"])
    lazy = compared[-2]["setting"]
    assert "interval 4" in compared[-2]["what"] and "accumulation 4" in lazy

    assert {(row["what"], row["axis"]) for row in report["sections"]["4"]} == {
        (loss, axis) for loss in ("sigmoid", "kldpo", "wdpo") for axis in ("length", "accumulation")
    }
    of_length = next(row for row in report["sections"]["4"] if row["axis"] == "length" and row["what"] == "wdpo")
    assert of_length["bytes"][1] > 1.5 * of_length["bytes"][0]
    assert "6" not in report["sections"]  # no GPU

    # What was printed is the table of what was written
    assert printed.strip().endswith(bench_table.table(report).strip())
    run("6")
    assert json.loads(output.read_text()) == report


def test_imports_are_those_of_fresh_interpreters_in_turns(monkeypatch):
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: started.append(command))
    rows = list(bench.section_5(bench.sizes()["ci"]))
    assert {command[0] for command in started} == {sys.executable}
    assert [command[-1] for command in started[:4]] == ["import trl", "import trl_rdro"] * 2  # one of them warm-up
    assert ["trl_rdro import DPOConfig, DPOTrainer" in command[-1] for command in started[4:]] == [False, True] * 2
    assert [row["goal"] for row in rows] == [0.1, 0.1, None, None]
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    assert rows[3]["what"] == "the same with 32 pairs"


def test_double_backward_is_the_loss_that_ours_is_compared_with(tmp_path):
    """The same penalised gradient, to the accuracy of a central difference."""
    exact = replace(TINY, library="exact", loss="wdpo", attention="eager", precomputed=True)
    gradients = []
    for run in (exact, bench.ours(replace(TINY, precomputed=True), "wdpo", wdpo_rho=bench_runs.WDPO_RHO)):
        trainer = bench_runs.build_trainer(run, 1, str(tmp_path))
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        # A policy that is not the reference
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = (
            torch.tensor([-90.0, -80.0]),
            torch.tensor([-85.0, -90]),
        )
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    first, second = gradients
    assert (first - second).norm() < 1e-3 * first.norm()


def test_runs_take_turns_and_the_warm_up_is_not_counted(monkeypatch):
    order = []

    class Trainer:
        def __init__(self, run):
            self.run = run

        def add_callback(self, clock):
            self.clock = clock

        def train(self):
            order.append(self.run)
            self.clock.on_train_begin()
            for _ in range(4):
                self.clock.on_step_end()

    monkeypatch.setattr(bench_runs, "build_trainer", lambda run, steps, folder: Trainer(run))
    times = bench_runs.alternate(["a", "b"], rounds=3, steps=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [[len(round_) for round_ in of_run] for of_run in times] == [[3, 3, 3]] * 2


def test_peak_bytes_agrees_with_the_estimate():
    """Which was itself compared with measurements, by other code (tests/tools/test_memory.py)."""
    run = replace(TINY, model=bench.qwen2(256, 4, 4096), length=128)
    settings = estimate.Run(128, run.batch, half=False, checkpointing=False, device="cpu")
    expected = estimate.estimate(estimate.read_shape(bench_runs.build_model(run).config), settings)
    assert bench_runs.peak_bytes(run) == pytest.approx(sum(expected.parts.values()), rel=0.05)
    # Without the reference's weights, which a LoRA run does without, and most gradients and optimiser states
    assert bench_runs.peak_bytes(replace(run, method="lora")) < 0.7 * bench_runs.peak_bytes(run)


def test_ratio_of_medians():
    first, second = [[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]], [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    result = bench.ratio_of_medians(first, second)
    # The rounds differ threefold, and the ratio not at all: both are drawn from the same rounds
    assert result == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    result = bench.ratio_of_medians([[1.0], [2.0], [3.0]], [[1.0], [1.0], [1.0]])
    assert result["low"] == 1.0 and result["ratio"] == 2.0 and result["high"] == 3.0


def test_last_exponent():
    assert bench.last_exponent([1, 2, 4], [5.0, 3.0, 12.0]) == pytest.approx(2.0)


def test_goals_that_are_missed_are_said():
    side = {"ms": 2.0, "mad": 0.1, "bytes": 2**20}
    row = {
        "what": "rdro",
        "against": "sigmoid",
        "setting": "s",
        "time": {"ratio": 1.2, "low": 1.1, "high": 1.3, "goal": 1.01},
        "memory": {"ratio": 0.9, "goal": 1.0},
        "ours": side,
        "theirs": side,
    }
    report = {
        "device": "d",
        "threads": 1,
        "clock": "wall",
        "date": "2026-01-01",
        "command": "c",
        "versions": {},
        "sections": {"1": [row]},
    }
    text = bench_table.table(report)
    line = next(line for line in text.splitlines() if line.startswith("| rdro"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4:7] == ["1.200 (1.100 to 1.300)", "≤ 1.01", "missed"] and cells[9:12] == ["0.900", "≤ 1.00", "met"]


@pytest.mark.parametrize(
    "run", [run for run in bench.sizes()["full"].plain if run.method == "qlora"], ids=lambda r: r.name
)
def test_four_bit_models_are_built_from_configs_alone(run, tmp_path, monkeypatch):
    """Those of the size `full`, made narrow, train a step of each loss; only the layers' matrices are 4-bit."""
    pytest.importorskip("bitsandbytes")
    config = json.loads(Path(run.model).read_text())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # see tests/recipes/worker.py
    narrow = replace(run, model=str(tmp_path / "config.json"), length=16)
    for loss in ("rdro", "wdpo"):
        trainer = bench_runs.build_trainer(bench.ours(narrow, loss), 1, str(tmp_path))
        four_bit = {name for name, p in trainer.model.named_parameters() if type(p).__name__ == "Params4bit"}
        assert four_bit and all(".layers." in name for name in four_bit) and len(four_bit) == 2 * 7
        trainer.train()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert trained and all(p.isfinite().all() for p in trained)


def test_one_gpu_unless_told_otherwise():
    assert "," not in os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["allocator", "cuBLAS", "cuBLAS handle", "Triton"],
)
def test_the_largest_batch_is_the_last_that_fits(monkeypatch, error):
    def fits_four(run, steps):
        if run.batch > 4:
            raise error
        return 0

    monkeypatch.setattr(bench_runs, "peak_bytes", fits_four)
    assert bench_runs.largest_batch(TINY) == 4


def test_another_failure_is_no_lack_of_memory(monkeypatch):
    def fail(run, steps):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(bench_runs, "peak_bytes", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bench_runs.largest_batch(TINY)
