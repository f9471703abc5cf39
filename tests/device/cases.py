"""What is run on the fake device: every loss, and every part of the trainers that makes tensors of its own."""

from dataclasses import dataclass, field
from typing import Any

import trl

from trl_rdro import DPOTrainer, KTOTrainer
from trl_rdro.losses.types import LOSS_TYPES

from ..loss_cases import LOSS_CASES
from ..tiny import tiny_preferences
from ..training import labelled


@dataclass(frozen=True)
class Case:
    """
    Parameters:
        settings: fields of the config.
        trainer: its class.
        evaluates: whether it is `evaluate()` that is run, and not `train()`.
        lora: whether an adapter is trained.
        weighted: whether the rows carry weights.
        model: fields of the model's config.
        as_on_cpu: whether its numbers are those of the CPU: not with noise, and not where it is rounded elsewhere.
        waits: how often, for each micro-batch, the host may wait for the device or copy to it in our functions,
            beside looking at the metrics and, once in a step, at the gradient norm.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    trainer: type = DPOTrainer
    evaluates: bool = False
    lora: bool = False
    weighted: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    as_on_cpu: bool = True
    waits: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> Any:
        rows = tiny_preferences(32) if issubclass(self.trainer, trl.DPOTrainer) else labelled(20, 12)
        return rows.add_column("weight", [(1.0, 0.5, 2.0)[i % 3] for i in range(32)]) if self.weighted else rows

    @property
    def micro_batches(self) -> int:
        """Of each step."""
        return self.settings.get("gradient_accumulation_steps", 1)


# What a loss learns is kept on the host, by label: the labels are read for each micro-batch, and the numbers sent
STATEFUL = {"LossState.numbers": 2}
CLASSES = {"KTOTrainer._class_metrics": 1}
WEIGHED = {"StepWeights.take": 1}  # by a factor that every rank shares
LAYOUT = {"make_layout": 1}
LAYOUTS = {"make_layout": 2}  # and of the batch that wdpo doubles
TWO = {"gradient_accumulation_steps": 2}
PACKED = {"padding_free": True, "model_init_kwargs": {"attn_implementation": "sdpa", "dtype": "float32"}}

CASES = {
    **{
        name: Case({"loss_type": name, **case.settings}, waits=STATEFUL if LOSS_TYPES[name].state else {})
        for name, case in LOSS_CASES.items()
    },
    "kldpo accumulated": Case({"loss_type": "kldpo", "ld_alpha": 0.5, **TWO}, waits=WEIGHED),
    "kldpo repo accumulated": Case(
        {"loss_type": "kldpo", "inner_loss_type": "repo", **TWO}, waits={**STATEFUL, **WEIGHED}
    ),
    "wdpo rms ipo": Case({"loss_type": "wdpo", "wdpo_penalty": "rms", "inner_loss_type": "ipo"}),
    "wdpo lora checkpointing": Case({"loss_type": "wdpo", "activation_checkpointing": True}, lora=True),
    "wdpo bf16": Case({"loss_type": "wdpo", "bf16": True}, as_on_cpu=False),
    "wdpo dropout": Case({"loss_type": "wdpo", "wdpo_rho": 1.0}, model={"attention_dropout": 0.2}, as_on_cpu=False),
    # Weighed by a forward beforehand, with the same noise
    "kldpo dropout": Case(
        {"loss_type": ["kldpo", "rdro"], "loss_weights": [1.0, 1.0], **TWO},
        model={"attention_dropout": 0.2},
        as_on_cpu=False,
    ),
    "mixed": Case({"loss_type": ["rdro", "kldpo", "wdpo", "sigmoid"], "loss_weights": [1.0] * 4}),
    "weights": Case({"loss_type": ["rdro", "wdpo", "sigmoid", "sft"], "loss_weights": [1.0] * 4}, weighted=True),
    "precomputed": Case({"loss_type": "rdro", "precompute_ref_log_probs": True}),
    "sigmoid": Case({"loss_type": "sigmoid"}),
    "kto rdro": Case({"loss_type": "rdro"}, KTOTrainer, waits=CLASSES),
    "kto ddro accumulated": Case({"loss_type": "ddro", **TWO}, KTOTrainer, waits=CLASSES),
    "kto weights": Case({"loss_type": "rdro"}, KTOTrainer, weighted=True, waits=CLASSES),
    "kto precomputed": Case({"loss_type": "rdro", "precompute_ref_log_probs": True}, KTOTrainer, waits=CLASSES),
    "kto": Case({"loss_type": "kto"}, KTOTrainer),
    "kto apo": Case({"loss_type": "apo_zero_unpaired"}, KTOTrainer),
    "evaluation of wdpo": Case({"loss_type": "wdpo"}, evaluates=True),
    "evaluation of kldpo": Case({"loss_type": "kldpo"}, evaluates=True),
    "evaluation of kto ddro": Case({"loss_type": "ddro"}, KTOTrainer, evaluates=True, waits=CLASSES),
    "packed and shared": Case({"loss_type": "rdro", **PACKED}, waits=LAYOUT),
    "packed and not shared": Case(
        {"loss_type": "kldpo", "share_prompt": False, **PACKED, **TWO}, waits={**WEIGHED, **LAYOUT}
    ),
    "packed wdpo": Case({"loss_type": "wdpo", **PACKED}, waits=LAYOUTS),
    "packed sigmoid": Case({"loss_type": "sigmoid", **PACKED}, waits=LAYOUT),
    "packed kto rdro": Case({"loss_type": "rdro", **PACKED}, KTOTrainer, waits={**CLASSES, **LAYOUT}),
}
