"""Which tokens of a padded batch are forwarded, in which order, and what each of them attends to.

A pair with prompt P = P' p and completions C and R becomes, in one row without padding,

    not shared:  [P C] [P R]        each attends to itself
    shared:      [P' p C] [p R]     the second attends to P' of the first, then to itself

The last prompt token p is repeated because C[0] and R[0] are both predicted from it: every token of the row has one
label. Attention is causal with its end aligned ("bottom-right"): the last query sees all keys of its segment.
"""

import torch


class Layout:
    """
    The packed row of one micro-batch, made once and used by every layer.

    Not a dataclass: the wrappers of distributed training take those apart and put others together.

    Attributes:
        rows, columns: `(T,)`, where in the padded batch each token of the row comes from.
        query_lengths, key_lengths: of each segment, on the host.
        key_index: `(T_k,)`, which tokens of the row are the keys, segment by segment; `None`: each segment's own.
        cu_queries, cu_keys: `(segments + 1,)` int32, where the segments begin, for kernels.
        shared_pairs: of how many pairs the prompt is forwarded once.
    """

    def __init__(self, present: torch.Tensor, prefixes: torch.Tensor, device: torch.device):
        """
        Args:
            present: `(rows, width)` bool on the CPU, False at padding.
            prefixes: `(rows / 2,)`, how many prompt tokens each pair's second row takes from its first; or `(0,)`.
        """
        self.shape = present.shape
        borrowed = torch.cat([torch.zeros(len(present) - len(prefixes), dtype=torch.long), prefixes])
        forwarded = present & (present.cumsum(dim=1) > borrowed.unsqueeze(1))
        queries, keys = forwarded.sum(dim=1), present.sum(dim=1)
        ends = queries.cumsum(dim=0)
        starts = (ends - queries).tolist()
        self.query_lengths, self.key_lengths = queries.tolist(), keys.tolist()
        self.shared_pairs = int((prefixes > 0).sum())

        index = []
        for row, (start, prefix, length) in enumerate(zip(starts, borrowed.tolist(), self.query_lengths, strict=True)):
            if prefix:
                lender = starts[row - len(prefixes)]
                index.append(torch.arange(lender, lender + prefix))
            index.append(torch.arange(start, start + length))
        parts = [*forwarded.nonzero(as_tuple=True), torch.cat([ends.new_zeros(1), ends])]
        parts += [torch.cat([ends.new_zeros(1), keys.cumsum(dim=0)]), torch.cat(index)]
        on_device = torch.cat(parts).to(device, non_blocking=True)  # in one copy
        self.rows, self.columns, *cumulated, index = on_device.split([len(part) for part in parts])
        self.cu_queries, self.cu_keys = (part.int() for part in cumulated)
        self.key_index = index if self.shared_pairs else None

    @property
    def position_ids(self) -> torch.Tensor:
        """`(1, T)`: the columns, which is what a model takes for positions in the padded batch."""
        return self.columns.unsqueeze(0)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`(rows, width, ...)` -> `(1, T, ...)`."""
        return padded[self.rows, self.columns].unsqueeze(0)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """`(1, T, ...)` -> `(rows, width, ...)`, with zeros where nothing was forwarded."""
        zeros = packed.new_zeros(*self.shape, *packed.shape[2:])
        return zeros.index_put((self.rows, self.columns), packed[0])


def make_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, share: bool = False
) -> Layout:
    """
    The layout of a padded batch, with one synchronisation of the device.

    Args:
        input_ids, attention_mask: `(rows, width)`.
        labels: `(rows, width)`, -100 at tokens that are not scored.
        share: whether the rows are pairs [chosen, rejected], whose prompt is to be forwarded once. It is where both
            rows agree in all tokens before the first label of either; other pairs are packed like single rows.
    """
    present, count = attention_mask.bool(), len(input_ids) // 2
    if not share:
        return Layout(present.cpu(), torch.zeros(0, dtype=torch.long), input_ids.device)
    agree = (input_ids[:count] == input_ids[count:]) & (present[:count] == present[count:])
    present, labelled, agree = torch.cat([present, labels != -100, agree]).cpu().split([2 * count, 2 * count, count])
    before = ~(labelled[:count] | labelled[count:]).cumsum(dim=1).bool()  # the first label of either row
    prompts = (present[:count] & before).sum(dim=1)
    prefixes = (prompts - 1).clamp(min=0) * (agree | ~before).all(dim=1)
    return Layout(present, prefixes, input_ids.device)
