"""
Packed rows and shared prompts against stock TRL's `sigmoid`, on pairs of real and realistic lengths.

    python scripts/bench_packed.py                       # the cells of scripts/bench_packed_cells.txt, in their order
    python scripts/bench_packed.py --cells mine.txt --output mine.jsonl --only "demo pairs"
    python scripts/bench_packed.py --model 0.5b --output gpu.jsonl --only shared    # on a CUDA GPU

Each line of that file is a cell, of about a minute. A cell that is done is a line of the output, and is not done
again: a bench that was killed goes on. Both sides see the same pairs in the same order, in turns of one round, which
is four pairs or more that are new to both; after a round of warm-up. Processor time on one thread, in which what else
the machine does is not (on a GPU wall time); wall time stands beside it. Everything of an optimiser step is in it.
Peak memory is that of all tensors in one more round, model and optimiser included.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench import device, environment, public  # noqa: E402
from bench_flops import SMALL, forward_flops, passes  # noqa: E402
from bench_lengths import grouped, pair_lengths  # noqa: E402
from bench_runs import CUDA, WDPO_RHO, Run, build_trainer, peak_bytes, quiet  # noqa: E402
from transformers import TrainerCallback  # noqa: E402


HERE = Path(__file__).resolve().parent
CELLS = HERE / "bench_packed_cells.txt"
OUTPUT = HERE.parent / "docs" / "results" / "bench-packed.jsonl"
MODELS: dict[str, dict[str, Any]] = {
    "small": {"model": {**SMALL, "tie_word_embeddings": True}},
    "0.5b": {"model": public("Qwen2.5-0.5B-Instruct")},
    "7b-qlora": {"model": public("Qwen2.5-7B-Instruct"), "method": "qlora", "checkpointing": True},
}
LENGTHS = {"RAG": 8192, "filled": 256}  # at most, of a row; others 2048
PAIRS = 4  # of a round, or those of an optimiser step where that has more
ROUNDS = 5


@dataclass(frozen=True)
class Cell:
    corpus: str
    batch: int
    accumulation: int
    order: str
    ours: str
    against: str
    goal: float | None
    memory_goal: float | None

    @property
    def name(self) -> str:
        return " | ".join([self.corpus, str(self.batch), str(self.accumulation), self.order, self.ours, self.against])


def read_cells(path: Path) -> list[Cell]:
    cells = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        corpus, batch, accumulation, order, ours, against, *goals = (part.strip() for part in line.split("|"))
        time_goal, memory_goal = (float(goal) if goal else None for goal in goals)
        cells.append(Cell(corpus, int(batch), int(accumulation), order, ours, against, time_goal, memory_goal))
    return cells


def runs_of(cell: Cell, model: str = "small") -> tuple[Run, Run]:
    """Ours and the other side's."""
    length = LENGTHS.get(cell.corpus, 2048)
    common = {**MODELS[model], "length": length, "batch": cell.batch, "accumulation": cell.accumulation}
    if cell.corpus != "filled":
        common |= {"lengths": cell.corpus, "grouped": cell.order == "grouped"}
    if cell.against == "double backward":
        # The head is nearly all of it, as in section 3 of bench.py
        head = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 150_000}
        common |= {"model": head, "method": "full", "checkpointing": False}
    loss, *how = cell.ours.split()
    # The order is made beforehand, the same for both
    settings: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    theirs = Run(settings=tuple(settings.items()), **common)
    if cell.against == "double backward":
        theirs = replace(theirs, library="exact", loss="wdpo", attention="eager")
    elif cell.against == "stock, one at a time":
        theirs = replace(theirs, batch=1, accumulation=cell.batch * cell.accumulation)
    settings |= {"padding_free": True, "share_prompt": "shared" in how}
    if loss == "wdpo":
        settings |= {"wdpo_rho": WDPO_RHO, "wdpo_difference": "one_sided" if "one_sided" in how else "central"}
    ours = Run(library="trl_rdro", loss=loss, settings=tuple(settings.items()), **common)
    return ours, theirs


class Clock(TrainerCallback):
    @staticmethod
    def now() -> tuple[float, float]:
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() if CUDA else time.process_time(), time.perf_counter()

    def on_train_begin(self, *args, **kwargs):
        self.begin = self.now()

    def on_step_end(self, *args, **kwargs):
        self.end = self.now()


def alternate(runs: tuple[Run, Run], pairs: int, rounds: int) -> np.ndarray:
    """Processor and wall seconds of each round, `(runs, rounds, 2)`. The side that begins changes."""
    with quiet() as folder:
        trainers, clocks = [], []
        for run in runs:
            steps = pairs // (run.batch * run.accumulation)
            trainer = build_trainer(run, steps, folder, rows=pairs * (rounds + 1))
            trainer.all_pairs = trainer.train_dataset
            trainers.append(trainer)
            clocks.append(Clock())
            trainer.add_callback(clocks[-1])
        seconds = np.zeros((len(runs), rounds + 1, 2))
        for round_ in range(rounds + 1):
            for i in (0, 1) if round_ % 2 else (1, 0):
                trainer = trainers[i]
                trainer.train_dataset = trainer.all_pairs.select(range(pairs * round_, pairs * (round_ + 1)))
                trainer.train()
                seconds[i, round_] = np.subtract(clocks[i].end, clocks[i].begin)
    return seconds[:, 1:]


def ratio(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Pairs per second of ours over the other side's, `(rounds,)` seconds each, with a bootstrap interval over rounds.
    Of sums: a round of longer pairs counts for more, as in an epoch."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    low, high = np.quantile(theirs[drawn].sum(axis=1) / ours[drawn].sum(axis=1), [0.025, 0.975])
    return {"ratio": float(theirs.sum() / ours.sum()), "low": float(low), "high": float(high)}


def measure(cell: Cell, model: str, pairs: int, rounds: int) -> dict[str, Any]:
    runs = runs_of(cell, model)
    pairs = 1 if cell.corpus == "filled" else max(pairs, cell.batch * cell.accumulation)
    seconds = alternate(runs, pairs, rounds)
    found: dict[str, Any] = {
        "processor": ratio(*seconds[..., 0]),
        "wall": ratio(*seconds[..., 1]),
        "pairs_per_second": [float(pairs * rounds / side) for side in seconds[..., 0].sum(axis=1)],
        "seconds": seconds.tolist(),
    }
    if cell.memory_goal is not None:
        found["bytes"] = [peak_bytes(run, steps=1) for run in runs]
    if cell.corpus != "filled" and model == "small":
        found["flops"] = flop_ratios(cell, pairs, rounds)
    return found


def flop_ratios(cell: Cell, pairs: int, rounds: int) -> dict[str, float]:
    """Operations of the other side over ours in the rounds that count: of this model here, and of a large one on a
    GPU."""
    length = LENGTHS.get(cell.corpus, 2048)
    make = grouped if cell.order == "grouped" else pair_lengths
    batch = cell.batch * cell.accumulation if cell.against == "stock, one at a time" else cell.batch
    found = make(cell.corpus, pairs * (rounds + 1), length, **({"batch": cell.batch} if make is grouped else {}))
    batches = [found[i : i + batch] for i in range(pairs, len(found), batch)]
    theirs = [[pair] for part in batches for pair in part] if "one at a time" in cell.against else batches
    kind = "shared" if "shared" in cell.ours else "packed"
    return {
        model: passes("sigmoid")
        * sum(forward_flops(model, part, "stock") for part in theirs)
        / (passes(cell.ours) * sum(forward_flops(model, part, kind) for part in batches))
        for model in ("here", "Qwen2.5-7B")
    }


def conditions() -> dict[str, Any]:
    return {
        "device": device(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join([*environment(), "python", *sys.argv]),
        "versions": {name: version(name) for name in ("trl-rdro", "trl", "torch", "transformers")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=CELLS)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="one line of JSON for each cell")
    parser.add_argument("--only", default="", help="of the cells, those whose line has this text")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of a round")
    args = parser.parse_args()
    done = set()
    if args.output.exists():
        rows = map(json.loads, args.output.read_text().splitlines())
        done = {row["cell"] for row in rows if row["model"] == args.model}
    for cell in read_cells(args.cells):
        if cell.name in done or args.only not in cell.name:
            continue
        start = time.perf_counter()
        found = measure(cell, args.model, args.pairs, args.rounds)
        found = {"cell": cell.name, "model": args.model, **asdict(cell), **found, **conditions()}
        with args.output.open("a") as file:
            file.write(json.dumps(found) + "\n")
        goal = "" if cell.goal is None else f", goal {cell.goal}"
        took = time.perf_counter() - start
        print(
            f"{cell.name}: {found['processor']['ratio']:.2f} times{goal} ({took:.0f} s)", file=sys.stderr, flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
