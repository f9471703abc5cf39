"""
Write the tables of the documents from what they tell of, or check that they still do.

    python scripts/docs.py            # write all
    python scripts/docs.py --check    # write nothing; exit code 1 and the names of those that are out of date

A table stands between `<!-- name -->` and `<!-- /name -->`, and everything around it is prose. The memory line in the
header of each recipe is written too: by `trl-rdro estimate`, from the published configs in tests/fixtures, so that no
hub is needed.
"""

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench_table  # noqa: E402
import conformance  # noqa: E402
import doc_commands  # noqa: E402
from option_table import option_table  # noqa: E402

from tests.loss_cases import LOSS_CASES  # noqa: E402
from trl_rdro.cli.estimate import read_run  # noqa: E402
from trl_rdro.cli.option_table import TABLE, installed_versions, read_table  # noqa: E402
from trl_rdro.tools.memory import GIB, estimate  # noqa: E402
from trl_rdro.tools.recipes import read_header  # noqa: E402


RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
MODEL_CONFIGS = ROOT / "tests" / "fixtures" / "model_configs"
RESULTS = ROOT / "docs" / "results"
STUDIES = RESULTS / "studies"
ENGINE_TESTS = ROOT / "tests" / "distributed"


def filled(text: str, tables: dict[str, str], where: str = "the text") -> str:
    """`text` with each table between its marks. Exits with a sentence where a mark is missing."""
    for name, table in tables.items():
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        if not place.search(text):
            sys.exit(f"{where} has no <!-- {name} --> ... <!-- /{name} -->")
        text = place.sub(lambda _, table=table: table.rstrip("\n") + "\n", text, count=1)
    return text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


# README.md and the recipes


def with_memory_line(text: str, path: Path) -> str:
    """A recipe with what its header has to say about its memory."""
    header = read_header(path)
    accelerate = header["accelerate"]
    if accelerate.endswith(".yaml"):
        accelerate = str(ROOT / accelerate)
    model = yaml.safe_load(text)["model_name_or_path"]
    argv = ["--config", str(path), "--model_name_or_path", str(MODEL_CONFIGS / Path(model).name)]
    result = estimate(*read_run(header["method"], argv, int(header["gpus"]), accelerate))
    fits = result.cards()
    card = f"fits a {fits[0]} GB card" if fits else "fits no single card"
    peak = sum(result.parts.values())
    loading = f", {result.loading / GIB:.0f} GiB while loading" if result.loading > peak else ""
    line = f"# memory: {peak / GIB:.0f} GiB per GPU{loading}, {card}; computed by `trl-rdro estimate`"
    return re.sub(r"^# memory: .*$", lambda _: line, text, count=1, flags=re.MULTILINE)


def demo_table() -> str:
    """What `make demo` printed, of docs/results/demo.json."""
    report = json.loads((RESULTS / "demo.json").read_text())
    columns = ("accuracy", "margin", "chosen", "rejected", "log_normalisation")
    rows = [
        [
            f"`{name}`",
            *(
                f"{figures[column]['mean']:{'' if column == 'accuracy' else '+'}.2f} ± "
                f"{figures[column]['standard_error']:.2f}"
                for column in columns
            ),
        ]
        for name, figures in report["results"].items()
    ]
    header = ["loss", "accuracy", "margin", "chosen log-ratio", "rejected log-ratio", "log normalisation"]
    return (
        markdown(header, rows)
        + f"\n\n{report['held_out_pairs']} held-out pairs after {report['train_pairs']} training pairs, "
        f"± one standard error, seed {report['seed']}; {report['model']} with LoRA; {report['seconds']:.0f} s "
        f"on {report['hardware']}, {report['date'][:10]}."
    )


# Those that README.md shows
FIRST_RECIPES = ("qwen2.5-0.5b/kldpo_lora", "qwen2.5-7b/rdro_qlora", "llama-3.1-8b/rdro_full")


def recipes_table(document: Path, names: tuple[str, ...] | None = None) -> str:
    """The recipes, or those of these names, with links as they are in `document`."""
    rows = []
    paths = RECIPES if names is None else [ROOT / "recipes" / f"{name}.yaml" for name in names]
    for path in paths:
        header, settings = read_header(path), yaml.safe_load(path.read_text())
        kind = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[path.stem.rpartition("_")[2]]
        accelerate = Path(header["accelerate"]).stem
        memory = re.match(r"(\d+) GiB per GPU(?:, (\d+) GiB while loading)?", header["memory"])
        rows.append(
            [
                settings["model_name_or_path"].split("/")[1].removesuffix("-Instruct"),
                f"`{settings['loss_type']}`",
                kind,
                "pairs" if header["method"] == "dpo" else "unpaired",
                header["gpus"] + (f", {accelerate}" if accelerate != "single_gpu" else ""),
                memory[1] + (f" ({memory[2]} while loading)" if memory[2] else ""),
                f"[{path.parent.name}/{path.stem}]({path.relative_to(document.parent).as_posix()})",
            ]
        )
    return markdown(["model", "loss", "method", "data", "GPUs", "GiB per GPU", "recipe"], rows)


# docs/compatibility.md


MODELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA (NF4)"}
# What a cell is beside its model and precision, as in its name
VARIANTS = {"packed": "packed rows", "noise": "dropout"}
ENGINES = {"single": "one process", "ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
# What is refused: instead of it, who refuses it, and words of the message
REFUSED = [
    ("`wdpo` with FSDP1", "FSDP2", "trl_rdro", "does not run with FSDP1"),
    (
        "`wdpo` with dropout or NEFTune and reentrant checkpointing on an engine, as ZeRO-3 has it for adapters",
        "no dropout, or no checkpointing",
        "trl_rdro",
        "makes two forwards for one backward where",
    ),
    (
        "`wdpo_difference: one_sided` with DeepSpeed, fp16, another loss, or a mixture of experts' auxiliary loss",
        "`wdpo_difference: central`",
        "trl_rdro",
        "`wdpo_difference='one_sided'` cannot be",
    ),
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
    (
        "`padding_free` with vision models, mRoPE, layers that are no attention, attention dropout, ...",
        "`padding_free=False` ([list](packing.md#what-is-refused))",
        "trl_rdro",
        "`padding_free=True` cannot be used with",
    ),
    ("`nn.DataParallel`", "a launcher", "trl", "does not support `nn.DataParallel`"),
    ("precomputing on a streaming data set", "a map-style one", "trl", "is not supported with IterableDataset"),
    ("precomputing on image data", "a reference model", "trl", "is not supported for vision datasets"),
    ("`sync_ref_model` with adapters", "full training", "trl", "`sync_ref_model=True` while using a PEFT model"),
]


class _Collector:
    """A plugin of pytest that keeps the names of what is collected."""

    def pytest_collection_finish(self, session) -> None:
        self.names = [item.name for item in session.items]


@cache
def engine_tests() -> list[str]:
    """The names of the engine tests, parameters included: `test_split_invariance[ddp-rdro-full-fp32-4x1]`."""
    import pytest

    collector = _Collector()
    options = ["--collect-only", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:terminal"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main([*options, "--rootdir", str(ROOT), str(ENGINE_TESTS)], plugins=[collector])
    if code != 0:
        sys.exit(f"pytest cannot collect {ENGINE_TESTS}")
    return collector.names


def cells(test: str) -> list[tuple[str, str, list[str]]]:
    """Engine, loss and the rest (model, precision, options) of each case of an engine test."""
    found = [re.fullmatch(rf"{test}\[([^-]+)-([^-]+)-(.+)\]", name) for name in engine_tests()]
    return [(match[1], match[2], match[3].split("-")) for match in found if match]


def variant(rest: list[str]) -> str:
    return next((name for name in VARIANTS if name in rest), "")


def engines_table() -> str:
    """One row for each model, precision and set of options that its losses are tested with."""
    tested = cells("test_equals_single_process")
    engines = {engine: title for engine, title in ENGINES.items() if engine != "single"}
    processes = json.loads((ENGINE_TESTS / "engines.json").read_text())["processes"]
    combinations: dict[tuple, set[str]] = {}
    for _, loss, rest in tested:
        combinations.setdefault((loss, *rest[:2], variant(rest)), set()).add("-".join(rest[2:]))
    kinds = {key: (*key[1:], frozenset(options)) for key, options in combinations.items()}
    rows = []
    for kind in dict.fromkeys(kinds.values()):
        of_row = [
            (engine, loss, rest) for engine, loss, rest in tested if kinds[(loss, *rest[:2], variant(rest))] == kind
        ]
        model, dtype, of_kind, _ = kind
        by_engine = {engine: [cell[1:] for cell in of_row if cell[0] == engine] for engine in engines}
        all_cells = max(by_engine.values(), key=len)
        options = [rest[2:] for _, rest in all_cells]
        checkpointing = {"checkpointing" in option for option in options}
        reference = ["adapters off" if model != "full" else "model"]
        reference += ["precomputed"] * any("precomputed" in option for option in options)
        rows.append(
            [
                f"{MODELS[model]}, {dtype}" + (f", {VARIANTS[of_kind]}" if of_kind else ""),
                ", ".join(f"`{loss}`" for loss in dict.fromkeys(loss for loss, _ in all_cells)),
                " and ".join(["off"] * (False in checkpointing) + ["on"] * (True in checkpointing)),
                " and ".join(reference),
                *(
                    "tested" if of_engine == all_cells else "in part" if of_engine else "refused"
                    for of_engine in by_engine.values()
                ),
                f"`test_equals_single_process[*-{model}-{dtype}{f'-*{of_kind}' if of_kind else '*'}]`",
            ]
        )
    titles = [f"{title} ×{processes[engine]}" for engine, title in engines.items()]
    return markdown(["trained", "losses", "gradient checkpointing", "reference", *titles, "test"], rows)


def splits_table() -> str:
    processes = json.loads((ENGINE_TESTS / "engines.json").read_text())["processes"]
    splits: dict[str, list[str]] = {}
    for engine, _, rest in cells("test_split_invariance"):
        text = f"{processes[engine]} × ({rest[-1].replace('x', ' × ')})"
        splits.setdefault(engine, []).append(text)
    rows = [
        [ENGINES[engine], ", ".join(dict.fromkeys(texts)), f"tested: `test_split_invariance[{engine}-*]`"]
        for engine, texts in splits.items()
    ]
    for engine in dict.fromkeys(engine for engine, _, _ in cells("test_two_nodes_equal_single_process")):
        test = f"tested: `test_two_nodes_equal_single_process[{engine}-*]`"
        rows.append([f"{ENGINES[engine]} on two nodes", "1 process on each", test])
    return markdown(["engine", "ranks × (micro-batch × accumulation)", ""], rows)


def tolerances_table() -> str:
    keys = ["loss", "grad_norm", "update"]
    tolerances = json.loads((ENGINE_TESTS / "engines.json").read_text())["tolerances"]
    return markdown(
        ["cells", "losses", "gradient norms", "update of the parameters"],
        [
            [name, *(f"{limits[key]:g}" if key in limits else "-" for key in keys)]
            for name, limits in tolerances.items()
        ],
    )


def refused_table() -> str:
    return markdown(
        ["refused", "instead", "by", "message"],
        [[what, instead, f"`{package}`", words] for what, instead, package, words in REFUSED],
    )


def versions_table() -> str:
    """What `scripts/test_versions.py` ran: a row for each package, a column for each set."""
    sets = json.loads((ROOT / "docs" / "versions.json").read_text())
    packages = next(iter(sets.values()))["versions"]
    rows = [[package, *(entry["versions"][package] for entry in sets.values())] for package in packages]
    rows.append(["tests", *(f"{e['tests'] - e['skipped']} passed, {e['skipped']} skipped" for e in sets.values())])
    rows.append(["on", *(f"{entry['system']}, {entry['date']}" for entry in sets.values())])
    return markdown(["", *sets], rows)


def gpu_table() -> str:
    report = json.loads((ROOT / "docs" / "gpu_check.json").read_text())
    rows = []
    for name, check in report["checks"].items():
        untested = check["status"] == "untested"
        status = "untested here" if untested else f"{check['status']} on {report['device']}, {report['date']}"
        rows.append([f"`{name}`", check["what"], status])
    return markdown(["check", "", "status"], rows)


# docs/trackers.md


def metrics_table() -> str:
    """The names that the tests find in the log of each loss."""
    rows = []
    for name, case in LOSS_CASES.items():
        # Of each label by its name: the tests' groups are an example
        metrics = dict.fromkeys(re.sub(r"^weight_.*", "weight_GROUP", metric) for metric in case.metrics)
        if metrics:
            rows.append([f"`{name}`", ", ".join(f"`{name}/{metric}`" for metric in metrics)])
    return markdown(["loss", "logged with it"], rows)


# docs/studies.md


def study(name: str) -> str:
    """The command, where and when it ran, the table and the figure of a study."""
    summary = json.loads((STUDIES / name / "summary.json").read_text())
    seeds = sorted({cell["seeds"] * cell.get("draws", 1) for cell in summary["cells"]})
    unit = "draws" if "draws" in summary["cells"][0] else "seeds"
    runs = sum(cell["seeds"] for cell in summary["cells"])
    versions = ", ".join(f"{module} {version}" for module, version in summary["versions"].items())
    return "\n".join(
        [
            "```bash",
            summary["command"],
            "```",
            "",
            f"{summary['hardware']}; {summary['date']}; {' or '.join(map(str, seeds))} {unit}, {runs} runs, "
            f"{summary['cell_seconds'] / 60:.0f} minutes of one core; {versions}. Figures are means over the {unit} ± "
            "their standard error.",
            "",
            (STUDIES / name / "table.md").read_text().strip(),
            "",
            f"![{name.replace('_', ' ')}](results/studies/{name}/figure.png)",
        ]
    )


def total_time() -> str:
    """What all studies took together."""
    seconds = [json.loads((path / "summary.json").read_text())["cell_seconds"] for path in STUDIES.iterdir()]
    return f"All {len(seconds)} took {sum(seconds) / 60:.0f} minutes of one core, {sum(seconds) / 120:.0f} on two."


# docs/README.md


def coverage_table() -> str:
    return markdown(["commands of", "run by a test?"], [[name, text] for name, text in doc_commands.COVERAGE.items()])


# All of them


def packed() -> str:
    lines = (RESULTS / "bench-packed.jsonl").read_text().splitlines()
    return bench_table.packed_table([json.loads(line) for line in lines])


def bench() -> str:
    return bench_table.table(json.loads((RESULTS / "bench-small.json").read_text()))


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demo_table, "recipes": partial(recipes_table, ROOT / "README.md", FIRST_RECIPES)},
    "recipes/README.md": {"recipes": partial(recipes_table, ROOT / "recipes" / "README.md")},
    "docs/compatibility.md": {
        "engines": engines_table,
        "tolerances": tolerances_table,
        "splits": splits_table,
        "refused": refused_table,
        "versions": versions_table,
        "gpu": gpu_table,
    },
    "docs/conformance.md": conformance.TABLES,
    "docs/performance.md": {"packed": packed, "bench": bench},
    "docs/README.md": {"commands": coverage_table},
    "docs/trackers.md": {"metrics": metrics_table},
    "docs/studies.md": {
        "time": total_time,
        **{path.name: partial(study, path.name) for path in sorted(STUDIES.iterdir())},
    },
}
# In the order to write them in: README.md repeats what the recipes say
OPTIONS = TABLE.relative_to(ROOT).as_posix()
DOCUMENTS = [*(path.relative_to(ROOT).as_posix() for path in RECIPES), *TABLES, OPTIONS]


def written(name: str) -> str:
    """The text that a document should have."""
    path = ROOT / name
    if name == OPTIONS:
        return option_table()
    if path in RECIPES:
        return with_memory_line(path.read_text(), path)
    return filled(path.read_text(), {key: make() for key, make in TABLES[name].items()}, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a document is out of date")
    args = parser.parse_args()
    stale = []
    for name in DOCUMENTS:
        if args.check and name == OPTIONS and read_table()["versions"] != installed_versions():
            continue  # it is of other releases: there is nothing to compare
        text = written(name)
        if text != (ROOT / name).read_text():
            stale.append(name)
            if not args.check:
                (ROOT / name).write_text(text)
    for name in stale:
        print(f"{name} {'is out of date: run python scripts/docs.py' if args.check else 'is written anew'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
