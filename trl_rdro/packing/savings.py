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
    """

    padding: float
    repeated: float
    packed: float
    shared: float


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
    positions = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [prompt + completion for prompt, completions in batch for completion in completions]
        positions += len(rows) * min(max(rows), max_length or max(rows))
    packed, shared = (
        sum(forwarded_tokens(prompt, completions, max_length, share, keep_end) for prompt, completions in lengths)
        for share in (False, True)
    )
    return Savings(1 - packed / positions, 1 - shared / packed, positions / packed, positions / shared)
