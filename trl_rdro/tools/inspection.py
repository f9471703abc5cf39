"""
Rows of training data as the model will see them, and what looks wrong with them.

Rows are those of TRL's own preparation, and prompt and completion are told apart by the mask of the trainer's own
collator, so that what is shown is what is trained on.

    prepared, collator = prepare_dataset("dpo", dataset, tokenizer, args)       # trl_rdro.compat.trl
    print("\n".join(row_lines("dpo", collator, prepared[0], tokenizer)))
    inspection = inspect_rows("dpo", prepared, len(dataset), args, tokenizer)   # .lengths, .findings, ...
    print("\n".join(report_lines(inspection)))
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .column_figures import column_lines, percentile


COLOURS = {"prompt": "36", "completion": "32", "cut off": "9;31", "special": "1;33", "warning": "1;31"}
NAMES = {"dpo": ("chosen", "rejected"), "kto": ("completion",)}


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


PLAIN = Painter(enabled=False)


def row_lines(
    method: str, collator: Callable, row: dict[str, Any], tokenizer: Any, paint: Painter = PLAIN
) -> Iterator[str]:
    """One prepared row in lines of text: its completions, each with its prompt, decoded."""
    for index, name in enumerate(NAMES[method]):
        parts = segments(method, collator, row, index)
        counts = ", ".join(f"{len(ids)} {kind}" for kind, ids in parts)
        label = f", label {row['label']}" if method == "kto" else ""
        truncated = any(kind == "cut off" for kind, _ in parts)
        yield ""
        yield f"{name}{label}: {counts} tokens" + (" - TRUNCATED" if truncated else "")
        for kind, ids in parts:
            for line_number, line in enumerate(paint.tokens(tokenizer, ids, kind)):
                yield f"  {kind if line_number == 0 else '':10} | {line}"


# All rows


class Findings:
    """What is wrong, and in which rows."""

    def __init__(self):
        self.rows: dict[str, list[int]] = {}

    def add(self, sentence: str, row: int) -> None:
        self.rows.setdefault(sentence, []).append(row)


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


@dataclass
class Inspection:
    """
    What all rows look like.

    Attributes:
        method: "dpo" (pairs) or "kto" (labelled completions).
        rows, rows_before: how many were kept, and how many there were.
        preferred: rows whose label is True.
        lengths: tokens of each row before truncation, for the prompt and each completion.
        longest: tokens of each row's prompt and longer completion together.
        max_length, truncation_mode: of the training arguments.
        findings: what looks wrong, and the rows it is seen in.
        columns: the values of the columns beside the texts that the losses read.
    """

    method: str
    rows: int
    rows_before: int
    preferred: int
    lengths: dict[str, list[int]]
    longest: list[int]
    max_length: int | None
    truncation_mode: str
    findings: dict[str, list[int]]
    columns: dict[str, list[Any]]

    @property
    def truncated(self) -> list[int]:
        """The rows that are longer than `max_length`."""
        limit = self.max_length
        return [] if limit is None else [row for row, length in enumerate(self.longest) if length > limit]

    @property
    def dropped(self) -> int:
        """How many rows were left out for want of room after the prompt."""
        return 0 if self.max_length is None else self.rows_before - self.rows


def inspect_rows(
    method: str, prepared: Any, rows_before: int, args: Any, tokenizer: Any, read: tuple[str, ...] = ()
) -> Inspection:
    """
    Look at all rows.

    Args:
        method: "dpo" or "kto".
        prepared: the data set as TRL's trainer prepares it.
        rows_before: how many rows it had before.
        args: the training arguments, of which `max_length` and `truncation_mode` are read.
        tokenizer: what it was prepared with.
        read: the columns beside the texts that the losses read, each of which the data need not have.
    """
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
    result = Inspection(
        method,
        len(prepared),
        rows_before,
        preferred,
        lengths,
        longest,
        args.max_length,
        getattr(args, "truncation_mode", "keep_start"),
        findings.rows,
        {name: prepared.with_format(None)[name][:] for name in read if name in prepared.column_names},
    )
    if result.truncated:
        keeps_start = result.truncation_mode == "keep_start"
        lost = "the end of the completion and its EOS" if keeps_start else "the start of the prompt"
        first = {f"TRUNCATED: longer than max_length, {lost} cut off": result.truncated}
        result.findings = first | result.findings
    return result


def length_table(lengths: dict[str, list[int]]) -> Iterator[str]:
    columns = ("min", "5 %", "50 %", "95 %", "99 %", "max")
    yield f"{'tokens':20}" + "".join(f"{column:>8}" for column in columns)
    for name, values in lengths.items():
        ordered = sorted(values)
        cells = [ordered[0], *(percentile(ordered, q) for q in (0.05, 0.5, 0.95, 0.99)), ordered[-1]]
        yield f"{name:20}" + "".join(f"{cell:>8}" for cell in cells)


def share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.1%})"


def report_lines(inspection: Inspection, paint: Painter = PLAIN) -> Iterator[str]:
    """Counts, lengths, truncation and findings in lines of text."""
    total, before, paired = inspection.rows, inspection.rows_before, inspection.method == "dpo"
    preferred, dropped = inspection.preferred, inspection.dropped
    yield f"Pairs: {total}" if paired else f"Classes: {share(preferred, total)} preferred, {total - preferred} not"
    yield from length_table(inspection.lengths | {"prompt + longer one" if paired else "both": inspection.longest})
    if inspection.max_length is None:
        yield "max_length: none, nothing is truncated"
    else:
        cut = share(len(inspection.truncated), total)
        limit = f"max_length {inspection.max_length} ({inspection.truncation_mode})"
        yield f"{limit}: {cut} truncated, {share(dropped, before)} dropped"
    yield from column_lines(inspection.columns)
    warning = paint("! ", "warning")
    for sentence, rows in inspection.findings.items():
        yield f"{warning}{sentence}: {len(rows)} of {total} rows, e.g. --row {rows[0]}"
    if dropped:
        yield f"{warning}DROPPED: no room for a completion after the prompt: {dropped} rows"
    if not inspection.findings and not dropped:
        yield "Nothing looks wrong."
