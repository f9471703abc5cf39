"""`trl-rdro recipes`: which recipes there are, and a copy of one to edit."""

import os
import sys

from ..errors import UserError
from ..tools.recipes import Recipe, copy, list_recipes
from .parsing import Parser
from .tables import aligned


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


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-rdro recipes",
        description="List the recipes that come with trl-rdro: YAML files for `trl-rdro dpo` and `trl-rdro kto`, and "
        "accelerate configs. Copy one, edit it, and start it with the line in its header.",
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
