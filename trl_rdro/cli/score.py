"""
`trl-rdro score`: what a model prefers, on any preference file, without a judge.

Scores each completion by its log-ratio to a reference model, the implicit reward up to beta, and reports accuracy and
margin of pairs, or the classes of labelled completions, overall and per value of a column (`trl_rdro.tools.scoring`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import UserError, user_error
from .parsing import Parser, require_between, require_directory_of
from .score_notes import notes
from .tables import aligned


MAX_LISTED = 40  # values of a group column in the printed table
SETTINGS = "run_settings.json"  # of a run, in its output directory
DEFAULT_BETA = 0.1  # TRL's


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-rdro score",
        description="Score preference data with a model: the log-ratio to a reference model (beta times it is the "
        "implicit reward) of each completion; then accuracy and margin of pairs, or class means and AUC of labelled "
        "completions, each with its standard error.",
    )
    parser.add_argument("--model", required=True, metavar="A", help="a directory or hub id: a model or a PEFT adapter")
    parser.add_argument(
        "--ref",
        metavar="B",
        help="the reference model (default: the data set's ref_*_logps columns; else, for an adapter, what it was "
        "trained against; else none)",
    )
    parser.add_argument(
        "--dataset", required=True, metavar="D", help="a .jsonl, .json, .parquet or .csv file, a directory or a hub id"
    )
    parser.add_argument("--dataset_config", metavar="NAME", help="the configuration of a hub data set")
    parser.add_argument("--split", help="default: test, or the only one there is")
    parser.add_argument(
        "--group",
        nargs="+",
        metavar="COLUMN",
        help="also report each value of these columns (default: `group`, where the data have it)",
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="rows per forward pass (default: 8)")
    parser.add_argument(
        "--max_length",
        type=int,
        default=1024,
        metavar="N",
        help="truncate to N tokens as in training; 0: never (default: 1024)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="of the weights; auto: as stored (default: bfloat16 on an accelerator, float32 on a CPU)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a hub model")
    parser.add_argument("--output", metavar="FILE", help="also write everything, each row's scores included, as JSON")
    suspects = parser.add_argument_group("wrong labels (pairs)")
    suspects.add_argument(
        "--suspects",
        type=int,
        metavar="N",
        help="estimate the share of flipped labels, and write the N pairs whose labels are most likely wrong",
    )
    suspects.add_argument(
        "--suspects_file", default="suspects.jsonl", metavar="FILE", help="where to (default: %(default)s)"
    )
    suspects.add_argument(
        "--beta",
        type=float,
        metavar="B",
        help=f"of the training (default: what the run's {SETTINGS} says, else {DEFAULT_BETA})",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    for name, least in (("batch_size", 1), ("max_length", 0), ("limit", 1), ("suspects", 1), ("beta", 1e-9)):
        require_between(f"--{name}", getattr(args, name), least)
    if args.beta is not None and args.suspects is None:
        raise UserError("--beta is of the search for wrong labels: add --suspects N, or leave it out")
    require_directory_of(args.output)
    require_directory_of(args.suspects_file if args.suspects else None)


def load_rows(args: argparse.Namespace) -> tuple[Any, str]:
    """The rows to score and the name of their split; a `UserError` where they are of the wrong kind."""
    from ..checks.datasets import check_dataset
    from ..tools.loading import load_splits, require_split, require_text

    splits = load_splits(args.dataset, args.dataset_config)
    split = args.split or (next(iter(splits)) if len(splits) == 1 else "test")
    dataset = require_split(splits, split, "--split")
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))

    columns = set(dataset.column_names)
    paired = not {"completion", "label"} <= columns or {"chosen", "rejected"} <= columns
    with user_error(ValueError):
        check_dataset(dataset, split, "dpo" if paired else "kto", tokenised=False)
    require_text(columns, "score")
    if args.group is None:
        args.group = ["group"] if "group" in columns else []
    if missing := [column for column in args.group if column not in columns]:
        raise UserError(f"the dataset has no column {missing[0]} to group by, only: {', '.join(dataset.column_names)}")
    return dataset, split


def cell(figure: dict[str, Any], digits: int) -> str:
    if figure["mean"] is None:
        return "-"
    error = figure["standard_error"]
    return f"{figure['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(result: dict[str, Any]) -> list[str]:
    paired = result["format"] == "pairs"
    keys = ("accuracy", "margin", "chosen", "rejected") if paired else ("auc", "preferred", "non_preferred")

    def line(name, figures):
        return [name, str(figures["n"]), *(cell(figures[key], 3 if key in ("accuracy", "auc") else 2) for key in keys)]

    lines = [["", "rows", *(key.replace("_", "-") for key in keys)], line("all", result["overall"])]
    for column, values in result["groups"].items():
        largest = sorted(values, key=lambda value: -values[value]["n"])[:MAX_LISTED]
        shown = [value for value in values if value in set(largest)]
        lines += [line(f"{column} = {value[:40]}", values[value]) for value in shown]
        if len(values) > len(shown):
            lines.append([f"{column}: {len(values) - len(shown)} values more in the JSON", *[""] * (len(keys) + 1)])
    return aligned(lines, numbers=True)


def report(result: dict[str, Any]) -> str:
    reference = result["reference"]
    what = (
        f"log-ratio to {reference}, in nats"
        if reference
        else "log-probability in nats: without --ref there is no reward, and longer completions score lower"
    )
    lost = [
        f"{result[key]} {text}"
        for key, text in (
            ("truncated", f"truncated to {result['max_length']} tokens"),
            ("dropped", "dropped (no room after the prompt)"),
        )
        if result[key]
    ]
    head = [
        f"{result['model']} ({result['dtype']}) on {result['dataset']}, split {result['split']}, {result['format']}",
        f"Score: {what}; ± one standard error" + "".join(f"; {text}" for text in lost),
    ]
    below = notes(result)
    return "\n".join([*head, "", *table(result), *[""] * bool(below), *below])


def beta_of(args: argparse.Namespace) -> float:
    """The beta of the training, from the command line or the run."""
    path = Path(args.model) / SETTINGS
    if args.beta is None and path.is_file():
        with user_error(OSError, ValueError, prefix=f"{path} cannot be read (give --beta): "):
            return float(json.loads(path.read_text()).get("beta", DEFAULT_BETA))
    return DEFAULT_BETA if args.beta is None else args.beta


def find_suspects(args: argparse.Namespace, dataset: Any, scored: dict[str, Any]) -> dict[str, Any]:
    """Write the most suspect pairs, and return what is said of all labels. Adds `label_right` to each row's scores."""
    from ..run.files import write_rows
    from ..tools.suspects import judge_labels, most_suspect

    if scored["format"] != "pairs" or scored["reference"] is None:
        what = "pairs" if scored["format"] != "pairs" else "log-ratios to a reference model (--ref)"
        raise UserError(f"--suspects needs {what}, got {scored['format']} with scores that are {scored['score']}s")
    labels = judge_labels(dataset, scored["scores"], beta_of(args))
    with user_error(OSError):
        write_rows(Path(args.suspects_file), most_suspect(dataset, scored["scores"], labels, args.suspects))
    for row, posterior in zip(scored["scores"], labels.pop("posteriors"), strict=True):
        row["label_right"] = posterior
    del labels["weights"]
    return {**labels, "file": args.suspects_file}


def label_lines(labels: dict[str, Any]) -> list[str]:
    """What is said of the labels, in lines of text."""
    lines = [
        f"Flipped labels, as this model sees them at beta {labels['beta']:g}: {cell(labels['flipped'], 3)} of all "
        f"(by moments {cell(labels['flipped_by_moments'], 3)})"
    ]
    annotators = sorted(labels["annotators"].items(), key=lambda item: -item[1]["n"])[:MAX_LISTED]
    if annotators:
        lines += aligned(
            [["annotator", "pairs", "flipped"], *([k, str(v["n"]), cell(v, 3)] for k, v in annotators)], True
        )
    return [*lines, f"The most suspect pairs: {labels['file']}"]


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    check(args)
    dataset, split = load_rows(args)

    from ..tools.scoring import score

    scored = score(
        dataset,
        args.model,
        args.ref,
        groups=args.group,
        batch_size=args.batch_size,
        max_length=args.max_length or None,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    result = {"dataset": args.dataset, "split": split, **scored}
    if args.suspects:
        result["labels"] = find_suspects(args, dataset, scored)
    print(report(result))
    if args.suspects:
        print("\n".join(["", *label_lines(result["labels"])]))
    if args.output is not None:
        with user_error(OSError):
            Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0
