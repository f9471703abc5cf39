"""
The recipes: YAML files of settings, in the installed package or, where it runs from a checkout, beside it.

What is known of a recipe is read from the file itself: the model, the loss and how it is trained from its keys, the
command, the accelerate config and the number of GPUs from its header comment, the summary from that comment's first
line. A name is the path below `recipes/` without `.yaml`.
"""

import difflib
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..errors import UserError, user_error
from .yaml_files import read_text, read_yaml


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


def read_header(path: str | Path) -> dict[str, str]:
    """
    The `# name: value` lines of the comment at the top of a recipe: its `method` (the command), `accelerate` config,
    number of `gpus` and `memory`. Without a method line it is the command of the first launch line.
    """
    comment = "\n".join(takewhile(lambda line: line.startswith("#"), read_text(path).split("\n")))
    header = dict(re.findall(r"^# (method|accelerate|gpus|memory): *(.+?) *$", comment, re.MULTILINE))
    if "method" not in header and (launch := re.search(r"(?:trl-rdro |scripts/)(dpo|kto|iterate)\b", comment)):
        header["method"] = launch[1]
    if header.get("method", "dpo") not in ("dpo", "kto", "iterate"):
        raise UserError(f"the header of {path} has method {header['method']}: it must be dpo, kto or iterate")
    if not re.fullmatch(r"[1-9]\d*", header.get("gpus", "1")):
        raise UserError(f"the header of {path} has gpus {header['gpus']}: it must be a whole number >= 1")
    return header


def read_recipe(path: Path, directory: Path) -> Recipe:
    name = path.relative_to(directory).with_suffix("").as_posix()
    recipe = Recipe(name, path, summary(read_text(path)))
    if recipe.is_accelerate_config:
        return recipe
    keys, header = read_yaml(path), read_header(path)
    recipe.model = str(keys.get("model_name_or_path", "any"))
    loss = keys.get("loss_type", "")
    recipe.loss = "+".join(map(str, loss)) if isinstance(loss, list) else str(loss)
    quantised = keys.get("load_in_4bit") or keys.get("load_in_8bit")
    recipe.method = ("qlora" if quantised else "lora") if keys.get("use_peft") else "full"
    recipe.command, recipe.gpus = header.get("method", ""), header.get("gpus", "")
    return recipe


def summary(text: str) -> str:
    """The first line of the header comment, or its first sentence where that is shorter."""
    first = text.partition("\n")[0]
    return first.lstrip("#").strip().partition(". ")[0].rstrip(".,:") if first.startswith("#") else ""


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
    # Its launch lines work from where the user is: here by its name, elsewhere by the whole path
    text = localised(recipe, target if directory == "." else target.resolve())
    with user_error(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(target, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{target} exists already and is left as it is: move it, or copy --to elsewhere") from None
    return target
