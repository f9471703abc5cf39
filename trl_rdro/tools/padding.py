"""How much of a run's computing goes into padding and into prompts for the second time, in lines of text."""

from collections.abc import Iterator
from typing import Any

from ..packing.savings import savings
from .inspection import NAMES, Inspection


def padding_lines(inspection: Inspection, args: Any) -> Iterator[str]:
    """
    What is padding and repeated prompt at the run's batch size, and what packed rows save of it.

    Args:
        args: the training arguments, of which the batch size, the losses and the options of packing are read.
    """
    paired, batch = inspection.method == "dpo", args.per_device_train_batch_size
    completions = zip(*(inspection.lengths[name] for name in NAMES[inspection.method]), strict=True)
    lengths = list(zip(inspection.lengths["prompt"], completions, strict=True))
    keep_end = inspection.truncation_mode == "keep_end"
    saved = savings(lengths, batch, inspection.max_length, keep_end)
    unit = "pairs" if paired else "completions"
    repeated = f", {saved.repeated:.0%} of tokens are a prompt for the second time" if paired else ""
    yield f"Batches of {batch} {unit} in random order: {saved.padding:.0%} of positions are padding{repeated}"
    shares = paired and args.share_prompt and "wdpo" not in args.loss_type
    fewer = saved.shared if shares else saved.packed
    how = " with shared prompts" if shares else ""
    verb = "forwards" if args.padding_free else "would forward"
    largest = saved.largest_shared if shares else saved.largest_packed
    yield f"padding_free {verb} {fewer:.2f} times fewer{how}: the speed-up to expect where linear layers take the time"
    yield (
        f"The largest of these batches: {saved.largest_padded} positions, or {largest} tokens in a packed row (for "
        "`trl-rdro estimate --packed_tokens`)"
    )
