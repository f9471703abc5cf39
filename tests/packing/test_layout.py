"""Which tokens of a batch are forwarded, and what they attend to."""

import pytest
import torch

from trl_rdro.packing.layout import make_layout

from .batches import PAIRS, padded


def segments(layout, input_ids):
    """Each row of the layout as (tokens of its queries, tokens of its keys)."""
    row = layout.pack(input_ids)[0]
    keys = row if layout.key_index is None else row[layout.key_index]
    queries = [part.tolist() for part in row.split(layout.query_lengths)]
    return list(zip(queries, [part.tolist() for part in keys.split(layout.key_lengths)], strict=True))


def test_worked_example():
    batch = padded([([10, 11, 12], [20, 21], [30])])
    unshared = make_layout(**batch)
    assert segments(unshared, batch["input_ids"]) == [([10, 11, 12, 20, 21],) * 2, ([10, 11, 12, 30],) * 2]
    assert unshared.key_index is None
    shared = make_layout(**batch, share=True)
    assert segments(shared, batch["input_ids"]) == [
        ([10, 11, 12, 20, 21], [10, 11, 12, 20, 21]),
        ([12, 30], [10, 11, 12, 30]),  # the last prompt token again, and its predecessors as keys only
    ]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert shared.cu_queries.tolist() == [0, 5, 7] and shared.cu_keys.tolist() == [0, 5, 9]
    assert shared.cu_queries.dtype == torch.int32 and shared.shared_pairs == 1


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_every_label_is_in_the_row_once(share, left):
    """What is scored in the padded batch is scored in the row, and nothing else."""
    batch = padded(PAIRS, width=40, left=left)
    layout = make_layout(**batch, share=share)
    scored = batch["labels"][:, 1:] != -100
    next_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert (layout.pack(next_labels) != -100).sum() == scored.sum()
    assert layout.pad(layout.pack(next_labels) != -100)[:, :-1].equal(scored)
    assert len(set(zip(layout.rows.tolist(), layout.columns.tolist(), strict=True))) == len(layout.rows)


@pytest.mark.parametrize("left", [False, True])
def test_keys_are_the_rows(left):
    """Shared or not, every row attends to all of its own tokens."""
    batch = padded(PAIRS, left=left)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for share in (False, True):
        assert [keys for _, keys in segments(make_layout(**batch, share=share), batch["input_ids"])] == rows


def test_shares_only_what_is_the_same():
    other_prompt = padded(PAIRS)
    other_prompt["input_ids"][4, 2] += 1  # the rejected row of the first pair
    layout = make_layout(**other_prompt, share=True)
    # A prompt of one token has nothing before its last
    assert layout.shared_pairs == 2
    assert layout.query_lengths == [14, 15, 21, 5, 17, 3, 8, 5]

    scored_prompt = padded(PAIRS)
    scored_prompt["labels"][4, 4] = scored_prompt["input_ids"][4, 4]  # a label in the midst of the prompt
    layout = make_layout(**scored_prompt, share=True)
    assert layout.query_lengths[4] == 17 - 3  # shared up to the token that predicts it

    shifted = padded(PAIRS[:1], left=True)  # the rows' prompts are in other columns
    assert make_layout(**shifted, share=True).shared_pairs == 0


def test_prompts_that_were_cut_off():
    """`keep_end` can leave completions only, or prompts that differ."""
    batch = padded([([], [5, 6, 7], [8, 9])])
    layout = make_layout(**batch, share=True)
    assert layout.shared_pairs == 0 and layout.query_lengths == [3, 2]


def test_pad_is_the_inverse_of_pack():
    batch = padded(PAIRS)
    values = torch.randn(*batch["input_ids"].shape, 3) * batch["attention_mask"].unsqueeze(-1)
    layout = make_layout(**batch)
    assert layout.pad(layout.pack(values)).equal(values)
    assert layout.pack(values).shape == (1, int(batch["attention_mask"].sum()), 3)
