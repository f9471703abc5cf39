"""
The `trl-rdro` command.

A sub-command is a function from its own arguments to an exit code, and one line in `COMMANDS`. Whatever is slow to
import is imported inside that function, so that `trl-rdro --help` answers at once.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable

from .errors import report_user_errors


def dpo(argv: list[str]) -> int:
    from .launch import launch

    return launch("dpo", argv)


def kto(argv: list[str]) -> int:
    from .launch import launch

    return launch("kto", argv)


def run_inspect(argv: list[str]) -> int:
    from .inspect import main

    return main(argv)


def run_plot(argv: list[str]) -> int:
    from .plot import main

    return main(argv)


def run_recipes(argv: list[str]) -> int:
    from .recipes import main

    return main(argv)


def run_score(argv: list[str]) -> int:
    from .score import main

    return main(argv)


def run_estimate(argv: list[str]) -> int:
    from .estimate import main

    return main(argv)


def run_dynamics(argv: list[str]) -> int:
    from .dynamics import main

    return main(argv)


def run_iterate(argv: list[str]) -> int:
    from .iterate import main

    return main(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "dpo": (dpo, "train on pairs (prompt, chosen, rejected)"),
    "kto": (kto, "train on unpaired completions (prompt, completion, label)"),
    "recipes": (run_recipes, "list the recipes that come with this package, or copy one"),
    "inspect": (run_inspect, "print a row of the training data as the model will see it, and what looks wrong"),
    "score": (run_score, "implicit rewards, accuracy and margin of a model on a preference file"),
    "plot": (run_plot, "draw the curves of runs as a PNG"),
    "estimate": (run_estimate, "say what each GPU will hold, before anything is loaded"),
    "dynamics": (run_dynamics, "say whether a loop of sampling and training will settle, oscillate or collapse"),
    "iterate": (run_iterate, "rounds of sampling, judging and training, with a stability report for each"),
}


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    from .. import __version__

    parser = ArgumentParser(
        prog="trl-rdro",
        description="Robust preference losses for TRL: density-ratio (ddro, rdro) and distributionally robust (kldpo, "
        "wdpo).",
        epilog="`trl-rdro COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-rdro {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        # Each command parses its own arguments, `--help` included: what they are is known only after a slow import.
        subparsers.add_parser(name, help=summary, add_help=False)

    argv = sys.argv[1:] if argv is None else argv
    command = parser.parse_known_args(argv)[0].command
    if command is None:
        parser.print_help()
        return 0
    return COMMANDS[command][0](argv[argv.index(command) + 1 :])
