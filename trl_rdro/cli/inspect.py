"""
`trl-rdro inspect`: what a training run would see, before it costs anything.

Loads the tokenizer and the data of a recipe, no weights, and lets TRL prepare the rows exactly as its trainer does;
`trl_rdro.tools.inspection` looks at them.
"""

import argparse
import importlib.util
import itertools
import random
import sys
from typing import Any

from ..errors import UserError, user_error
from .parsing import Parser, require_between


STREAMED_ROWS = 1000


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-rdro inspect",
        usage="%(prog)s [dpo|kto] --config FILE [--row N] [--limit N] [--split NAME] [--color] [--reference] "
        "[--OPTION VALUE ...]",
        description="Print one row of a recipe's training data as the model will see it, with prompt and completion "
        "masks coloured and special tokens visible, then counts, lengths in tokens, truncation, warnings (BOS twice, "
        "chat template twice, no EOS, empty or equal completions), and how much is padding. Loads the tokenizer and "
        "the data only, unless --reference asks how far the model is from the mixture of the data that ddro and rdro "
        "assume. Options of the training command are taken too and override the file's. Without dpo or kto, the "
        "options and the data decide which it is.",
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="the row to print, of those kept (default: 0)")
    parser.add_argument(
        "--limit", type=int, metavar="N", help=f"prepare the first N rows only (streaming: default {STREAMED_ROWS})"
    )
    parser.add_argument("--split", metavar="NAME", help="the split to look at (default: the training split)")
    parser.add_argument(
        "--reference",
        action="store_true",
        help="instead, load the model and measure how much of the completions of both classes it has still to learn",
    )
    parser.add_argument("--color", action="store_true", help="colours even where the output is not a terminal")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, str | None, dict[str, tuple]]:
    """Our own arguments, the method if it is certain already, and the training arguments for each possible one."""
    named = argv[:1] if argv[:1] in (["dpo"], ["kto"]) else []
    options, training_argv = make_parser().parse_known_args(argv[len(named) :])
    require_between("--limit", options.limit, 1)
    if options.config is not None:
        training_argv += ["--config", options.config]

    from . import training_options

    training_argv += without_gpu()
    possible, errors = {}, []
    for method in named or ["dpo", "kto"]:
        try:
            arguments, *_ = training_options.parse(method, training_argv)
            possible[method] = arguments
        except UserError as error:
            errors.append(error)
    if not possible:
        # An option that only the other method knows says less than what is wrong with its value there
        raise min(errors, key=lambda error: str(error).startswith("unknown option"))
    return options, next(iter(possible)) if len(possible) == 1 else None, possible


def without_gpu() -> list[str]:
    """Overrides with which the config of a GPU run can be built where there is none."""
    import torch

    return [] if torch.cuda.is_available() else ["--use_cpu", "true", "--bf16", "false", "--tf32", "false"]


def load(options: argparse.Namespace, arguments: tuple) -> tuple[Any, int | None]:
    """The rows to look at, and how many there are in all if that is known."""
    from datasets import Dataset, IterableDataset

    from .train import load_data

    script_args, _, _, dataset_args = arguments
    if options.split is not None:
        script_args.dataset_train_split = options.split
    dataset, _ = load_data(script_args, dataset_args, with_eval=False)
    if isinstance(dataset, IterableDataset):
        from tqdm.auto import tqdm

        limit = options.limit or STREAMED_ROWS
        rows = list(tqdm(itertools.islice(dataset, limit), total=limit, desc="Reading the stream"))
        if not rows:
            raise UserError("the data set is empty")
        return Dataset.from_list(rows), None
    total = len(dataset)
    return dataset.select(range(min(options.limit, total))) if options.limit else dataset, total


def choose_method(dataset: Any) -> str:
    return "kto" if {"completion", "label"} <= set(dataset.column_names) else "dpo"


def check_rows(dataset: Any, split: str, method: str, args: Any) -> tuple[str, ...]:
    """The columns beside the texts that the losses in `args` read. A `UserError` for data that cannot be used."""
    from ..checks.datasets import check_dataset
    from ..losses.types import column_names, in_use
    from ..trainers.columns import needed_columns

    loss_types = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    losses = in_use(loss_types, getattr(args, "inner_loss_type", None))
    read = column_names(losses)
    with user_error(ValueError):
        check_dataset(dataset, split, method, needed_columns(losses, args), read, tokenised=False)
    return read


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        make_parser().print_help()
        return 0
    options, method, possible = parse(argv)

    from ..compat.trl import prepare_dataset
    from ..tools.inspection import Painter, inspect_rows, report_lines, row_lines
    from ..tools.loading import load_processing_class, require_text
    from ..tools.padding import padding_lines

    dataset, total = load(options, next(iter(possible.values())))
    why = "its options" if method is not None and argv[:1] != [method] else ""
    if method is None:
        method, why = choose_method(dataset), "the columns of the data"
    script_args, args, model_args, _ = possible[method]
    split = options.split or script_args.dataset_train_split
    read = check_rows(dataset, split, method, args)
    example = dataset[0]
    require_text(example, "inspect")

    if options.reference:
        return inspect_reference(script_args, args, model_args, dataset, options.limit)
    name = model_args.model_name_or_path
    processing_class = load_processing_class(name, model_args.model_revision, args.trust_remote_code)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    with user_error(Exception, prefix="TRL cannot prepare these rows: "):
        prepared, collator = prepare_dataset(method, dataset, processing_class, args)
    rows_before = len(dataset) * (2 if method == "kto" and "chosen" in example else 1)
    if not len(prepared):
        raise UserError(
            f"all {rows_before} rows are dropped: each prompt alone fills max_length={args.max_length}; raise it"
        )
    if not 0 <= options.row < len(prepared):
        raise UserError(f"no row {options.row}: {len(prepared)} rows were kept, counted from 0")

    paint = Painter(options.color or sys.stdout.isatty())
    looked_at = "" if len(dataset) == total else f", the first {len(dataset)}" + (f" of {total}" if total else "")
    print(f"Method:    {method}" + (f" (seen from {why}; `trl-rdro inspect dpo|kto` sets it)" if why else ""))
    print(f"Data:      {script_args.dataset_name or 'datasets'}, split {split}{looked_at}")
    print(f"Tokenizer: {name}, BOS {tokenizer.bos_token}, EOS {tokenizer.eos_token}")
    print(f"Format:    {format_of(example)}")
    print(f"\nRow {options.row} of {len(prepared)}: {paint('prompt', 'prompt')}, {paint('completion', 'completion')}")
    print("\n".join(row_lines(method, collator, prepared[options.row], tokenizer, paint)))
    print()
    inspection = inspect_rows(method, prepared, rows_before, args, tokenizer, read)
    print("\n".join(report_lines(inspection, paint)))
    print("\n".join(padding_lines(inspection, args)))
    return 0


def inspect_reference(script_args: Any, args: Any, model_args: Any, dataset: Any, limit: int | None) -> int:
    """Print how far the model is from the mixture of the data, and what to do about it."""
    from ..tools import reference_distance
    from ..tools.scoring import load_policy, prepare

    if importlib.util.find_spec("peft") is None:
        raise UserError("--reference needs PEFT: pip install 'trl-rdro[peft]'")
    if limit is None:
        rows = random.Random(0).sample(range(len(dataset)), min(len(dataset), reference_distance.ROWS))
        dataset = dataset.select(rows)
    policy = load_policy(model_args.model_name_or_path, None, args.trust_remote_code)
    with user_error(Exception, prefix="TRL cannot prepare these rows: "):
        prepared = prepare(dataset, policy.tokenizer, args.max_length)
    distance = reference_distance.measure(policy, prepared)
    print("\n".join(reference_distance.report_lines(distance, script_args.dataset_name or "the data")))
    return 0


def format_of(example: dict[str, Any]) -> str:
    from trl import is_conversational

    if is_conversational(example):
        return "conversational, rendered by the tokenizer's chat template"
    return "plain text: no chat template is applied, EOS is added"
