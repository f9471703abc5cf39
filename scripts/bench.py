"""
Time and memory of our losses beside stock TRL, as ratios, with the goals we set ourselves.

    python scripts/bench.py --size small --output bench.json          # minutes on a CPU
    python scripts/bench.py --size full --output bench.json           # on a CUDA GPU
    python scripts/bench.py --sections 3 5 --output bench.json        # these sections anew, the others as they are

Both libraries run in one process and take turns, a few optimiser steps each, on the same model, data and settings,
after warm-up. A ratio is that of the medians; its interval the middle 95 % of 2,000 bootstrap samples of the rounds.
Absolute times are of little use: machines differ, and drift. How each thing is measured: `scripts/bench_runs.py`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs one, or the Trainer multiplies the batch

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_runs import (  # noqa: E402
    CUDA,
    ROOT,
    WDPO_RHO,
    Run,
    alternate,
    alternate_calls,
    build_trainer,
    largest_batch,
    peak_bytes,
    quiet,
)
from bench_table import Row, table  # noqa: E402
from machine import processor_name  # noqa: E402
from smollm2 import MODEL_DIR  # noqa: E402


CONFIGS = ROOT / "tests" / "fixtures" / "model_configs"


# What is run at which size


@dataclass(frozen=True)
class Size:
    plain: list[Run]  # models and settings of sections 1 to 3; the first is compared in every way
    head: Run  # of the comparison with double backward: a large vocabulary
    scaling: Run
    axes: dict[str, list[int]]
    rounds: int
    steps: int
    imports: int  # rounds
    rows: int  # to prepare
    largest: Run | None = None  # whose largest batch to find


def qwen2(hidden: int, layers: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


def public(name: str) -> str:
    return str(CONFIGS / name / "config.json")


QWEN2_1B5 = {
    **qwen2(1536, 28, 151_936),
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def sizes() -> dict[str, Size]:
    tiny = Run(model=qwen2(32, 2, 512), length=16, batch=2)
    qlora = Run(model=public("Qwen2.5-7B-Instruct"), method="qlora", length=1024, batch=2, checkpointing=True)
    return {
        # Keeps this script alive in the tests
        "ci": Size(
            plain=[tiny],
            head=replace(tiny, model=qwen2(32, 2, 2048), batch=1),
            scaling=tiny,
            axes={"length": [16, 32], "accumulation": [1, 2]},
            rounds=1,
            steps=1,
            imports=1,
            rows=32,
        ),
        "small": Size(
            plain=[
                Run(model=qwen2(256, 4, 8192), length=64, batch=2),
                *([Run(model=str(MODEL_DIR), method="lora", length=64, batch=1)] if MODEL_DIR.exists() else []),
            ],
            head=Run(model=qwen2(128, 2, 150_000), length=256, batch=1),
            scaling=Run(model=qwen2(64, 2, 1000), length=256, batch=1),
            axes={
                "length": [256, 512, 1024, 2048],
                "vocabulary": [1000, 10_000, 30_000],
                "batch": [1, 2, 4],
                "accumulation": [1, 2, 4],
            },
            rounds=6,
            steps=2,
            imports=4,
            rows=1000,
        ),
        "full": Size(
            plain=[
                Run(model=public("Qwen2.5-0.5B-Instruct"), length=1024, batch=4),
                Run(model=QWEN2_1B5, length=1024, batch=4),
                replace(qlora, length=2048),
                replace(qlora, model=public("Llama-3.1-8B-Instruct")),
            ],
            head=Run(model=public("Qwen2.5-0.5B-Instruct"), length=1024, batch=1),
            scaling=Run(model=public("Qwen2.5-0.5B-Instruct"), length=1024, batch=1),
            axes={"length": [1024, 2048, 4096], "batch": [1, 2, 4]},
            rounds=2,
            steps=2,
            imports=2,
            rows=2000,
            largest=replace(qlora, model=public("Llama-3.1-8B-Instruct"), length=4096),
        ),
    }


# Comparing


def ours(run: Run, loss: str, **settings: Any) -> Run:
    if loss == "wdpo":
        settings = {"wdpo_rho": WDPO_RHO, **settings}
    return replace(run, library="trl_rdro", loss=loss, settings=tuple(settings.items()))


def ratio_of_medians(first: list[list[float]], second: list[list[float]]) -> dict[str, float]:
    """With its bootstrap interval: whole rounds are drawn, and the same ones for both."""
    a, b = np.array(first), np.array(second)
    drawn = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    samples = np.median(a[drawn], axis=(1, 2)) / np.median(b[drawn], axis=(1, 2))
    low, high = np.quantile(samples, [0.025, 0.975])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}


def spread(times: list[list[float]]) -> dict[str, float]:
    """Median and median absolute deviation, in milliseconds."""
    values = 1e3 * np.array(times)
    return {"ms": float(np.median(values)), "mad": float(np.median(abs(values - np.median(values))))}


@dataclass(frozen=True)
class Goal:
    """Run `first` against run `second` of a comparison: at most this many times the time, and the memory."""

    first: int
    second: int
    time: float | None = None
    memory: float | None = None


def compare(runs: list[Run], goals: list[Goal], rounds: int, steps: int) -> Iterator[Row]:
    times = alternate(runs, rounds, steps)
    peaks = [peak_bytes(run) for run in runs]
    for goal in goals:
        i, j = goal.first, goal.second
        yield {
            "what": runs[i].name,
            "against": runs[j].name,
            "setting": runs[i].setting,
            "time": {**ratio_of_medians(times[i], times[j]), "goal": goal.time},
            "memory": {"ratio": peaks[i] / peaks[j], "goal": goal.memory},
            "ours": {**spread(times[i]), "bytes": peaks[i], "seconds": times[i]},
            "theirs": {**spread(times[j]), "bytes": peaks[j], "seconds": times[j]},
        }


# The sections


def half(rounds: int) -> int:
    return (rounds + 1) // 2


def a_third(rounds: int) -> int:
    return max(rounds // 3, min(rounds, 2))


def section_1(size: Size) -> Iterator[Row]:
    first, *others = size.plain
    runs = [first, *(ours(first, loss) for loss in ("ddro", "rdro", "kldpo"))]
    yield from compare(runs, [Goal(i, 0, 1.01, 1.0) for i in (1, 2, 3)], size.rounds, size.steps)
    unpaired = replace(first, paired=False, batch=2 * first.batch)
    runs = [replace(unpaired, loss=loss) for loss in ("apo_zero_unpaired", "kto")]
    runs += [ours(unpaired, loss) for loss in ("ddro", "rdro")]
    goals = [Goal(2, 0, 1.01, 1.0), Goal(3, 0, 1.01, 1.0), Goal(2, 1), Goal(3, 1)]
    yield from compare(runs, goals, size.rounds, size.steps)
    for run in others:  # larger, and less noisy
        yield from compare([run, ours(run, "rdro")], [Goal(1, 0, 1.01, 1.0)], half(size.rounds), size.steps)


def section_2(size: Size) -> Iterator[Row]:
    for precomputed, goal in ((False, 1.30), (True, 1.40)):
        run = replace(size.plain[0], accumulation=4, precomputed=precomputed)
        yield from compare([run, ours(run, "kldpo")], [Goal(1, 0, goal)], size.rounds, size.steps)


def section_3(size: Size) -> Iterator[Row]:
    first, *others = size.plain
    yield from compare([first, ours(first, "wdpo")], [Goal(1, 0, 2.3)], size.rounds, size.steps)
    for run in others:
        yield from compare([run, ours(run, "wdpo")], [Goal(1, 0, 2.3)], half(size.rounds), size.steps)
    lazy = replace(first, accumulation=4)
    yield from compare([lazy, ours(lazy, "wdpo", wdpo_interval=4)], [Goal(1, 0, 1.4)], size.rounds, size.steps)
    exact = replace(size.head, library="exact", loss="wdpo", attention="eager")
    yield from compare([exact, ours(size.head, "wdpo")], [Goal(1, 0, 0.7, 0.4)], a_third(size.rounds), 1)


def with_axis(run: Run, axis: str, value: int) -> Run:
    if axis == "vocabulary":
        return replace(run, model={**run.model, "vocab_size": value})
    return replace(run, **{axis: value})


def section_4(size: Size) -> Iterator[Row]:
    for axis, values in size.axes.items():
        curves: dict[str, dict[str, list[float]]] = {}
        for value in values:
            base = with_axis(size.scaling, axis, value)
            runs = [base, ours(base, "kldpo"), ours(base, "wdpo")]
            for run, times in zip(runs, alternate(runs, a_third(size.rounds), size.steps), strict=True):
                curve = curves.setdefault(run.loss, {"seconds": [], "bytes": []})
                curve["seconds"].append(median(sum(times, [])))
                curve["bytes"].append(peak_bytes(run))
        theirs = {key: last_exponent(values, of) for key, of in curves["sigmoid"].items()}
        for loss, curve in curves.items():
            exponents = {key: last_exponent(values, of) for key, of in curve.items()}
            yield {
                "what": loss,
                "setting": size.scaling.setting,
                "axis": axis,
                "values": values,
                **curve,
                "exponents": exponents,
                "goals": {key: max(1.05, 0.05 + exponent) for key, exponent in theirs.items()},
            }


def last_exponent(x: list[int], y: list[float]) -> float:
    """p of y ~ x^p between the last two points: fixed costs hide it before."""
    return math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])


def section_5(size: Size) -> Iterator[Row]:
    """The quickest of a few: whatever else a machine does only adds to an import."""

    def interpreter(code: str):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)

    pairs = {
        "import": ("import trl", "import trl_rdro"),
        "import of the trainer": (
            "from trl import DPOConfig, DPOTrainer",
            "from trl_rdro import DPOConfig, DPOTrainer",
        ),
    }
    for what, codes in pairs.items():
        theirs, own = alternate_calls([interpreter(code) for code in codes], size.imports)
        yield {"what": what, "theirs": min(theirs), "ours": min(own), "goal": 0.1}
    with quiet() as folder:
        base = replace(size.scaling, length=64)
        for what, rows in (("construction of a trainer", 8), (f"the same with {size.rows} pairs", size.rows)):
            calls = [
                lambda run=run, rows=rows: build_trainer(run, 1, folder, rows) for run in (base, ours(base, "rdro"))
            ]
            theirs, own = alternate_calls(calls, size.imports)
            yield {"what": what, "theirs": min(theirs), "ours": min(own), "goal": None}


def section_6(size: Size) -> Iterator[Row]:
    if size.largest is None or not CUDA:
        return
    for run in (size.largest, ours(size.largest, "rdro"), ours(size.largest, "wdpo")):
        yield {"what": run.name, "setting": run.setting, "pairs": largest_batch(run)}


SECTIONS = {1: section_1, 2: section_2, 3: section_3, 4: section_4, 5: section_5, 6: section_6}


# The command


def environment() -> list[str]:
    """The variables that change the figures, as they were set."""
    names = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def device() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {processor_name()}, no GPU"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("ci", "small", "full"), default="full" if CUDA else "small")
    parser.add_argument("--sections", type=int, nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench.json"), help="JSON; its other sections are kept"
    )
    args = parser.parse_args()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    size = sizes()[args.size]
    report: dict[str, Any] = {
        "size": args.size,
        "device": device(),
        "threads": torch.get_num_threads(),
        "clock": "wall" if CUDA else "processor",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join([*environment(), "python scripts/bench.py --size", args.size]),
        "versions": {name: version(name) for name in ("trl-rdro", "trl", "torch", "transformers")},
        "sections": {},
    }
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        if {key: earlier.get(key) for key in ("size", "device", "threads")} == {
            key: report[key] for key in ("size", "device", "threads")
        }:
            report["sections"] = earlier["sections"]
    for number in args.sections:
        report["sections"][str(number)] = []
        for row in SECTIONS[number](size):
            report["sections"][str(number)].append(row)
            print(f"{number}: {row['what']} {row.get('setting', '')}", file=sys.stderr)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
