"""
The `trl-rdro` command.

A sub-command is one line in `COMMANDS` and a file of its name here, whose `main` takes the command's own arguments and
returns the exit code. The file is imported when the command is called, so that `trl-rdro --help` answers at once.
"""

import sys
from importlib import import_module

from ..run.signals import ending_on_signals
from .errors import report_user_errors
from .option_table import refuse_at_once
from .parsing import Parser


COMMANDS = {
    "dpo": "train on pairs (prompt, chosen, rejected)",
    "kto": "train on unpaired completions (prompt, completion, label)",
    "recipes": "list the recipes that come with this package, or copy one",
    "inspect": "print a row of the training data as the model will see it, and what looks wrong",
    "score": "implicit rewards, accuracy and margin of a model on a preference file",
    "plot": "draw the curves of runs as a PNG",
    "estimate": "say what each GPU will hold, before anything is loaded",
    "dynamics": "say whether a loop of sampling and training will settle, oscillate or collapse",
    "iterate": "rounds of sampling, judging and training, with a stability report for each",
}


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    from .. import __version__

    parser = Parser(
        prog="trl-rdro",
        description="Robust preference losses for TRL: of density ratios, distributionally robust, and of pairs.",
        epilog="`trl-rdro COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"trl-rdro {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        # Each command parses its own arguments, `--help` included: what they are is known only after a slow import.
        subparsers.add_parser(name, help=summary, add_help=False)

    argv = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    with ending_on_signals():
        refuse_at_once(command, argv[1:])
        return import_module(f".{command}", __package__).main(argv[1:])
