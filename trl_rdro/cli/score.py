"""
`trl-rdro score`: what a model prefers, on any preference file, without a judge.

Scores each completion by its log-ratio to a reference model, the implicit reward up to beta, and reports accuracy and
margin of pairs, or the classes of labelled completions, overall and per value of a column (`trl_rdro.tools.scoring`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import UserError, user_error


MAX_LISTED = 40  # values of a group column in the printed table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-rdro score",
        description="Score preference data with a model: the log-ratio to a reference model (beta times it is the "
        "implicit reward) of each completion; then accuracy and margin of pairs, or class means and AUC of labelled "
        "completions, each with its standard error.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="A", help="a directory or hub id: a model or a PEFT adapter")
    parser.add_argument(
        "--ref", metavar="B", help="the reference model (default: for an adapter, its model without it; else none)"
    )
    parser.add_argument(
        "--dataset", required=True, metavar="D", help="a .jsonl, .json, .parquet or .csv file, a directory or a hub id"
    )
    parser.add_argument("--dataset_config", metavar="NAME", help="the configuration of a hub data set")
    parser.add_argument("--split", help="default: test, or the only one there is")
    parser.add_argument(
        "--group", nargs="+", default=[], metavar="COLUMN", help="also report each value of these columns"
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
    return parser


def check(args: argparse.Namespace) -> None:
    for name, least in (("batch_size", 1), ("max_length", 0), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if args.output is not None and not Path(args.output).parent.is_dir():
        raise UserError(f"cannot write {args.output}: there is no directory {Path(args.output).parent}")


def load_rows(args: argparse.Namespace) -> tuple[Any, str]:
    """The rows to score and the name of their split; a `UserError` where they are of the wrong kind."""
    from datasets import load_dataset

    from ..checks.datasets import check_dataset
    from .train import file_builder

    builder = file_builder(args.dataset)
    source = {"path": builder, "data_files": args.dataset} if builder else {"path": args.dataset}
    where = "" if Path(args.dataset).exists() else " (not a local file or directory, and not found on the hub)"
    with user_error(Exception, prefix=f"cannot load the dataset {args.dataset}{where}: "):
        splits = load_dataset(**source, name=args.dataset_config)
    split = args.split or ("test" if "test" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise UserError(f"the dataset has no split {split or 'test'}: give --split one of {', '.join(splits)}")
    dataset = splits[split]
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))

    columns = set(dataset.column_names)
    paired = not {"completion", "label"} <= columns or {"chosen", "rejected"} <= columns
    with user_error(ValueError):
        check_dataset(dataset, split, "dpo" if paired else "kto", tokenised=False)
    if {"image", "images"} & columns:
        raise UserError("score reads text only, and this data set has images")
    if missing := [column for column in args.group if column not in columns]:
        raise UserError(f"the dataset has no column {missing[0]} to group by, only: {', '.join(dataset.column_names)}")
    return dataset, split


def load_model(name: str, args: argparse.Namespace) -> Any:
    from ..tools import scoring

    where = "" if Path(name).exists() else " (not a local directory, and not found on the hub)"
    prefix = f"cannot load the model {name}{where}: "
    with user_error(ValueError), user_error(OSError, ImportError, prefix=prefix):
        return scoring.load_policy(name, args.dtype or scoring.default_dtype(), args.trust_remote_code)


def compute(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed and written."""
    dataset, split = load_rows(args)

    from ..tools import scoring

    policy = load_model(args.model, args)
    with user_error(Exception, prefix="TRL cannot prepare these rows: "):
        rows = scoring.prepare(dataset, policy.tokenizer, args.max_length or None)
    if not len(rows.dataset):
        raise UserError(f"no row has a prompt shorter than --max_length {args.max_length}: raise it")
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")

    scores = scoring.completion_logps(policy.model, rows, args.batch_size, "model")
    reference = args.ref
    if reference is None and policy.is_adapter:
        reference = f"{policy.model.peft_config['default'].base_model_name_or_path} (adapter off)"
        scores -= scoring.completion_logps(policy.model, rows, args.batch_size, "reference", policy.base())
    elif reference is not None:
        vocabulary = policy.tokenizer.get_vocab()
        del policy  # one model in memory at a time
        policy = load_model(reference, args)
        if policy.tokenizer.get_vocab() != vocabulary:
            raise UserError(f"{reference} has another vocabulary than {args.model}: their log-ratio means nothing")
        scores -= scoring.completion_logps(policy.model, rows, args.batch_size, "reference")
    if not scores.isfinite().all():
        raise UserError(f"the scores are not finite in {dtype}: try --dtype float32 (float16 overflows easily)")

    return {
        "model": args.model,
        "reference": reference,
        "score": "log-probability" if reference is None else "log-ratio",
        "dataset": args.dataset,
        "split": split,
        "format": "pairs" if rows.is_paired else "labelled completions",
        "rows": len(dataset),
        "dropped": rows.dropped,
        "truncated": rows.truncated,
        "max_length": args.max_length or None,
        "dtype": dtype,
        **scoring.summarise(rows, scores, args.group),
        "scores": scoring.per_row(rows, scores),
    }


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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in lines
    ]


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
    return "\n".join([*head, "", *table(result)])


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    check(args)
    result = compute(args)
    print(report(result))
    if args.output is not None:
        with user_error(OSError):
            Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0
