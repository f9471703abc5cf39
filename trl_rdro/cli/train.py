"""
The training run behind `trl-rdro dpo`, `trl-rdro kto` and the files in `scripts/`.

`python -m trl_rdro.cli.train dpo --config my.yaml` is what every process of a launched run executes.
"""

import sys


if __name__ == "__main__":  # before the imports below, which take seconds
    from trl_rdro.run.signals import end_on_signals

    end_on_signals()

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

import trl_rdro
from trl_rdro.checks.models import check_model

from ..configs.validation import Range, require
from ..errors import NotFinite, UserError, user_error
from ..run.completeness import fault, how_to_go_on
from ..run.disk import DiskFull, full_disk_said
from ..run.lock import only_run_in
from ..run.search_path import restore_search_path
from ..run.secrets import take_hub_token
from ..run.signals import say_when_stopped
from ..tools.loading import file_builder, load_splits, loading, require_configuration, require_split
from .errors import report_user_errors
from .training_options import parse, refuse_launch_flags


logger = logging.getLogger(__name__)

FRACTION = Range("(0, inf)", "It is a data set's share of all rows, beside the other fractions.")


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, with_eval: bool) -> tuple:
    """Load the training split, and the evaluation split if `with_eval`."""
    if dataset_args.datasets:
        if script_args.dataset_name:
            logger.warning("Both `datasets` and `dataset_name` are given: `dataset_name` is ignored.")
        for source in dataset_args.datasets:
            require_configuration(source.path, source.name, "`name` in `datasets`")
            with user_error(ValueError):
                require("datasets.fraction", source.fraction, (float, type(None)), FRACTION)
            if source.data_files is None and (builder := file_builder(source.path)):
                source.data_files, source.path = source.path, builder
        with user_error(Exception, prefix="cannot load `datasets`: "):
            splits = get_dataset(dataset_args)
    else:
        assert script_args.dataset_name is not None  # `parse` wants one of the two
        splits = load_splits(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)

    train = require_split(splits, script_args.dataset_train_split, "dataset_train_split")
    if not with_eval:
        return train, None
    hint = "; give one that it has, or eval_strategy: no"
    return train, require_split(splits, script_args.dataset_test_split, "dataset_test_split", hint)


def find_checkpoint(training_args) -> str | bool | None:
    """The checkpoint directory to resume from, or True for the last complete one, which the trainer finds."""
    wanted = str(training_args.resume_from_checkpoint)
    if wanted.lower() in ("none", "false"):
        return None
    if wanted.lower() == "true":
        return True
    if found := fault(wanted):
        raise UserError(f"cannot resume: {wanted} is not a complete checkpoint: {found}")
    return wanted


def find_model(training_args, model_args: ModelConfig) -> None:
    """Look whether there is a model of that name, and tell the trainer how to load it."""
    model_name = model_args.model_name_or_path
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    assert model_name is not None  # `parse` refuses that
    with user_error(ValueError), loading("the model", model_name, OSError):
        check_model(model_name, model_args.model_revision, training_args.trust_remote_code)


def make_output_dir(training_args) -> None:
    """Make the directory, so that one that cannot be made is known before anything is loaded."""
    if not training_args.output_dir:
        raise UserError("output_dir is empty: give a directory for the model")
    with user_error(OSError, ValueError, prefix="cannot make the output_dir: "):
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)


@contextmanager
def _named(training_args) -> Iterator[None]:
    """Say of an argument that a model does not know that it comes from `model_init_kwargs`."""
    try:
        yield
    except TypeError as error:
        for name in training_args.model_init_kwargs:
            if f"unexpected keyword argument '{name}'" in str(error):
                raise UserError(f"`model_init_kwargs` has the key {name}, which the model does not take") from error
        raise


def build_trainer(method: str, script_args, training_args, model_args, dataset_args):
    """Build the trainer that the arguments describe; every mistake in them ends in a `UserError`."""
    find_model(training_args, model_args)
    with_eval = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_data(script_args, dataset_args, with_eval)

    with user_error(ValueError, OSError, ImportError, NotImplementedError, re.error), _named(training_args):
        trainer = getattr(trl_rdro, f"{method.upper()}Trainer")(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    if script_args.ignore_bias_buffers:
        # DistributedDataParallel cannot broadcast boolean buffers.
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


@report_user_errors
def main(method: str, argv: list[str] | None = None) -> int:
    """Train with `method` ("dpo" or "kto") as the command line says, save, and return the exit code."""
    arguments, _, unused = parse(method, sys.argv[1:] if argv is None else argv)
    refuse_launch_flags(unused)
    training_args = arguments[1]
    make_output_dir(training_args)
    take_hub_token(training_args)
    output_dir, checkpoint = training_args.output_dir, find_checkpoint(training_args)
    say_when_stopped(lambda: how_to_go_on(output_dir))
    room = full_disk_said(output_dir, lambda: f"Make room: {how_to_go_on(output_dir)}.")
    with user_error(DiskFull, NotFinite), room, only_run_in(output_dir):
        return train(method, arguments, checkpoint)


def train(method: str, arguments: tuple, checkpoint: str | bool | None) -> int:
    """Build the trainer, train, and leave in the output directory what a run leaves."""
    script_args, training_args, *_ = arguments
    trainer = build_trainer(method, *arguments)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()  # trainer_state.json, which holds the curves
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Training completed, model saved to {training_args.output_dir}")
    if training_args.plot and trainer.is_world_process_zero():
        from trl_rdro.tools.plotting import plot_run

        print(f"Curves in {plot_run(trainer.state.log_history, Path(training_args.output_dir) / 'curves.png')}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    if hasattr(trainer, "end"):  # transformers 5.18: closes the trackers and the process group
        trainer.end()
    return 0


if __name__ == "__main__":
    restore_search_path()
    sys.exit(main(sys.argv[1], sys.argv[2:]))
