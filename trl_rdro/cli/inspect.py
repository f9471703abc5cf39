"""
`trl-rdro inspect`: what a training run would see, before it costs anything.

Loads the tokenizer and the data of a recipe, no weights, and lets TRL prepare the rows exactly as its trainer does.
Prints one row, decoded, with prompt and completion told apart by the mask of the trainer's own collator, then counts,
lengths, truncation, and whatever looks wrong in any row.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .errors import UserError, user_error


STREAMED_ROWS = 1000
COLOURS = {"prompt": "36", "completion": "32", "cut off": "9;31", "special": "1;33", "warning": "1;31"}
NAMES = {"dpo": ("chosen", "rejected"), "kto": ("completion",)}


# Arguments


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-rdro inspect",
        usage="%(prog)s [dpo|kto] --config FILE [--row N] [--limit N] [--split NAME] [--color] [--OPTION VALUE ...]",
        description="Print one row of a recipe's training data as the model will see it, with prompt and completion "
        "masks coloured and special tokens visible, then counts, lengths in tokens, truncation, and warnings: BOS "
        "twice, chat template twice, no EOS, empty or equal completions. Loads the tokenizer and the data only. "
        "Options of the training command are taken too and override the file's. Without dpo or kto, the options and "
        "the data decide which it is.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="the row to print, of those kept (default: 0)")
    parser.add_argument(
        "--limit", type=int, metavar="N", help=f"prepare the first N rows only (streaming: default {STREAMED_ROWS})"
    )
    parser.add_argument("--split", metavar="NAME", help="the split to look at (default: the training split)")
    parser.add_argument("--color", action="store_true", help="colours even where the output is not a terminal")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, str | None, dict[str, tuple]]:
    """Our own arguments, the method if it is certain already, and the training arguments for each possible one."""
    from . import train

    parser = make_parser()

    def fail(message):
        raise UserError(message)

    parser.error = fail
    named = argv[:1] if argv[:1] in (["dpo"], ["kto"]) else []
    options, training_argv = parser.parse_known_args(argv[len(named) :])
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    if options.config is not None:
        training_argv += ["--config", options.config]
    training_argv += without_gpu()

    possible, errors = {}, []
    for method in named or ["dpo", "kto"]:
        try:
            possible[method] = train.parse(method, training_argv)[0]
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


# Data


def load(options: argparse.Namespace, arguments: tuple) -> tuple[Any, int | None]:
    """The rows to look at, and how many there are in all if that is known."""
    from datasets import Dataset, IterableDataset

    from . import train

    script_args, _, _, dataset_args = arguments
    if options.split is not None:
        script_args.dataset_train_split = options.split
    dataset, _ = train.load_data(script_args, dataset_args, with_eval=False)
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


def load_processing_class(model_args: Any, training_args: Any) -> Any:
    """The tokenizer, as TRL's trainers load it."""
    from pathlib import Path

    from ..checks.models import check_processing_class

    name = model_args.model_name_or_path
    where = "" if Path(name).exists() else " (not a local directory, and not found on the hub)"
    with user_error(ValueError), user_error(OSError, prefix=f"cannot load the tokenizer of {name}{where}: "):
        processing_class = check_processing_class(name, model_args.model_revision, training_args.trust_remote_code)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processing_class


# One row


def segments(method: str, collator: Callable, row: dict[str, Any], index: int) -> list[tuple[str, list[int]]]:
    """Completion `index` of the row as the collator makes it: runs of "prompt" and "completion" by the mask, and what
    was "cut off" at its start or end."""
    batch = collator([row])
    attention = batch["attention_mask"][index].bool()
    ids, mask = batch["input_ids"][index][attention].tolist(), batch["completion_mask"][index][attention].tolist()
    runs = [
        ("completion" if inside else "prompt", [token for token, _ in run])
        for inside, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    ]
    whole = row["prompt_ids"] + row[f"{NAMES[method][index]}_ids"]
    if len(ids) < len(whole):
        if getattr(collator, "truncation_mode", "keep_start") == "keep_start":
            runs.append(("cut off", whole[len(ids) :]))
        else:
            runs.insert(0, ("cut off", whole[: len(whole) - len(ids)]))
    return runs


class Painter:
    """Text for a terminal, or plain text."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def __call__(self, text: str, kind: str) -> str:
        return f"\033[{COLOURS[kind]}m{text}\033[0m" if self.enabled and text else text

    def tokens(self, tokenizer: Any, ids: list[int], kind: str) -> Iterator[str]:
        """The decoded lines of a segment, special tokens in their own colour."""
        special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        lines = [""]
        for is_special, run in itertools.groupby(ids, key=lambda token: token in special):
            text = tokenizer.decode(list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            first, *others = text.split("\n")
            colour = "special" if is_special and kind != "cut off" else kind
            lines[-1] += self(first, colour)
            lines += [self(line, colour) for line in others]
        yield from lines


def print_row(method: str, collator: Callable, row: dict[str, Any], tokenizer: Any, paint: Painter) -> None:
    for index, name in enumerate(NAMES[method]):
        parts = segments(method, collator, row, index)
        counts = ", ".join(f"{len(ids)} {kind}" for kind, ids in parts)
        label = f", label {row['label']}" if method == "kto" else ""
        truncated = any(kind == "cut off" for kind, _ in parts)
        print(f"\n{name}{label}: {counts} tokens" + (" - TRUNCATED" if truncated else ""))
        for kind, ids in parts:
            for line_number, line in enumerate(paint.tokens(tokenizer, ids, kind)):
                print(f"  {kind if line_number == 0 else '':10} | {line}")


# All rows


class Findings:
    """How many rows something is wrong with, and the first of them."""

    def __init__(self):
        self.rows: dict[str, list[int]] = {}

    def add(self, sentence: str, row: int) -> None:
        self.rows.setdefault(sentence, []).append(row)

    def lines(self, total: int) -> Iterator[str]:
        for sentence, rows in self.rows.items():
            yield f"{sentence}: {len(rows)} of {total} rows, e.g. --row {rows[0]}"


class TurnTokens:
    """The special tokens before and after what a user says in the chat template, for finding turns inside turns."""

    def __init__(self, tokenizer: Any):
        self.start = self.end = None
        if not tokenizer.chat_template:
            return
        marker = "zebra"
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
        except Exception:  # a template may refuse whatever it likes
            return
        before, _, after = text.partition(marker)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        found = [(before.rfind(token), token) for token in special if token in before]
        self.start = tokenizer.convert_tokens_to_ids(max(found)[1]) if found else None
        found = [(after.find(token), token) for token in special if token in after]
        self.end = tokenizer.convert_tokens_to_ids(min(found)[1]) if found else None
        if self.start == self.end:
            self.start = self.end = None

    def nested(self, ids: list[int]) -> bool:
        """Whether a turn begins before the last one has ended: the template was applied to its own output."""
        if self.start is None or self.end is None:
            return False
        is_open = False
        for token in ids:
            if token == self.start:
                if is_open:
                    return True
                is_open = True
            elif token == self.end:
                is_open = False
        return False


def check_row(
    method: str, row: dict[str, Any], number: int, tokenizer: Any, turns: TurnTokens, findings: Findings
) -> None:
    """Add what is wrong with one row, before truncation."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    completions = {name: row[f"{name}_ids"] for name in NAMES[method]}
    whole = [row["prompt_ids"] + ids for ids in completions.values()]
    if bos is not None and any(ids[:2] == [bos, bos] for ids in whole):
        findings.add(
            f"BOS TWICE: the row begins with {tokenizer.bos_token} {tokenizer.bos_token} (the text brings one and the "
            "tokenizer adds another)",
            number,
        )
    if any(turns.nested(ids) for ids in whole):
        findings.add(
            "CHAT TEMPLATE TWICE: a turn begins inside another (the text was rendered before, then put into messages "
            "or rendered again)",
            number,
        )
    for name, ids in completions.items():
        # Templates put a line break after the token that ends a turn
        if eos is not None and eos not in ids[-3:]:
            ending = tokenizer.convert_ids_to_tokens(turns.end) if turns.end in ids[-3:] else None
            findings.add(
                f"NO EOS: {name} does not end with {tokenizer.eos_token}"
                + (f" but with {ending}, at which generation has to be told to stop" if ending else ""),
                number,
            )
        if len(ids) < 8 and not tokenizer.decode(ids, skip_special_tokens=True).strip():
            findings.add(f"EMPTY: {name} has no text", number)
    if method == "dpo" and completions["chosen"] == completions["rejected"]:
        findings.add("EQUAL: chosen and rejected are the same", number)


def percentile(ordered: list[int], q: float) -> int:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def length_table(lengths: dict[str, list[int]]) -> Iterator[str]:
    columns = ("min", "5 %", "50 %", "95 %", "99 %", "max")
    yield f"{'tokens':20}" + "".join(f"{column:>8}" for column in columns)
    for name, values in lengths.items():
        ordered = sorted(values)
        cells = [ordered[0], *(percentile(ordered, q) for q in (0.05, 0.5, 0.95, 0.99)), ordered[-1]]
        yield f"{name:20}" + "".join(f"{cell:>8}" for cell in cells)


def share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.1%})"


def report(method: str, prepared: Any, rows_before: int, args: Any, tokenizer: Any, paint: Painter) -> None:
    """Print counts, lengths, truncation and findings of all rows."""
    from tqdm.auto import tqdm

    names = NAMES[method]
    lengths: dict[str, list[int]] = {name: [] for name in ("prompt", *names)}
    longest, preferred, findings, turns = [], 0, Findings(), TurnTokens(tokenizer)
    columns = ["prompt_ids", *(f"{name}_ids" for name in names), *(["label"] if method == "kto" else [])]
    for number, row in enumerate(tqdm(prepared.select_columns(columns), desc="Checking", leave=False, delay=2)):
        for name in lengths:
            lengths[name].append(len(row[f"{name}_ids"]))
        longest.append(len(row["prompt_ids"]) + max(len(row[f"{name}_ids"]) for name in names))
        preferred += bool(row.get("label"))
        check_row(method, row, number, tokenizer, turns, findings)

    total = len(prepared)
    print()
    if method == "kto":
        print(f"Classes: {share(preferred, total)} preferred, {total - preferred} not")
    else:
        print(f"Pairs: {total}")
    lengths["prompt + longer one" if method == "dpo" else "both"] = longest
    print("\n".join(length_table(lengths)))
    limit = args.max_length
    if limit is None:
        print("max_length: none, nothing is truncated")
    else:
        side = getattr(args, "truncation_mode", "keep_start")
        cut = sum(length > limit for length in longest)
        dropped = rows_before - total
        print(f"max_length {limit} ({side}): {share(cut, total)} truncated, {share(dropped, rows_before)} dropped")
        if cut:
            lost = "the end of the completion and its EOS" if side == "keep_start" else "the start of the prompt"
            findings.rows = {
                f"TRUNCATED: longer than max_length, {lost} cut off": [
                    number for number, length in enumerate(longest) if length > limit
                ],
                **findings.rows,
            }
    for line in findings.lines(total):
        print(paint("! ", "warning") + line)
    if dropped_all := (rows_before - total if limit is not None else 0):
        print(paint("! ", "warning") + f"DROPPED: no room for a completion after the prompt: {dropped_all} rows")
    if not findings.rows and not dropped_all:
        print("Nothing looks wrong.")


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        make_parser().print_help()
        return 0
    options, method, possible = parse(argv)

    from trl import is_conversational

    from ..checks.datasets import check_dataset
    from ..compat.trl import prepare_dataset

    dataset, total = load(options, next(iter(possible.values())))
    why = "its options" if method is not None and argv[:1] != [method] else ""
    if method is None:
        method, why = choose_method(dataset), "the columns of the data"
    script_args, args, model_args, _ = possible[method]
    with user_error(ValueError):
        check_dataset(dataset, options.split or script_args.dataset_train_split, method, tokenised=False)
    example = dataset[0]
    if {"image", "images"} & set(example):
        raise UserError("inspect shows text only, and this data set has images")

    processing_class = load_processing_class(model_args, args)
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
    print(f"Method:    {method}" + (f" (seen from {why}; `trl-rdro inspect dpo|kto` sets it)" if why else ""))
    name = script_args.dataset_name or "datasets"
    looked_at = "" if len(dataset) == total else f", the first {len(dataset)}" + (f" of {total}" if total else "")
    print(f"Data:      {name}, split {options.split or script_args.dataset_train_split}{looked_at}")
    print(f"Tokenizer: {model_args.model_name_or_path}, BOS {tokenizer.bos_token}, EOS {tokenizer.eos_token}")
    print(
        "Format:    conversational, rendered by the tokenizer's chat template"
        if is_conversational(example)
        else "Format:    plain text: no chat template is applied, EOS is added"
    )
    print(f"\nRow {options.row} of {len(prepared)}: {paint('prompt', 'prompt')}, {paint('completion', 'completion')}")
    print_row(method, collator, prepared[options.row], tokenizer, paint)
    report(method, prepared, rows_before, args, tokenizer, paint)
    return 0
