"""Padded batches of made-up tokens, as TRL's collators make them, and naive attention to compare with."""

import torch


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Prompt, chosen, rejected: of unequal length, one prompt of a single token, one completion of a single token
PAIRS = [
    (tokens(9, 1), tokens(5, 2), tokens(8, 3)),
    (tokens(3, 4), tokens(12, 5), tokens(2, 6)),
    (tokens(20, 7), tokens(1, 8), tokens(7, 9)),
    (tokens(1, 10), tokens(4, 11), tokens(4, 12)),
]


def padded(pairs: list, width: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Rows [chosen, rejected] with padding on one side, at least `width` wide."""
    rows = [(prompt, pair[side]) for side in (1, 2) for pair in pairs for prompt in pair[:1]]
    width = max(width, *(len(prompt) + len(completion) for prompt, completion in rows))
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), width), -100)
    for i, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        start = width - length if left else 0
        batch["input_ids"][i, start : start + length] = torch.tensor(prompt + completion)
        batch["attention_mask"][i, start : start + length] = 1
        batch["labels"][i, start + len(prompt) : start + length] = torch.tensor(completion)
    return batch


def naive_attention(query, key, value, layout, scaling: float, window: int | None) -> torch.Tensor:
    """Attention over segments, one query after the other: `(1, heads, T, dim)` and keys gathered by segment to
    `(1, T, heads, dim)`."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, dim=1)[0], value.repeat_interleave(groups, dim=1)[0]
    out, start, key_start = [], 0, 0
    for queries, keys in zip(layout.query_lengths, layout.key_lengths, strict=True):
        for i in range(queries):
            last = keys - queries + i  # the end is aligned
            first = 0 if window is None else max(0, last - window + 1)
            seen = slice(key_start + first, key_start + last + 1)
            scores = (query[0, :, start + i : start + i + 1] * key[:, seen]).sum(-1) * scaling
            out.append((scores.softmax(-1).unsqueeze(-1) * value[:, seen]).sum(1))
        start, key_start = start + queries, key_start + keys
    return torch.stack(out).unsqueeze(0)
