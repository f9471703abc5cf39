"""The samples of an optimiser step dealt over its micro-batches and ranks, so that all have about as many tokens.

Peak memory and the slowest rank follow the largest micro-batch. The step has the same samples, and its micro-batches
the same size, so the gradient of a loss that is a mean over samples is the same.
"""

import heapq
from collections.abc import Iterator, Sequence

import torch


def deal(lengths: Sequence[int], batch_size: int) -> list[int]:
    """
    An order of samples in which each `batch_size` that follow one another have about the same length in total: the
    longest first, each to the batch that is lightest so far and has room.

    Args:
        lengths: of the samples of one step; a multiple of `batch_size`.
    """
    batches: list[list[int]] = [[] for _ in range(len(lengths) // batch_size)]
    lightest = [(0, number) for number in range(len(batches))]
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        total, number = heapq.heappop(lightest)
        batches[number].append(sample)
        if len(batches[number]) < batch_size:
            heapq.heappush(lightest, (total + lengths[sample], number))
    return [sample for batch in batches for sample in batch]


class DealtSampler(torch.utils.data.Sampler):
    """
    The order of another sampler, dealt step by step. Of an incomplete last step the order is left alone.

    Args:
        sampler: yields indices.
        lengths: of all samples, in tokens.
        batch_size: samples of a micro-batch on one rank.
        batches: micro-batches of an optimiser step, over all ranks.
    """

    def __init__(self, sampler: torch.utils.data.Sampler, lengths: Sequence[int], batch_size: int, batches: int):
        self.sampler, self.lengths = sampler, lengths
        self.batch_size, self.step_size = batch_size, batch_size * batches

    def __iter__(self) -> Iterator[int]:
        step: list[int] = []
        for index in self.sampler:
            step.append(index)
            if len(step) == self.step_size:
                yield from (step[i] for i in deal([self.lengths[index] for index in step], self.batch_size))
                step = []
        yield from step

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # those of map-style data sets have a length

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def forwarded_tokens(
    prompt: int, completions: Sequence[int], max_length: int | None, share: bool, keep_end: bool = False
) -> int:
    """
    Tokens of a sample in a packed row, after truncation.

    Args:
        prompt, completions: their lengths in tokens; two completions for a pair.
        share: whether a pair's prompt is forwarded once: all of it but the last token.
        keep_end: whether truncation takes from the prompt, so that rows of unequal length no longer begin alike.
    """
    rows = [prompt + completion for completion in completions]
    kept = [row if max_length is None else min(row, max_length) for row in rows]
    shared = share and len(rows) == 2 and (kept == rows or not keep_end)
    return sum(kept) - (max(prompt, 1) - 1 if shared else 0)
