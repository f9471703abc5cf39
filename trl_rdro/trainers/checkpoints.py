"""Checkpoints that are whole, hold finite parameters, say what they were begun with, and are never mixed."""

import copy
import inspect
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from ..compat import trl as trl_compat
from ..errors import NotFinite, UserError
from ..log import get_logger
from ..run.completeness import (
    STATE,
    checkpoints,
    fault,
    how_to_go_on,
    last_complete_checkpoint,
    step_of,
    sync,
    write_manifest,
)
from ..run.disk import DiskFull, full_disk_said
from ..run.files import write_json
from ..run.lock import only_run_in
from ..run.secrets import args_without_secrets
from ..run.settings import SETTINGS, differences, read_settings, refusal, settings_of
from .hosts import Host


logger = get_logger(__name__)


def non_finite_parameters(model: torch.nn.Module, trained_only: bool = True) -> list[str]:
    """The names of the parameters with an entry that is infinite or not a number, in this process's share of them. One
    synchronisation with the device."""
    names, flags = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            names.append(name)
            flags.append(trl_compat.local_part(parameter).detach().isfinite().all())
    if not flags:
        return []
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class NotFiniteCheckpoint(NotFinite):
    """The parameters of the checkpoint that was to be resumed from are not finite."""


class Checkpoints(Host):
    """Mixin of the trainers, before TRL's class."""

    _resumed_from: str | None = None  # the checkpoint that the parameters come from

    def __init__(self, *given, **kwargs):
        arguments = inspect.signature(super().__init__).bind(*given, **kwargs).arguments
        named = {"processing_class": None} if self._has_own_tokenizer else {}  # it is the model's, and counted with it
        self._begun_with = settings_of(**{**arguments, **named})
        if isinstance(arguments["args"].loss_type, str) and self._ours:
            # TRL's constructor is shown another one meanwhile
            self._begun_with["loss_type"] = self._ours[0]
        wanted = arguments["args"].resume_from_checkpoint
        if wanted and str(wanted).lower() not in ("none", "false"):
            # Before the model is loaded
            wanted = True if str(wanted).lower() == "true" else wanted
            self._check_settings(self._find(wanted, arguments["args"], warn=lambda sentence: None), arguments["args"])
        if kwargs.get("peft_config") is not None:
            # PEFT writes into it, so that the next trainer would be given another one
            kwargs["peft_config"] = copy.deepcopy(kwargs["peft_config"])
        super().__init__(*given, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As TRL's. `resume_from_checkpoint=True` takes the last complete checkpoint, and starts from the beginning
        where there is none, so that a run can be started again by the same command. One whose parameters are not
        finite is passed over.

        Raises:
            `UserError`: if another process trains into the output directory; if the checkpoint to resume from is not
                complete, or was begun with other settings, unless `args.resume_with_changes`.
            `FloatingPointError`: if the parameters of that checkpoint, or those to be saved, are not finite.
            `DiskFull`: if a checkpoint could not be written; the earlier ones are as they were.
        """
        with only_run_in(self.args.output_dir):
            self._resumed_from = None
            if resume_from_checkpoint:
                self._resumed_from = self._find(resume_from_checkpoint, self.args, warn=logger.warning)
                self._check_settings(self._resumed_from, self.args)
                logger.info(
                    f"Resuming from {self._resumed_from}."
                    if self._resumed_from
                    else f"No complete checkpoint in {self.args.output_dir}: starting from the beginning."
                )
            if self.is_world_process_zero():
                write_json(Path(self.args.output_dir) / SETTINGS, self._begun_with)
            while True:
                try:
                    return super().train(self._resumed_from, *args, **kwargs)
                except NotFiniteCheckpoint as error:
                    if not isinstance(resume_from_checkpoint, bool):
                        raise
                    self._pass_over(error)

    # Resuming

    def _pass_over(self, error: NotFiniteCheckpoint) -> None:
        """Resume from the next older checkpoint instead. With none the error stays: the model holds its parameters."""
        assert self._resumed_from is not None
        number = step_of(self._resumed_from)
        older = self._find(True, self.args, warn=lambda sentence: None, before=number)
        if older is None:
            raise error
        self._check_settings(older, self.args)
        logger.warning(f"{error} It is passed over: resuming from {older}.")
        self._resumed_from = older

    def _find(self, wanted: str | bool, args: Any, warn: Callable[[str], Any], before: float = math.inf) -> str | None:
        """The checkpoint that was asked for, or with True the newest of an earlier step than `before` that is complete
        for every process."""
        if not isinstance(wanted, bool):
            if found := fault(wanted):
                raise UserError(
                    f"`resume_from_checkpoint={str(wanted)!r}` is not a complete checkpoint: {found}. Give another, "
                    "or True for the last complete one."
                )
            return str(wanted)
        if args.world_size == 1:
            return last_complete_checkpoint(args.output_dir, warn, before)
        everywhere = gather_object([{str(path): fault(path) for path in checkpoints(args.output_dir)}])
        for checkpoint in everywhere[0]:
            if step_of(checkpoint) >= before:
                continue
            reasons = [each.get(checkpoint, "another process does not see it") for each in everywhere]
            if not any(reasons):
                return checkpoint
            warn(f"{checkpoint} is not complete and is passed over: {next(filter(None, reasons))}.")
        return None

    def _check_settings(self, checkpoint: str | None, args: Any) -> None:
        begun = read_settings(checkpoint) if checkpoint else None
        changed = differences(begun, self._begun_with) if begun else []
        if checkpoint is None or not changed:
            return
        if not getattr(args, "resume_with_changes", False):
            raise UserError(refusal(checkpoint, changed, "accept the change with `resume_with_changes=True`"))
        logger.warning(
            f"{checkpoint} was begun with {', '.join(changed)}, and goes on as `resume_with_changes=True` says. The "
            "state of the optimiser and of the schedule is the checkpoint's, and the learning rate with it."
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        # In every layout the parameters are loaded by now
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (names := self._non_finite_anywhere()):
            raise NotFiniteCheckpoint(
                f"The parameters in {checkpoint} are not finite ({names}): training had gone wrong before it was "
                "saved. Resume from an older checkpoint, or remove this one."
            )

    # Saving

    def _save_checkpoint(self, model, trial):
        self._require_finite(self._non_finite_anywhere())
        checkpoint = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # One that is written over is incomplete from now on
            (checkpoint / STATE).unlink(missing_ok=True)
        self._add_states_of_new_callbacks()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with full_disk_said(f"{checkpoint}", lambda: f"Make room: {how_to_go_on(self.args.output_dir)}."):
                super()._save_checkpoint(model, trial)
                if self.args.should_save and checkpoint.exists():
                    sync(checkpoint)
        except DiskFull:
            shutil.rmtree(checkpoint, ignore_errors=True)  # useless, and in the way
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit is not None:
            # Older ones are removed only now that this one is on the disk
            rotate_checkpoints(
                output_dir=self._get_output_dir(trial),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_rng_state(self, output_dir):
        # What follows is `trainer_state.json`, the mark of a complete checkpoint: not before all ranks have written,
        # and what they wrote is on the disk
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            sync(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_json(Path(output_dir) / SETTINGS, self._begun_with)
            write_manifest(output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        # No loss has seen what the last step did. Not over the ranks: a script may save from the first alone
        self._require_finite(_some(non_finite_parameters(self.model)))
        super().save_model(output_dir, _internal_call)

    def _require_finite(self, names: str) -> None:
        """Refuse to save, if these parameters are not finite."""
        if names:
            raise NotFinite(
                f"The parameters are not finite at step {self.state.global_step} ({names}), and are not saved: "
                f"{how_to_go_on(self.args.output_dir)}. Look at the gradient norms before, lower `learning_rate` or "
                "`max_grad_norm`."
            )

    def _save(self, output_dir=None, state_dict=None):
        # Beside the weights the Trainer saves its arguments, tokens included
        args, self.args = self.args, args_without_secrets(self.args)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args

    def _non_finite_anywhere(self) -> str:
        """Some trained parameters that are not finite in any process, as text; empty if all are."""
        names = non_finite_parameters(self.model)
        if self.args.world_size > 1:
            names = list(dict.fromkeys(name for each in gather_object([names]) for name in each))
        return _some(names)

    def _add_states_of_new_callbacks(self) -> None:
        """Callbacks that the resumed checkpoint did not have: the Trainer looks each of them up when it saves."""
        states: Any = self.state.stateful_callbacks  # by the callbacks' names
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, callback.state())
