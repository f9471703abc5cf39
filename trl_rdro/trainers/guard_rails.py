"""Warnings that a run is not doing what it was started for. Each is one sentence, given once."""

import math
from collections import deque
from typing import Any

from ..log import get_logger
from ..losses.types import LOSS_TYPES, of_family
from .normalisation import ERROR, NAME, RECENT


logger = get_logger(__name__)

STEPS_TO_MOVE = 20
MOVED = 1e-6  # nats of mean log-ratio
FEW_PAIRS = 0.1  # of the step's, and
FEWEST_PAIRS = 2  # that carry its gradient
NEARLY_ALL = 0.99  # of the step's pairs, for
STEPS_LIKE_DPO = 50
MANY_CAPPED = 0.2  # of a class
COMPLETIONS = 50  # of a class, over which the capped share is taken
CAPPED_ADVICE = {
    "rejected": "Lower the learning rate, use `rdro`, or lower `ddro_cap`, which bounds the gradient there.",
    "chosen": "No completion can be that much likelier under p+ than under the mixture that the reference should be, "
    "so the reference is not the mixture of the training completions: `rdro` stands that better, and fitting "
    "the reference to both classes first mends it.",
}
NORMALISED = (0.7, 1.5)  # where the mean of policy / reference still speaks for the mixture
REFERENCE_ADVICE = (
    "Fit the reference to both classes before (`trl-rdro inspect --reference` says how far it is), draw the "
    "completions from it (`trl-rdro iterate`), or use a loss without the assumption (`sigmoid` for pairs, `kto` for "
    "labels). Labels whose share differs between prompts need the column `preferred_fraction`. If only training "
    "completions are off and held-out ones are not, they have been learnt by heart."
)
LARGE_GAP = 0.03
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
        self.steps_like_dpo: dict[str, int] = {}  # the first of them, by loss
        self.capped: dict[str, deque] = {}
        self.seen = 0

    def watch(self, step: int, metrics: dict[str, float], pairs: int, completions: int) -> None:
        """Take in the metrics of one micro-batch of optimiser step `step`, the same on every rank.

        Args:
            pairs: of the whole step, over ranks and micro-batches.
            completions: of each class in this micro-batch, over ranks.
        """
        self._watch_start(step, metrics)
        self._watch_weights(step, metrics, pairs)
        self._watch_caps(step, metrics, completions)
        self._watch_gap(step, metrics)
        self.seen += 2 * completions
        if RECENT in metrics:
            self.watch_reference({**metrics, NAME: metrics[RECENT]}, self.seen, f"At step {step}")

    def watch_reference(self, metrics: dict[str, float], completions: float, when: str) -> None:
        """Take in the mean of policy / reference over so many completions: 1, if the reference is their mixture."""
        value, error = metrics.get(NAME), metrics.get(ERROR, 0.0)
        if value is None or completions < COMPLETIONS:
            return
        low, high = (math.log(bound) for bound in NORMALISED)
        if low <= value + 2 * error and value - 2 * error <= high:
            return
        self.warn_once(
            "reference",
            f"{when} the mean of policy / reference over the completions is {math.exp(min(value, 700)):.3g} "
            f"(`{NAME}` {value:.2f} ± {error:.2f}). If the reference were the mixture of the preferred and the other "
            "completions, for every prompt, as `ddro` and `rdro` assume, it would be 1 for every policy: this run "
            f"does not go to p+. {REFERENCE_ADVICE}",
        )

    def _watch_weights(self, step: int, metrics: dict[str, float], pairs: int) -> None:
        for name, loss in LOSS_TYPES.items():
            share = metrics.get(f"{name}/effective_sample_size")
            if share is None or loss.temperature is None:
                continue
            if pairs == 1:
                self.warn_once(
                    f"{name} one pair",
                    f"`{name}` weighs the pairs of an optimiser step, and this one has a single pair: it is its inner "
                    "loss alone. Raise `per_device_train_batch_size` or `gradient_accumulation_steps`.",
                )
                continue
            wanted = getattr(self.args, f"{name}_target_ess", None)
            option = loss.temperature if wanted is None else f"{name}_target_ess"
            value = getattr(self.args, option)
            if share * pairs < max(FEWEST_PAIRS, FEW_PAIRS * pairs):
                self.warn_once(
                    f"{name} weights",
                    f"`{name}` at step {step}: the effective sample size is {share * pairs:.1f} of the step's {pairs} "
                    f"pairs ({share:.1%}), so a few pairs carry the whole gradient. Raise `{option}` (now {value}) or "
                    "the batch size.",
                )
            if share < NEARLY_ALL or wanted is not None:
                self.steps_like_dpo.pop(name, None)
            elif step - self.steps_like_dpo.setdefault(name, step) >= STEPS_LIKE_DPO:
                spread = value * math.sqrt(-math.log(min(share, 1 - 1e-12)))
                self.warn_once(
                    f"{name} like dpo",
                    f"`{name}` at step {step}: the effective sample size has been above {NEARLY_ALL:.0%} for "
                    f"{STEPS_LIKE_DPO} steps, so that every pair counts the same, as in DPO. The losses of a step "
                    f"spread by about {spread:.1g}: `{option}` (now {value}) has to be of that size, say "
                    f"{spread / math.sqrt(-math.log(0.8)):.1g} for 80 %.",
                )

    def _watch_caps(self, step: int, metrics: dict[str, float], completions: int) -> None:
        for name in of_family("density_ratio"):
            for side, advice in CAPPED_ADVICE.items():
                key = f"{name}/capped_{side}"
                if key in metrics:
                    self.capped.setdefault(key, deque()).append((metrics[key] * completions, completions))
                    share = self._recent_share(self.capped[key])
                    if share is not None and share > MANY_CAPPED:
                        self.warn_once(
                            key,
                            f"`{name}` at step {step}: {share:.0%} of the last {side} completions lie beyond the cap, "
                            f"where the loss goes on linearly. {advice}",
                        )

    def _recent_share(self, seen: deque) -> float | None:
        """Of the last `COMPLETIONS` or more, or None for fewer."""
        while sum(count for _, count in seen) - seen[0][1] >= COMPLETIONS:
            seen.popleft()
        total = sum(count for _, count in seen)
        return sum(capped for capped, _ in seen) / total if total >= COMPLETIONS else None

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
                "parameters or adapter, a reference that follows the policy at every step (`sync_ref_model` with "
                "`ref_model_sync_steps: 1`), and precomputed reference log-probabilities that belong to another "
                "model.",
            )

    def _watch_gap(self, step: int, metrics: dict[str, float]) -> None:
        if "wdpo/gap" not in metrics:
            return
        self.large_gaps = self.large_gaps + 1 if metrics["wdpo/gap"] > LARGE_GAP else 0
        if self.large_gaps >= STEPS_WITH_LARGE_GAP:
            one_sided = self.args.wdpo_difference == "one_sided"
            error = "that is the error of the penalty's gradient"
            if not one_sided:
                error += ", and the base loss's, read from the same two points, is off by three times as much"
            self.warn_once(
                "wdpo",
                f"`wdpo` at step {step}: the {'one-sided' if one_sided else 'central'} difference has been off by "
                f"more than {LARGE_GAP:.0%} for {self.large_gaps} micro-batches (now {metrics['wdpo/gap']:.1%} with a "
                f"relative step of {metrics['wdpo/eps']:.1e}): {error}. Too large a step for a sharp loss (a large "
                "`beta`, a trained model) does it, too small a one in half precision, and a forward that is not the "
                "same twice. Compute in float32 or in bfloat16 with float32 weights, or set `wdpo_eps` by hand"
                + (", or set `wdpo_difference='central'`." if one_sided else "."),
            )

    def warn_once(self, key: str, sentence: str) -> None:
        """Log the sentence unless one with this key was logged before."""
        if key not in self.given:
            self.given.add(key)
            logger.warning(sentence)
