"""`trl-rdro plot`: the curves of one or several runs as a PNG."""

from ..errors import UserError, user_error
from ..tools.run_logs import labels, log_history
from .parsing import Parser, require_png


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-rdro plot",
        description="Draw the curves of one or several runs: loss, preference accuracy, drift of chosen and rejected "
        "completions from the reference, gradient norm, and the losses' own metrics. Lines are training, dots are "
        "evaluations. `plot: true` in a recipe does it at the end of a run.",
    )
    parser.add_argument(
        "runs", metavar="RUN_DIR", nargs="+", help="output directory of a run (finished or not), or one checkpoint"
    )
    parser.add_argument("--output", default="curves.png", help="the PNG to write (default: curves.png)")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    require_png("--output", args.output)
    histories = dict(zip(labels(args.runs), map(log_history, args.runs), strict=True))

    from ..tools.plotting import is_drawable, plot_run

    for name, history in histories.items():
        if not is_drawable(history):
            raise UserError(f"{name} has logged nothing to draw: it may have ended before its first logging_steps")
    with user_error(OSError):
        print(plot_run(histories if len(histories) > 1 else next(iter(histories.values())), args.output))
    return 0
