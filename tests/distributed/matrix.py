"""The cells of the engine matrix, and how two runs of a cell are compared.

A cell is one short training run. `worker.py` runs it on an engine and in one process without any, and
`test_engines.py` compares the two. `scripts/docs.py` writes `docs/compatibility.md` from the names of the tests that
pytest collects here and from `engines.json`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trl_rdro.losses.types import LOSS_TYPES, of_family

from ..loss_cases import ENGINE_LOSSES, LOSS_CASES


STEPS = 3
STEP_SIZE = 8  # samples of an optimiser step: pairs, or unpaired completions

_DATA = json.loads(Path(__file__).with_name("engines.json").read_text())
# The number of processes of each engine; "single" is the baseline
ENGINES: dict[str, int] = _DATA["processes"]
# The largest relative difference to the single-process run. In bf16 that run is itself up to 0.04 from fp32.
TOLERANCES: dict[str, dict[str, float]] = _DATA["tolerances"]

COUPLED = {"_".join([name, *case.coupled.values()]): (name, case) for name, case in LOSS_CASES.items() if case.coupled}
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name, **LOSS_CASES[name].settings} for name in ENGINE_LOSSES},
    **{key: {"loss_type": name, **case.settings, **case.coupled} for key, (name, case) in COUPLED.items()},
    "rdro+sft": {"loss_type": ["rdro", "sft"], "loss_weights": [1.0, 0.2]},
    **{f"{name}_unpaired": {"loss_type": name} for name in of_family("density_ratio")},
}


# The other loss types, in one cell each: what they add to an engine are weights over a step, what is learned in one,
# and a second reference. Their rows carry columns, among them a weight.
FAMILY: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name, **case.settings} for name, case in LOSS_CASES.items() if name not in LOSSES},
    "kldpo_weighted": LOSSES["kldpo"],
    "kldpo_repo": {**LOSSES["kldpo"], "inner_loss_type": "repo"},
    "kldpo_target": {"loss_type": "kldpo", "kldpo_target_ess": 0.6},
}
# So sharp that gradients are multiplied within a step, lest weights overflow
FAMILY["kldpo_sharp"] = {"loss_type": "kldpo", "kldpo_tau": 1e-4}
FAMILY["wdpo_one_sided"] = {**LOSSES["wdpo"], "wdpo_difference": "one_sided"}
OVER_A_STEP = ("drdpo", "grdpo", "repo", "kldpo_weighted", "kldpo_repo", "kldpo_target")


@dataclass(frozen=True)
class Cell:
    """One run: a loss, what is trained, and how a step's samples are split."""

    loss: str
    model: str = "full"  # or "lora", "qlora"
    dtype: str = "fp32"  # or "bf16"
    checkpointing: bool = False
    precomputed: bool = False
    packed: bool = False  # rows without padding, prompts shared, steps dealt by tokens
    noise: bool = False  # dropout in the adapter, or in the attention of a full model
    micro_batch: int | None = None  # samples on each rank; None: an even share of the step's
    accumulation: int = 1
    steps: int = STEPS

    @property
    def name(self) -> str:
        parts = [self.loss, self.model, self.dtype]
        parts += ["checkpointing"] * self.checkpointing + ["precomputed"] * self.precomputed + ["packed"] * self.packed
        parts += ["noise"] * self.noise
        if self.micro_batch is not None:
            parts.append(f"{self.micro_batch}x{self.accumulation}")
        return "-".join(parts)

    @property
    def unpaired(self) -> bool:
        return self.loss.endswith("_unpaired")

    @property
    def settings(self) -> dict[str, Any]:
        settings = {**LOSSES, **FAMILY}[self.loss]
        # Engines round a bf16 run in different places, and the default step, half of this, shows that twice as much
        return {**settings, "wdpo_eps": 1e-2} if self.dtype == "bf16" and "wdpo_rho" in settings else settings

    @property
    def data(self) -> str:
        return "unpaired" if self.unpaired else "pairs_with_columns" if self.loss in FAMILY else "pairs"


def _accumulation(loss: str) -> int:
    """Two micro-batches where the pairs of a step are weighed against one another."""
    return 2 if loss in LOSS_TYPES and LOSS_TYPES[loss].temperature is not None else 1


MATRIX = [
    Cell(loss, model, checkpointing=checkpointing, precomputed=precomputed, accumulation=_accumulation(loss))
    for loss in LOSSES
    for model in ("full", "lora")
    for checkpointing in (False, True)
    for precomputed in (False, True)
]
QLORA = [
    Cell(loss, "qlora", checkpointing=checkpointing, accumulation=_accumulation(loss))
    for loss in ("rdro", "kldpo", "wdpo")
    for checkpointing in (False, True)
] + [Cell("rdro", "qlora", "bf16")]
# Each has its twin with padded rows above
PACKED = [
    replace(cell, packed=True)
    for cell in (
        Cell("rdro", checkpointing=True),
        Cell("rdro+sft"),
        Cell("kldpo", "lora", accumulation=2),
        Cell("wdpo"),
        Cell("ddro_unpaired", "lora", precomputed=True),
        Cell("rdro", "qlora"),
    )
]
# Losses that compare two forwards, which must see the same masks; wdpo makes two forwards for one backward then
NOISE = [
    Cell("wdpo", noise=True),
    Cell("wdpo", checkpointing=True, noise=True),
    Cell("wdpo", "lora", noise=True),
    Cell("wdpo", "lora", checkpointing=True, noise=True),
    Cell("kldpo", "lora", noise=True, accumulation=2),
]
# What cannot be run: TRL makes the checkpointing of adapters reentrant there
REFUSED = [("zero3", Cell("wdpo", "lora", checkpointing=True, noise=True))]
# Two backward passes for a micro-batch, which DeepSpeed does not have
ONE_SIDED = [Cell("wdpo_one_sided", model, checkpointing=True) for model in ("full", "lora")]
ONE_SIDED += [Cell("wdpo_one_sided", packed=packed, accumulation=2) for packed in (False, True)]
# The last, because a backward pass that fails half-way may disturb the cells after it
BF16 = [Cell(loss, model, "bf16") for loss in ("rdro", "wdpo") for model in ("full", "lora")]
BF16 += [Cell("rdro", dtype="bf16", packed=True)]
# One loss for each of those three things with everything that MATRIX varies at once, and with bf16
REPRESENTATIVES = [
    Cell(loss, "lora", checkpointing=True, precomputed=True, accumulation=2) for loss in ("drdpo", "repo", "mrpo")
] + [Cell(loss, dtype="bf16", accumulation=2) for loss in ("drdpo", "repo", "mrpo")]
FAMILY_CELLS = [Cell(loss, accumulation=2) for loss in FAMILY if loss != "wdpo_one_sided"]
FAMILY_CELLS += REPRESENTATIVES[:3]
CELLS = MATRIX + FAMILY_CELLS + QLORA + PACKED + NOISE + ONE_SIDED + BF16 + REPRESENTATIVES[3:]

# Splits of one step's samples: on each rank, (micro-batch, accumulation)
SPLITS = {1: [(8, 1), (2, 4), (1, 8)], 2: [(4, 1), (1, 4)]}
SPLIT_ENGINES = ("single", "ddp", "zero3")


def split_cells(world: int) -> list[Cell]:
    """One step in every way to split it over `world` ranks, of every loss where the split could matter."""
    return [
        Cell(loss, micro_batch=micro_batch, accumulation=accumulation, steps=1)
        for loss in (*LOSSES, *OVER_A_STEP)
        for micro_batch, accumulation in SPLITS[world]
        # wdpo's root spans a micro-step, and TRL's `sft` divides by the tokens of a micro-batch
        if loss != "rdro+sft" and (loss not in COUPLED or accumulation == 1)
    ]


def is_launched(engine: str, cell: Cell) -> bool:
    """Whether the engine has what the cell needs."""
    return not (engine.startswith("zero") and cell in ONE_SIDED)


def runs(engine: str, cell: Cell) -> bool:
    """Whether the cell is run to its end, not refused."""
    return is_launched(engine, cell) and (engine, cell) not in REFUSED


def cells_of(engine: str) -> list[Cell]:
    """All that one launch of `engine` runs."""
    splits = split_cells(ENGINES[engine]) if engine in SPLIT_ENGINES else []
    return splits + [cell for cell in CELLS if is_launched(engine, cell)]


def tolerances(cell: Cell) -> dict[str, float]:
    if cell.micro_batch is not None:
        return TOLERANCES["split"]
    if cell.loss == "wdpo_one_sided" and cell.packed:  # k times what packed rows round in another place
        return TOLERANCES["one-sided, packed rows"]
    return TOLERANCES[cell.dtype]


def update(run: dict[str, Any]) -> torch.Tensor:
    """What training added to the trainable parameters, as one vector."""
    return torch.cat([(run["after"][name] - run["before"][name]).flatten() for name in sorted(run["before"])])


def errors(run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """Relative differences between two runs: the largest of the steps' losses and gradient norms, and the update's."""
    if sorted(run["before"]) != sorted(baseline["before"]):
        raise ValueError("The two runs trained different parameters.")
    found = {}
    for key in ("loss", "grad_norm"):
        pairs = list(zip(run[key], baseline[key], strict=True))
        found[key] = max(abs(a - b) / abs(b) for a, b in pairs)
    expected = update(baseline)
    found["update"] = ((update(run) - expected).norm() / expected.norm()).item()
    return found


def require_equal(run: dict[str, Any], baseline: dict[str, Any], cell: Cell) -> None:
    assert run["before"].keys() == baseline["before"].keys()
    found = errors(run, baseline)
    too_large = {key: found[key] for key, limit in tolerances(cell).items() if not found[key] <= limit}
    assert not too_large, f"relative differences {too_large} beyond {tolerances(cell)}"
