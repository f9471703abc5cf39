"""
The tables of `docs/compatibility.md` are those of this suite.

They stand between `<!-- name -->` and `<!-- /name -->`, and `python -m tests.distributed.test_compatibility_doc`
writes them anew.
"""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
from trl.trainer import dpo_trainer

from . import test_engines, test_multi_node
from .matrix import CELLS, ENGINES, FAMILY, SPLIT_ENGINES, SPLITS, TOLERANCES, Cell


ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "compatibility.md"
GPU_RESULTS = ROOT / "docs" / "gpu_check.json"
MODELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA (NF4)"}
TITLES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
ON_OFF = {(False,): "off", (True,): "on", (False, True): "off and on"}

# What is refused: instead of it, who refuses it, and the words of the message
REFUSED = [
    ("`wdpo` with FSDP1", "FSDP2", "trl_rdro", "does not run with FSDP1"),
    ("`wdpo` on image data", "text data, or another loss", "trl_rdro", "perturbs text embeddings and is not defined"),
    ("unpaired `ddro`, `rdro` on image data", "pairs", "trl_rdro", "is not implemented for unpaired image data"),
    (
        "unpaired `ddro`, `rdro` on a streaming data set",
        "set `preferred_fraction`",
        "trl_rdro",
        "which cannot be counted on a",
    ),
    (
        "`kldpo` with accumulation, outside of `train()`",
        "`DPOTrainer.train()`",
        "trl_rdro",
        "without the weights of the step",
    ),
    ("our losses in a plain `trl.DPOConfig`", "`trl_rdro.DPOConfig`", "trl_rdro", "from trl_rdro."),
    ("`nn.DataParallel`", "a launcher", "trl", "does not support `nn.DataParallel`"),
    ("precomputing on a streaming data set", "a map-style one", "trl", "is not supported with IterableDataset"),
    ("precomputing on image data", "a reference model", "trl", "is not supported for vision datasets"),
    ("`sync_ref_model` with adapters", "full training", "trl", "`sync_ref_model=True` while using a PEFT model"),
]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_off(values: list[bool]) -> str:
    return ON_OFF[tuple(sorted(set(values)))]


def row_of(cell: Cell) -> tuple[str, str, bool]:
    return cell.model, cell.dtype, cell.loss in FAMILY


def engines_table() -> str:
    """One row for each model and precision, the family apart; every engine runs every cell."""
    rows = []
    for kind in dict.fromkeys(map(row_of, CELLS)):
        cells = [cell for cell in CELLS if row_of(cell) == kind]
        model, dtype, _ = kind
        reference = ["adapters off" if model != "full" else "model"]
        reference += ["precomputed"] * any(cell.precomputed for cell in cells)
        losses = list(dict.fromkeys(cell.loss for cell in cells))
        test = f"`test_equals_single_process[*-{model}-{dtype}*]`"
        rows.append(
            [
                f"{MODELS[model]}, {dtype}",
                ", ".join(f"`{loss}`" for loss in losses),
                on_off([cell.checkpointing for cell in cells]),
                " and ".join(reference),
                *["tested"] * len(TITLES),
                test,
            ]
        )
    header = ["trained", "losses", "gradient checkpointing", "reference"]
    header += [f"{TITLES[engine]} ×{world}" for engine, world in ENGINES.items() if engine in TITLES]
    return table([*header, "test"], rows)


def splits_table() -> str:
    rows = []
    for engine in SPLIT_ENGINES:
        splits = SPLITS[ENGINES[engine]]
        name = TITLES.get(engine, "one process")
        text = ", ".join(f"{ENGINES[engine]} × ({micro_batch} × {steps})" for micro_batch, steps in splits)
        rows.append([name, text, f"tested: `test_split_invariance[{engine}-*]`"])
    for engine in test_multi_node.CONFIGS:
        test = f"tested: `test_two_nodes_equal_single_process[{engine}-*]`"
        rows.append([f"{TITLES[engine]} on two nodes", "1 process on each", test])
    return table(["engine", "ranks × (micro-batch × accumulation)", ""], rows)


def tolerances_table() -> str:
    keys = ["loss", "grad_norm", "update"]
    return table(
        ["cells", "losses", "gradient norms", "update of the parameters"],
        [
            [name, *(f"{limits[key]:g}" if key in limits else "-" for key in keys)]
            for name, limits in TOLERANCES.items()
        ],
    )


def refused_table() -> str:
    return table(
        ["refused", "instead", "by", "message"],
        [[what, instead, f"`{package}`", f"{words}"] for what, instead, package, words in REFUSED],
    )


def gpu_table() -> str:
    sys.path.insert(0, str(ROOT / "scripts"))
    from gpu_check import CHECKS

    report = json.loads(GPU_RESULTS.read_text()) if GPU_RESULTS.exists() else {"checks": {}}
    rows = []
    for name, check in CHECKS.items():
        status = report["checks"].get(name, {}).get("status", "untested")
        if status != "untested":
            status = f"{status} on {report['device']}, {report['date']}"
        rows.append([f"`{name}`", check.what, "untested here" if status == "untested" else status])
    return table(["check", "", "status"], rows)


TABLES = {
    "engines": engines_table,
    "splits": splits_table,
    "tolerances": tolerances_table,
    "refused": refused_table,
    "gpu": gpu_table,
}


def block(name: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_the_suite(name):
    written = block(name).search(DOC.read_text())
    assert written is not None, f"docs/compatibility.md has no place for the table {name}"
    assert written.group() == TABLES[name](), "run python -m tests.distributed.test_compatibility_doc"


def test_named_tests_exist():
    modules = (test_engines, test_multi_node)
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", DOC.read_text()))
    assert named, "no test is named"
    missing = [name for name in named if not any(hasattr(module, name) for module in modules)]
    assert not missing


def test_every_cell_runs_on_every_engine():
    """What `engines_table` takes for granted."""
    parameters = {mark.args[0]: mark.args[1] for mark in test_engines.test_equals_single_process.pytestmark}
    assert parameters == {"cell": CELLS, "engine": list(TITLES)}
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert all(isinstance(cell, Cell) for cell in test_multi_node.CELLS)


@pytest.mark.parametrize(("what", "package", "words"), [(row[0], *row[2:]) for row in REFUSED])
def test_refusal_says_so(what, package, words):
    if package == "trl_rdro":
        sources = [path.read_text() for path in (ROOT / "trl_rdro").rglob("*.py")]
    else:
        sources = [inspect.getsource(dpo_trainer)]
    # Messages are broken over lines
    assert any(words in re.sub(r'"\s*\n\s*f?"', "", source) for source in sources), f"nobody says it of {what}"


def write() -> None:
    text = DOC.read_text()
    for name, make in TABLES.items():
        content = make()
        text = block(name).sub(lambda _, content=content: content, text)
    DOC.write_text(text)


if __name__ == "__main__":
    write()
