"""Which commands of the documents are run by a test, and why the others are not: a table in docs/README.md."""

PARSED = "options and names are checked by `tests/test_document_commands.py`"
NEEDS_MODEL = "needs SmolLM2-135M, which `make demo` fetches"
NEEDS_GPUS = "needs GPUs and the hub"

# Every document with code in it. What stands here is all that is claimed
COVERAGE = {
    "SKILL.md": "run in their order by `tests/test_skill.py`",
    "docs/first-run.ipynb": "run by `tests/test_notebook.py`",
    "README.md": "the `trl-rdro` lines of the first run by `tests/test_skill.py`, with a tiny model; `make demo` not, "
    "minutes, its parts by `tests/scripts/test_demo.py`; those with models of the hub not, " + PARSED,
    "recipes/README.md": "not run as they stand, "
    + NEEDS_GPUS
    + "; each recipe by `tests/recipes/test_recipes.py`, made tiny",
    "docs/compatibility.md": "not run, needs several GPUs or nodes; " + PARSED,
    "docs/conformance.md": "its tables by `tests/scripts/test_conformance.py`",
    "docs/dynamics.md": "not run as they stand; " + PARSED,
    "docs/estimate.md": "not run, reads a config of the hub; the same for each recipe by `scripts/docs.py`",
    "docs/evaluation.md": "not run, needs the hub and packages in environments of their own; `trl-rdro` lines: "
    + PARSED,
    "docs/from-the-authors-code.md": "not run, " + NEEDS_GPUS + "; " + PARSED,
    "docs/from-trl.md": "not run, needs the hub; the notebook runs the same on a tiny model",
    "docs/gpu.md": "not run, needs a GPU; " + PARSED,
    "docs/iterate.md": "not run, " + NEEDS_MODEL + "; the loop by `tests/iterate`",
    "docs/losses.md": "not run as they stand; " + PARSED,
    "docs/data.md": "not run as they stand; " + PARSED,
    "docs/performance.md": "`make bench`: not run by a test, minutes; its parts by `tests/scripts/test_bench.py`",
    "docs/studies.md": "not run at their size, hours; each with `--size ci` by `tests/scripts/test_studies.py`",
    "docs/tools.md": "not run as they stand, " + NEEDS_MODEL + "; the commands by `tests/cli`",
    "docs/trackers.md": "not run, needs the hub",
    "CONTRIBUTING.md": "`make` targets: what `.ci/run` runs",
}
