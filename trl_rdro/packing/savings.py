"""What packed rows and shared prompts would save on given data, by counting tokens."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from .dealing import forwarded_tokens


class Savings(NamedTuple):
    """
    Parameters:
        padding: share of a padded batch's positions that hold no token.
        repeated: share of its tokens that are a pair's prompt for the second time; 0 where completions are not paired.
        packed: padded positions per token forwarded in packed rows.
        shared: the same with shared prompts.
        largest_padded, largest_packed, largest_shared: positions or tokens of the largest batch, which peak memory
            follows.
    """

    padding: float
    repeated: float
    packed: float
    shared: float
    largest_padded: int
    largest_packed: int
    largest_shared: int


def savings(
    lengths: Sequence[tuple[int, Sequence[int]]], batch_size: int, max_length: int | None, keep_end: bool = False
) -> Savings:
    """
    The tokens of an epoch in random order. Their ratios are the speed-up to expect where the linear layers take the
    time: attention over padded positions, which costs more, and the reference, which gains alike, are left out.

    Args:
        lengths: of each sample, the prompt and its completions (two for a pair), in tokens.
        batch_size: samples of a micro-batch.
        keep_end: whether truncation takes from the prompt.
    """
    order = random.Random(0).sample(lengths, len(lengths))
    padded, packed, shared = list[int](), list[int](), list[int]()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [prompt + completion for prompt, completions in batch for completion in completions]
        padded.append(len(rows) * min(max(rows), max_length or max(rows)))
        for share, tokens in ((False, packed), (True, shared)):
            tokens.append(sum(forwarded_tokens(*sample, max_length, share, keep_end) for sample in batch))
    return Savings(
        1 - sum(packed) / sum(padded),
        1 - sum(shared) / sum(packed),
        sum(padded) / sum(packed),
        sum(padded) / sum(shared),
        max(padded),
        max(packed),
        max(shared),
    )
