"""What keeps a run from going wrong in silence: finite losses, guard rails, whole checkpoints, a known reference."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME

from ..compat import engines
from ..compat import trl as trl_compat
from ..log import get_logger
from .guard_rails import GuardRails
from .hosts import Host


logger = get_logger(__name__)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end. Its `trainer_state.json` comes last."""
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint below `output_dir` that was written to its end, if there is one."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if is_complete(checkpoint):
            return str(checkpoint)
        logger.warning(f"{checkpoint} was not written to its end and is passed over.")
    return None


class Safeguards(Host):
    """Mixin of the trainers, before TRL's class."""

    def _set_up_safeguards(self, given_reference: bool) -> None:
        self._guard_rails = GuardRails(self.args)
        logger.info(f"Reference model: {self._describe_reference(given_reference)}.")

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self._ours:
            engines.full_precision_outputs(self.accelerator)

    # Metrics

    def _record(
        self, losses: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor], logratios: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """Log metrics as their means over the ranks, and look at them.

        Args:
            losses: the scalar of each of our losses, to be checked only: TRL logs their sum.
            metrics: scalars to log.
            logratios: the samples' log-ratios by class, for the message.

        Returns:
            The metrics' means.

        Raises:
            `FloatingPointError`: in training, on every rank at once, if a loss or a metric is not finite.
        """
        prefix = "loss of "
        means = trl_compat.mean_over_ranks(self, {**{prefix + name: loss for name, loss in losses.items()}, **metrics})
        bad = [name.removeprefix(prefix) for name, value in means.items() if not math.isfinite(value)]
        step = self.state.global_step + 1
        if bad:
            samples = "; ".join(f"{label} {values.tolist()}" for label, values in logratios.items())
            sentence = (
                f"`{'`, `'.join(losses)}` at step {step}: {', '.join(bad)} not finite. Log-ratios of this process's "
                f"samples: {samples}. Look at these samples and at the precision: float16 overflows where bfloat16 "
                "does not."
            )
            if self.model.training:
                raise FloatingPointError(sentence)
            self._guard_rails.warn_once("not finite", sentence)
        means = {name: value for name, value in means.items() if not name.startswith(prefix)}
        trl_compat.log_metrics(self, means)
        if self.model.training:
            self._guard_rails.watch(step, means)
        return means

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As TRL's. `resume_from_checkpoint=True` takes the last checkpoint that was written to its end, and starts
        from the beginning where there is none, so that a run can be started again by the same command."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            logger.info(
                f"Resuming from {resume_from_checkpoint}."
                if resume_from_checkpoint
                else f"No complete checkpoint in {self.args.output_dir}: starting from the beginning."
            )
        elif resume_from_checkpoint and not is_complete(Path(resume_from_checkpoint)):
            raise ValueError(
                f"`resume_from_checkpoint={str(resume_from_checkpoint)!r}` is not a checkpoint that was written to "
                "its end. Give another, or True for the last complete one."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        # One that is written over is incomplete from now on
        checkpoint = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        # What follows is `trainer_state.json`, the mark of a complete checkpoint: not before all ranks have written
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    # Reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self._brings_reference(dataset):
            logger.info(f"Reference log-probabilities of the {name} data set: taken from its columns.")
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _brings_reference(self, dataset: Any) -> bool:
        return set(self._reference_columns) <= set(dataset.column_names or ())

    def _describe_reference(self, given: bool) -> str:
        if self.precompute_ref_logps:
            return "log-probabilities computed before training or brought by the data set"
        if self._brings_reference(self.train_dataset):
            logger.warning(
                f"The columns {' and '.join(self._reference_columns)} of the training set are not used. Set "
                "`precompute_ref_log_probs=True` to take the reference log-probabilities from them."
            )
        if given:
            return "the given `ref_model`"
        if not is_peft_model(self.model):
            return f"a copy of {trl_compat.model_name(self.model)} as it is before training"
        if "ref" in self.model.peft_config:
            return "a frozen copy of the given adapter"
        return "the base model, with the adapter switched off"
