"""
`trl-rdro recipes`: which recipes there are, and a copy of one to edit.

A recipe is a YAML file below `recipes/`, in the installed package or, where the package runs from a checkout, beside
it. What the list says is read from the file itself: the model, the loss and how it is trained from its keys, the
trainer and the number of GPUs from its header comment, the summary from that comment's first line. A name is the path
below `recipes/` without `.yaml`.
"""

import argparse
import difflib
import os
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, user_error


PACKAGE = Path(__file__).resolve().parent.parent


@dataclass
class Recipe:
    name: str
    path: Path
    summary: str
    model: str = ""
    loss: str = ""
    method: str = ""  # full, lora or qlora
    command: str = ""  # dpo or kto
    gpus: str = ""

    @property
    def is_accelerate_config(self) -> bool:
        return self.name.startswith("accelerate/")


def recipe_directory() -> Path:
    """Where the recipes are: in the package, or in the checkout that it runs from."""
    for directory in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if directory.is_dir():
            return directory
    raise UserError(f"no recipes were installed with trl-rdro (looked in {PACKAGE})")


def list_recipes() -> list[Recipe]:
    """All recipes, then the accelerate configs."""
    directory = recipe_directory()
    recipes = [read_recipe(path, directory) for path in sorted(directory.rglob("*.yaml"))]
    return sorted(recipes, key=lambda recipe: recipe.is_accelerate_config)


def read_recipe(path: Path, directory: Path) -> Recipe:
    import yaml

    text = path.read_text(encoding="utf-8")
    recipe = Recipe(path.relative_to(directory).with_suffix("").as_posix(), path, summary(text))
    if recipe.is_accelerate_config:
        return recipe
    with user_error(yaml.YAMLError, prefix=f"{path} is not YAML: "):
        keys = yaml.safe_load(text)
    if not isinstance(keys, dict):
        raise UserError(f"{path} is not a recipe: it holds no keys")
    recipe.model = str(keys.get("model_name_or_path", "any"))
    loss = keys.get("loss_type", "")
    recipe.loss = "+".join(map(str, loss)) if isinstance(loss, list) else str(loss)
    quantised = keys.get("load_in_4bit") or keys.get("load_in_8bit")
    recipe.method = ("qlora" if quantised else "lora") if keys.get("use_peft") else "full"
    recipe.command = header(text, r"method: |.*(?:trl-rdro |scripts/)", "dpo|kto|iterate")
    recipe.gpus = header(text, "gpus: ", r"\d+")
    return recipe


def header(text: str, before: str, value: str) -> str:
    """The first `value` after `before` in a comment line, or nothing."""
    match = re.search(rf"^# *(?:{before})({value})\b", text, re.MULTILINE)
    return match[1] if match else ""


def summary(text: str) -> str:
    """The first line of the header comment, or its first sentence where that is shorter."""
    first = text.partition("\n")[0]
    return first.lstrip("#").strip().partition(". ")[0].rstrip(".,:") if first.startswith("#") else ""


def table(recipes: list[Recipe]) -> str:
    """The list, a line each, cut to the width of a terminal."""
    rows = [("name", "model", "loss", "method", "command", "GPUs", "what it is")]
    for recipe in recipes:
        if not recipe.is_accelerate_config:
            model = recipe.model.rpartition("/")[2]
            columns = (model, recipe.loss, recipe.method, recipe.command, recipe.gpus, recipe.summary)
            rows.append((recipe.name, *columns))
    lines = aligned(rows)
    if configs := [(recipe.name, recipe.summary) for recipe in recipes if recipe.is_accelerate_config]:
        lines += ["", *aligned([("for --accelerate_config", "what it is"), *configs])]
    return "\n".join(lines)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns padded to their widest cell; in a terminal, the last one shortened to what is left of the line."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    room = max(shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths), 40)
    room = room if sys.stdout.isatty() else 10**6
    lines = []
    for *cells, last in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([*padded, textwrap.shorten(last, room, placeholder=" ...")]).rstrip())
    return lines


def find(name: str) -> Recipe:
    """The recipe called `name`, which may also end in `.yaml` or begin with `recipes/`, or be unique in its last
    part."""
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    if wanted in recipes:
        return recipes[wanted]
    same_file = [recipe for recipe in recipes.values() if Path(recipe.name).name == wanted]
    if len(same_file) == 1:
        return same_file[0]
    if same_file:
        raise UserError(f"{name} is the name of several recipes: {', '.join(recipe.name for recipe in same_file)}")
    near = difflib.get_close_matches(wanted, recipes, n=1)
    raise UserError(
        f"no recipe {name}" + (f", did you mean {near[0]}?" if near else ": `trl-rdro recipes` lists them")
    )


def localised(recipe: Recipe, target: Path) -> str:
    """The recipe's text with the paths that only exist in a checkout turned into those of the installed files, and
    its own name in the launch lines into the copy's."""
    from ..quickstart import QUICKSTART_DIR

    text = recipe.path.read_text(encoding="utf-8").replace(f"recipes/{recipe.name}.yaml", target.as_posix())
    text = text.replace("trl_rdro/data/", f"{Path(QUICKSTART_DIR).parent.as_posix()}/")
    return re.sub(r"(?<![\w/])recipes/accelerate/(?=\w)", f"{(recipe_directory() / 'accelerate').as_posix()}/", text)


def copy(name: str, directory: str) -> Path:
    """Put a recipe into `directory`, which is made, and return its path. Nothing is overwritten."""
    recipe = find(name)
    target = Path(directory) / recipe.path.name
    text = localised(recipe, target)
    with user_error(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(target, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{target} exists already and is left as it is: move it, or copy --to elsewhere") from None
    return target


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-rdro recipes",
        description="List the recipes that come with trl-rdro: YAML files for `trl-rdro dpo` and `trl-rdro kto`, and "
        "accelerate configs. Copy one, edit it, and start it with the line in its header.",
        allow_abbrev=False,
    )
    parser.add_argument("--copy", metavar="NAME", help="put this recipe into a directory, to be edited")
    parser.add_argument("--to", metavar="DIR", help="the directory for --copy (default: the working directory)")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.copy is None:
        if args.to is not None:
            raise UserError("--to goes with --copy NAME: `trl-rdro recipes` lists the names")
        try:
            print(table(list_recipes()), flush=True)
        except BrokenPipeError:  # `| head`: nothing is left to say, at exit neither
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        print(copy(args.copy, args.to or "."))
    return 0
