"""The judging of a round: from its samples to the rows that it trains on."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.files import Row, read_rows, write_rows
from .config import IterateConfig
from .judges import Judge, MissingLabels
from .pairs import Judged, judge_prompts, select_pairs
from .prompts import Prompt
from .references import geometric, linear, needs_distribution


def judge_round(
    judge: Judge, config: IterateConfig, args: Any, folder: Path, prompts: Sequence[Prompt], number: int
) -> None:
    """Judge the samples in `folder`, choose the pairs and write them to `train.jsonl` with their reference."""
    samples = read_rows(folder / "samples.jsonl")
    judged = _judged(judge, config.prompts_per_chunk, folder, samples, prompts)
    rows, toss_ties = [], needs_distribution(args)
    for i, (sample, prompt, verdict) in enumerate(zip(samples, prompts, judged, strict=True)):
        seed = f"{args.seed}/{number}/{i}/pairs"
        pairs = select_pairs(verdict, config.selection(args), config, judge.gives_rewards, seed, toss_ties)
        rows += [row for pair in pairs for row in _rows_of_pair(config, args, prompt, sample, pair)]
    if not rows:
        raise UserError(
            f"Round {number + 1}: the judge tells no two completions of a prompt apart, so there is nothing to train "
            "on. Look at judged.jsonl; raise `samples_per_prompt`, or lower `threshold_eta`."
        )
    write_rows(folder / "train.jsonl", rows)


def _judged(
    judge: Judge, chunk_size: int, folder: Path, samples: list[Row], prompts: Sequence[Prompt]
) -> list[Judged]:
    """What the judge says of each prompt's completions, asked once and then read from `judged.jsonl`."""
    path = folder / "judged.jsonl"
    if not path.exists():
        groups, rows = [row["completions"] for row in samples], [prompt.row for prompt in prompts]
        judged = []
        try:
            for start in range(0, len(groups), chunk_size):
                chunk = slice(start, start + chunk_size)
                judged += judge_prompts(judge, rows[chunk], groups[chunk])
        except MissingLabels:
            _ask_for_labels(judge, folder, rows, groups)
        write_rows(path, map(asdict, judged))
    return [Judged(**row) for row in read_rows(path)]


def _ask_for_labels(judge: Judge, folder: Path, rows: list[Row], groups: list[list[str]]) -> None:
    missing = []
    for row, group in zip(rows, groups, strict=True):
        try:
            judge_prompts(judge, [row], [group])
        except MissingLabels as error:
            missing += error.rows
    write_rows(folder / "to_label.jsonl", missing)
    raise UserError(
        f"`labelled_file` has no label for {len(missing)} of the completions of this round. They are in "
        f"{folder / 'to_label.jsonl'}: label them, add them to the file, and start the same command again."
    )


def _rows_of_pair(config: IterateConfig, args: Any, prompt: Prompt, sample: Row, pair: tuple[int, int]) -> list[Row]:
    """The rows of a (better, worse) pair, with their reference columns."""
    references = [_reference(config, args, sample["policy_logps"][k], sample["base_logps"][k]) for k in pair]
    ids = [sample["completion_ids"][k] for k in pair]
    if config.method == "kto":
        return [
            {"prompt_ids": prompt.ids, "completion_ids": ids[k], "label": k == 0, "ref_logps": references[k]}
            for k in range(2)
        ]
    return [
        {
            "prompt_ids": prompt.ids,
            "chosen_ids": ids[0],
            "rejected_ids": ids[1],
            "ref_chosen_logps": references[0],
            "ref_rejected_logps": references[1],
        }
    ]


def _reference(config: IterateConfig, args: Any, policy_logp: float, base_logp: float) -> float:
    if needs_distribution(args):
        return linear(policy_logp, base_logp, config.sampling_mix)
    return geometric(policy_logp, base_logp, config.a)
