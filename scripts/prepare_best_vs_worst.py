r"""
Turn several responses to each prompt into pairs (prompt, chosen, rejected) for `trl-rdro dpo`: the best against the
worst by a reward model, or by a column of scores.

    python scripts/prepare_best_vs_worst.py nvidia/HelpSteer2 data/helpsteer2/train.jsonl --reward_model MODEL
    python scripts/prepare_best_vs_worst.py nvidia/HelpSteer2 data/helpsteer2/test.jsonl --split validation \
        --score_column helpfulness

MODEL, a hub id or a directory, is any sequence classifier with one output (`AutoModelForSequenceClassification`) whose
tokenizer has a chat template, as Skywork/Skywork-Reward-Llama-3.1-8B. One that brings code of its own, as ArmoRM does,
is refused: without it the classifier's head would be random.

Two schemas are known: rows of one response each, those of a prompt next to one another (HelpSteer2: prompt, response,
ratings), and rows with a list of responses. The two scores are kept in the output; prompts with one response, and
ties, are left out (`--min_gap` asks for a larger difference). A prompt that holds a conversation in one text, as many
of HelpSteer2's do, becomes its turns. `--soft_labels S` adds the column `preference_probability`, sigma(difference of
the scores / S), which the losses for soft labels read; S = 1 is what a Bradley-Terry reward model means by its scores.

The input is a hub id or a local file; it is streamed. A run that was interrupted continues when started again.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from conversations import as_messages, as_prompt
from resumable import Output, remaining, stream


# A prompt, its responses, their scores where the data has them, and the number of input rows
Group = tuple[Any, list[Any], list[float] | None, int]


def groups(rows: Iterable[dict[str, Any]], args: argparse.Namespace) -> Iterator[Group]:
    """The responses of each prompt."""
    for prompt, same in groupby(rows, key=lambda row: row[args.prompt_column]):
        same = list(same)
        responses, scores = [], []
        for row in same:
            response = row[args.response_column]
            many = isinstance(response, list) and not (response and isinstance(response[0], dict))
            responses += response if many else [response]
            if args.score_column is not None:
                score = row[args.score_column]
                scores += score if many else [score]
        yield prompt, responses, scores if args.score_column is not None else None, len(same)


def load_reward_model(name: str, dtype: Any) -> tuple[Any, Any]:
    """A sequence classifier with one trained output, and its tokenizer; anything else ends the script."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "auto_map", None):
            # Without its code it would load as a plain classifier, with a head of random numbers
            sys.exit(f"{name} brings code of its own ({config.auto_map}), which is not run here: name a reward model")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot load the reward model {name}: {error}")
    if missing := sorted(loading["missing_keys"]):
        sys.exit(
            f"{name} is not a reward model that can be read here: it has no {', '.join(missing[:3])}"
            f"{', ...' if missing[3:] else ''}, which would be random"
        )
    if model.config.num_labels != 1:
        sys.exit(f"{name} has {model.config.num_labels} outputs: a reward model has one")
    if tokenizer.chat_template is None:
        sys.exit(f"the tokenizer of {name} has no chat template: a reward model reads conversations")
    return model.eval(), tokenizer


def unused_token(texts: Iterable[list[int]]) -> int:
    """A token that none of the texts has."""
    used = set().union(*texts)
    return next(token for token in range(len(used) + 1) if token not in used)


def reward_scorer(args: argparse.Namespace) -> Callable[[list[tuple[Any, Any]]], list[float]]:
    """A function from (prompt, response) to the reward model's scores, in batches of similar length."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_reward_model(
        args.reward_model, torch.bfloat16 if device.startswith("cuda") else torch.float32
    )
    model.to(device)
    pad_token_id = model.config.pad_token_id

    @torch.no_grad()
    def score(pairs: list[tuple[Any, Any]]) -> list[float]:
        texts = [
            tokenizer.apply_chat_template(as_prompt(prompt) + as_messages("assistant", response), tokenize=False)
            for prompt, response in pairs
        ]
        # The template has put the special tokens in already
        tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=args.max_length)["input_ids"]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        scores = [0.0] * len(tokens)
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            rows = [torch.tensor(tokens[i], device=device) for i in batch]
            # The classifier reads at the last token that is no padding. A model without a padding token of its own
            # must not get one that can end a text, as the end-of-text token does: it would read one token early
            pad = unused_token(tokens[i] for i in batch) if pad_token_id is None else pad_token_id
            model.config.pad_token_id = pad
            inputs = {
                "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            }
            for i, value in zip(batch, model(**inputs).logits[:, 0].float().tolist(), strict=True):
                scores[i] = value
        return scores

    return score


def best_vs_worst(
    group: Group, scores: list[float], min_gap: float, soft_labels: float | None
) -> Iterator[dict[str, Any]]:
    """The pair of a prompt, if it has one."""
    prompt, responses, _, _ = group
    ranked = sorted(range(len(responses)), key=lambda i: scores[i])
    if len(ranked) < 2:
        return
    worst, best = ranked[0], ranked[-1]
    gap = scores[best] - scores[worst]
    if gap > 0 and gap >= min_gap:
        yield {
            "prompt": as_prompt(prompt),
            "chosen": as_messages("assistant", responses[best]),
            "rejected": as_messages("assistant", responses[worst]),
            "score_chosen": float(scores[best]),
            "score_rejected": float(scores[worst]),
            **({} if soft_labels is None else {"preference_probability": 1 / (1 + math.exp(-gap / soft_labels))}),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a hub id, a directory, or a .jsonl, .json, .parquet or .csv file")
    parser.add_argument("output", help="the .jsonl file to write")
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--reward_model", help="a hub id or directory")
    by.add_argument("--score_column", help="the column of scores, one for each response")
    parser.add_argument("--split", default="train")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--response_column", default="response", help="a text, a conversation, or a list of texts")
    parser.add_argument("--min_gap", type=float, default=0.0, help="the smallest difference of scores to keep")
    parser.add_argument("--soft_labels", type=float, metavar="S", help="also write preference_probability")
    parser.add_argument("--batch_size", type=int, default=16, help="responses that the reward model reads at once")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a response with its prompt")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--limit", type=int, help="input rows to read")
    args = parser.parse_args(argv)
    if args.soft_labels is not None and not args.soft_labels > 0:
        parser.error(f"--soft_labels must be more than 0, got {args.soft_labels}")

    free = ("output", "batch_size", "device")  # what may differ when a run continues
    output = Output(args.output, {key: value for key, value in vars(args).items() if key not in free})
    if output.done:
        return 0
    score = reward_scorer(args) if args.reward_model is not None else None
    rows = remaining(stream(args.source, args.split), output, args.limit)
    prompts = groups(rows, args)
    try:
        # So many prompts at a time that batches can be put together from responses of similar length
        while step := list(islice(prompts, 2 * args.batch_size if score else 256)):
            if score is None:
                scores = [group[2] for group in step]
            else:
                flat = iter(score([(group[0], response) for group in step for response in group[1]]))
                scores = [list(islice(flat, len(group[1]))) for group in step]
            pairs = [
                pair
                for group, own in zip(step, scores, strict=True)
                for pair in best_vs_worst(group, own, args.min_gap, args.soft_labels)
            ]
            output.step(sum(group[3] for group in step), pairs)
    except KeyError as error:
        sys.exit(
            f"a row has no column {error}: name the columns with --prompt_column, --response_column, --score_column"
        )
    output.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
