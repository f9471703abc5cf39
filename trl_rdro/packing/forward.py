"""A stand-in for the model that forwards a padded batch as one packed row."""

from typing import Any

import torch
from torch.nn import functional as F

from ..compat.trl import compact_head
from .attention import LAYOUT, packed_forward
from .layout import Layout, make_layout


# The fields of TRL's output with one value for each token
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


class Layouts:
    """The layout of the batch in hand, which the forwards of policy and reference share."""

    def __init__(self, share: bool):
        self.share = share
        self._batch: torch.Tensor | None = None
        self._layout: Layout | None = None

    def of(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Layout:
        if self._layout is None or self._batch is not input_ids:
            self._layout = make_layout(input_ids, attention_mask, labels, self.share)
            self._batch = input_ids
        return self._layout


class PackedModel:
    """
    Is called as TRL calls its models, with a padded batch, and answers in the padded batch's shape; the model in it
    forwards one row without padding. So losses and metrics need not know.

    Calls without TRL's fused LM head, for logits or generation, and batches that were packed by others, which have no
    attention mask, reach the model as they are.
    """

    def __init__(self, model: Any, layouts: Layouts):
        self._model, self._layouts = model, layouts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids=None, attention_mask=None, labels=None, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return self._model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is None:
            return self._model(input_ids=input_ids, labels=labels, fused_lm_head=True, **kwargs)
        layout = self._layouts.of(input_ids, attention_mask, labels)
        next_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        # No attention mask: with one, transformers would take the row for a single sequence
        with packed_forward(layout), compact_head():
            outputs = self._model(
                input_ids=layout.pack(input_ids),
                position_ids=layout.position_ids,
                shift_labels=layout.pack(next_labels),
                fused_lm_head=True,
                **{LAYOUT: layout},
                **kwargs,
            )
        for name in PER_TOKEN:
            if getattr(outputs, name) is not None:
                setattr(outputs, name, layout.pad(getattr(outputs, name))[:, :-1])
        return outputs
