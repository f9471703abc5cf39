r"""
Turn rated responses into labelled completions (prompt, completion, label) for `trl-rdro kto`.

A completion is preferred if its rating reaches a threshold. UF-G, which the hub has ready-made as
trl-lib/ultrafeedback-gpt-3.5-turbo-helpfulness, is UltraFeedback's responses of gpt-3.5-turbo with a helpfulness of 5
(TRL's examples/datasets/ultrafeedback.py); it is made again, up to its split, by

    python scripts/prepare_ratings.py openbmb/UltraFeedback data/uf-g/train.jsonl

Another model's responses, another aspect, all models, another threshold:

    python scripts/prepare_ratings.py openbmb/UltraFeedback data/uf/train.jsonl --model all --aspect honesty \
        --threshold 4

Rows that hold one response and its ratings in columns, as nvidia/HelpSteer2 does:

    python scripts/prepare_ratings.py nvidia/HelpSteer2 data/hs2-unpaired/train.jsonl --score_column helpfulness \
        --threshold 4

A prompt that holds a conversation in one text, as many of HelpSteer2's do, becomes its turns.

The input is a hub id or a local file; it is streamed. A run that was interrupted continues when started again.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from conversations import as_messages, as_prompt
from resumable import Output, remaining, stream


STEP = 256  # input rows between two states


def rated_responses(row: dict[str, Any], args: argparse.Namespace) -> Iterator[tuple[Any, Any, Any]]:
    """The (prompt, response, rating) of a row. A rating that is missing is None."""
    if args.score_column is not None:
        yield row[args.prompt_column], row[args.response_column], row[args.score_column]
        return
    for model, completion in zip(row["models"], row["completions"], strict=False):
        if args.model in (model, "all"):
            annotation = completion["annotations"].get(args.aspect) or {}
            yield row["instruction"], completion["response"], annotation.get("Rating")


def is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def labelled(row: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The completions of a row with their labels. UltraFeedback's "N/A" is dropped."""
    for prompt, response, rating in rated_responses(row, args):
        if response and is_number(rating):
            yield {
                "prompt": as_prompt(prompt),
                "completion": as_messages("assistant", response),
                "label": float(rating) >= args.threshold,
            }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a hub id, a directory, or a .jsonl, .json, .parquet or .csv file")
    parser.add_argument("output", help="the .jsonl file to write")
    parser.add_argument("--split", default="train")
    parser.add_argument("--threshold", type=float, default=5.0, help="preferred from this rating on (default: 5)")
    parser.add_argument("--model", default="gpt-3.5-turbo", help="whose responses to take, or all")
    parser.add_argument("--aspect", default="helpfulness", help="whose rating to take")
    parser.add_argument("--score_column", help="the rating's column, for rows with one response each")
    parser.add_argument("--prompt_column", default="prompt", help="with --score_column")
    parser.add_argument("--response_column", default="response", help="with --score_column")
    parser.add_argument("--limit", type=int, help="input rows to read")
    args = parser.parse_args(argv)

    settings = {key: value for key, value in vars(args).items() if key != "output"}
    output = Output(args.output, settings)
    if output.done:
        return 0
    rows, count = [], 0
    for count, row in enumerate(remaining(stream(args.source, args.split), output, args.limit), 1):
        try:
            rows += labelled(row, args)
        except KeyError as error:
            sys.exit(f"a row has no {error}, only {', '.join(row)}: see --help for the schemas that are known")
        if count % STEP == 0:
            output.step(STEP, rows)
            rows = []
    output.step(count % STEP, rows)
    output.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
