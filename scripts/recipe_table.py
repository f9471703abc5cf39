"""
Write the README's table of recipes from the recipes themselves.

    python scripts/recipe_table.py
    python scripts/recipe_table.py --memory tests/fixtures/model_configs

The first copies what the recipes' headers say into README.md, between the marks. The second computes the memory line
of each header anew, with `trl-rdro estimate`, before that: the argument is a directory with one `<model>/config.json`
for each model, so that no hub is needed.
"""

import argparse
import re
import sys
from pathlib import Path

import yaml

from trl_rdro.tools.recipes import read_header


ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
MARKS = "<!-- recipes -->\n", "<!-- /recipes -->"


def memory_line(path: Path, configs: Path) -> str:
    """What the header of a recipe says about its memory."""
    from trl_rdro.cli.estimate import read_run
    from trl_rdro.tools.memory import GIB, estimate

    header = read_header(path)
    accelerate = header["accelerate"]
    if accelerate.endswith(".yaml"):
        accelerate = str(ROOT / accelerate)
    model = yaml.safe_load(path.read_text())["model_name_or_path"]
    argv = ["--config", str(path), "--model_name_or_path", str(configs / Path(model).name)]
    shape, run = read_run(header["method"], argv, int(header["gpus"]), accelerate)
    result = estimate(shape, run)
    fits = result.cards()
    card = f"fits a {fits[0]} GB card" if fits else "fits no single card"
    peak = sum(result.parts.values())
    loading = f", {result.loading / GIB:.0f} GiB while loading" if result.loading > peak else ""
    return f"{peak / GIB:.0f} GiB per GPU{loading}, {card}; computed by `trl-rdro estimate`"


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| model | loss | method | data | GPUs | GiB per GPU | recipe |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in RECIPES:
        header, settings = read_header(path), yaml.safe_load(path.read_text())
        kind = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[path.stem.rpartition("_")[2]]
        accelerate = Path(header["accelerate"]).stem
        data = "pairs" if header["method"] == "dpo" else "unpaired"
        memory = re.match(r"(\d+) GiB per GPU(?:, (\d+) GiB while loading)?", header["memory"])
        gib = memory[1] + (f" ({memory[2]} while loading)" if memory[2] else "")
        recipe = path.relative_to(ROOT).as_posix()
        cells = [
            settings["model_name_or_path"].split("/")[1].removesuffix("-Instruct"),
            f"`{settings['loss_type']}`",
            kind,
            data,
            f"{header['gpus']}" + (f", {accelerate}" if accelerate != "single_gpu" else ""),
            gib,
            f"[{path.parent.name}/{path.stem}]({recipe})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=Path, metavar="CONFIGS", help="compute the memory lines with these configs")
    args = parser.parse_args()
    if args.memory is not None:
        for path in RECIPES:
            line = f"# memory: {memory_line(path, args.memory)}"
            path.write_text(
                re.sub(r"^# memory: .*$", lambda _, line=line: line, path.read_text(), count=1, flags=re.M)
            )
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    if not rest:
        sys.exit(f"{readme} has no {MARKS[0].strip()}")
    after = rest[rest.index(MARKS[1]) :]
    readme.write_text(before + MARKS[0] + table() + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
