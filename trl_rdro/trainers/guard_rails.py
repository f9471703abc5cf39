"""Warnings that a run is not doing what it was started for. Each is one sentence, given once."""

from typing import Any

from ..log import get_logger
from ..losses.types import LOSS_TYPES, of_family


logger = get_logger(__name__)

STEPS_TO_MOVE = 20
MOVED = 1e-6  # nats of mean log-ratio
FEW_PAIRS = 0.1  # of the batch
MANY_CAPPED = 0.2  # of a class
LARGE_GAP = 0.1
STEPS_WITH_LARGE_GAP = 5


class GuardRails:
    """Watches the metrics of the training steps.

    Args:
        args: the trainer's configuration, for the values it names in its advice.
    """

    def __init__(self, args: Any):
        self.args = args
        self.given: set[str] = set()
        self.first_step: int | None = None
        self.moved = False
        self.large_gaps = 0

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        """Take in the metrics of one micro-batch of optimiser step `step`, the same on every rank."""
        self._watch_start(step, metrics)
        self._watch_weights(step, metrics)
        self._watch_caps(step, metrics)
        self._watch_gap(step, metrics)

    def _watch_weights(self, step: int, metrics: dict[str, float]) -> None:
        for name, loss in LOSS_TYPES.items():
            share = metrics.get(f"{name}/effective_sample_size", 1.0)
            if loss.temperature and share < FEW_PAIRS:
                self.warn_once(
                    f"{name} weights",
                    f"`{name}` at step {step}: the effective sample size is {share:.1%} of the batch, so a few pairs "
                    f"carry the whole gradient. Raise `{loss.temperature}` (now "
                    f"{getattr(self.args, loss.temperature)}) or the batch size.",
                )

    def _watch_caps(self, step: int, metrics: dict[str, float]) -> None:
        for name in of_family("density_ratio"):
            for side in ("chosen", "rejected"):
                share = metrics.get(f"{name}/capped_{side}", 0.0)
                if share > MANY_CAPPED:
                    self.warn_once(
                        f"{name} {side}",
                        f"`{name}` at step {step}: {share:.0%} of the {side} completions lie beyond the cap, where "
                        "the loss goes on linearly. Lower the learning rate, use `rdro`, or raise "
                        f"`{name}_cap` (now {getattr(self.args, f'{name}_cap')}).",
                    )

    def _watch_start(self, step: int, metrics: dict[str, float]) -> None:
        if self.moved:
            return
        self.first_step = step if self.first_step is None else self.first_step
        logratios = [value for key, value in metrics.items() if key.startswith("logratios/")]
        self.moved = any(abs(value) > MOVED for value in logratios)
        if not self.moved and step - self.first_step >= STEPS_TO_MOVE:
            self.warn_once(
                "start",
                f"After {step - self.first_step} steps the policy still equals the reference model, and the loss its "
                "constant there. Look for a learning rate of 0 (or too small for the parameters' dtype), frozen "
                "parameters or adapter, and precomputed reference log-probabilities that belong to another model.",
            )

    def _watch_gap(self, step: int, metrics: dict[str, float]) -> None:
        if "wdpo/gap" not in metrics:
            return
        self.large_gaps = self.large_gaps + 1 if metrics["wdpo/gap"] > LARGE_GAP else 0
        if self.large_gaps >= STEPS_WITH_LARGE_GAP:
            self.warn_once(
                "wdpo",
                f"`wdpo` at step {step}: the central difference has been off by more than {LARGE_GAP:.0%} for "
                f"{self.large_gaps} micro-batches (now {metrics['wdpo/gap']:.1%} with a relative step of "
                f"{metrics['wdpo/eps']:.1e}), so the penalty's gradient is inexact. Compute in float32 or bfloat16 "
                "with float32 weights, or set `wdpo_eps` by hand.",
            )

    def warn_once(self, key: str, sentence: str) -> None:
        """Log the sentence unless one with this key was logged before."""
        if key not in self.given:
            self.given.add(key)
            logger.warning(sentence)
