"""
The training run behind `trl-rdro dpo`, `trl-rdro kto` and the files in `scripts/`.

It takes the flags and the YAML format of TRL's own scripts, with this package's configs and trainers. It is stricter
in one respect: TRL ignores what it does not know, and here a misspelt key ends the run before anything is loaded.

`python -m trl_rdro.cli.train dpo --config my.yaml` is what every process of a launched run executes.
"""

import argparse
import difflib
import logging
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from yaml import YAMLError

import trl_rdro
from trl_rdro.checks.models import check_model
from trl_rdro.trainers.safeguards import is_complete

from .errors import UserError, report_user_errors, user_error


logger = logging.getLogger(__name__)

# The file types that can be named directly as a dataset, and the `datasets` builder that reads each.
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class Parser(TrlParser):
    """TRL's parser, which says what is wrong without printing the usage of some three hundred options first."""

    def error(self, message):
        raise UserError(message)


def make_parser(method: str) -> Parser:
    """The parser of `trl-rdro <method>`; also what any other command needs to read a training YAML."""
    config_class = getattr(trl_rdro, f"{method.upper()}Config")
    return Parser(
        (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig),
        prog=f"trl-rdro {method}",
        usage="%(prog)s [--config FILE] [--accelerate_config NAME_OR_FILE] [--OPTION VALUE ...]",
        description="Train with TRL's options and ours. FILE is a YAML file of any of them, which the command line "
        "overrides. NAME_OR_FILE is an accelerate config: your own, or one that TRL ships (single_gpu, multi_gpu, "
        "zero1, zero2, zero3, fsdp1, fsdp2). The options of `accelerate launch` may be given too, in either place.",
        # With abbreviations, a misspelt option or a flag of `accelerate launch` could pass for one of ours.
        allow_abbrev=False,
    )


def make_launch_parser() -> argparse.ArgumentParser:
    """The parser of `accelerate launch`, plus `--accelerate_config`."""
    parser = launch_command_parser()
    parser.add_argument("--accelerate_config")
    return parser


def parse_strictly(parser: Parser, argv: list[str]) -> tuple[list, list[str], list[str]]:
    """
    Parse the command line and its YAML file, and refuse what neither `parser` nor `accelerate launch` knows.

    Returns:
        What `parser` makes of it; the launch flags found in the YAML file; and those found on the command line (in
        their order there).
    """
    if argv and argv[-1] == "--config":
        raise UserError("expected a file name after --config")
    with user_error(ValueError, TypeError, OSError, ImportError, YAMLError):
        *parsed, from_file, from_command_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )

    launch_actions = make_launch_parser()._option_string_actions
    for token in from_file[::2] + [token for token in from_command_line if token.startswith("--")]:
        option = token.split("=")[0]
        if option not in launch_actions:
            known = difflib.get_close_matches(option, [*parser._option_string_actions, *launch_actions], n=1)
            raise UserError(f"unknown option {option}" + (f", did you mean {known[0]}?" if known else ""))

    # A switch in YAML is a boolean, on the command line it stands alone.
    launch_flags = []
    for option, value in zip(from_file[::2], from_file[1::2], strict=True):
        if launch_actions[option].nargs != 0:
            launch_flags += [option, value]
        elif value == "True":
            launch_flags += [option]
    return parsed, launch_flags, from_command_line


def parse(method: str, argv: list[str]) -> tuple[tuple, list[str], list[str]]:
    """
    Parse the command line and its YAML file for a training run.

    Returns:
        The script, training, model and dataset arguments; and the launch flags of `parse_strictly`.
    """
    parsed, launch_flags, from_command_line = parse_strictly(make_parser(method), argv)
    script_args, training_args, model_args, dataset_args = parsed
    require_model_name(model_args)
    if script_args.dataset_name is None and not dataset_args.datasets:
        raise UserError("no dataset given: set dataset_name (a hub id, directory or file) or a list of datasets")
    return (script_args, training_args, model_args, dataset_args), launch_flags, from_command_line


def require_model_name(model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise UserError("no model given: set model_name_or_path to a local directory or a hub id")


def file_builder(name: str) -> str | None:
    """The builder for a dataset given as a file, or None for a directory or a hub id."""
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_BUILDERS:
            raise UserError(f"cannot read the dataset {name}: its type is not one of {', '.join(FILE_BUILDERS)}")
        return FILE_BUILDERS[path.suffix]
    # A hub id has one slash at most and no file type. Asking the hub for anything else only costs time.
    if not path.exists() and (len(path.parts) > 2 or path.is_absolute() or path.suffix in FILE_BUILDERS):
        raise UserError(f"no such dataset: {name} is neither a file nor a directory here")
    return None


def load_splits(script_args: ScriptArguments):
    """All splits of `dataset_name`."""
    name = script_args.dataset_name
    builder = file_builder(name)
    source = {"path": builder, "data_files": name} if builder else {"path": name}
    where = "" if Path(name).exists() else " (not a local file or directory, and not found on the hub)"
    with user_error(Exception, prefix=f"cannot load the dataset {name}{where}: "):
        return load_dataset(**source, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, with_eval: bool) -> tuple:
    """Load the training split, and the evaluation split if `with_eval`."""
    if dataset_args.datasets:
        if script_args.dataset_name:
            logger.warning("Both `datasets` and `dataset_name` are given: `dataset_name` is ignored.")
        for source in dataset_args.datasets:
            if source.data_files is None and (builder := file_builder(source.path)):
                source.data_files, source.path = source.path, builder
        with user_error(Exception, prefix="cannot load `datasets`: "):
            dataset = get_dataset(dataset_args)
    else:
        dataset = load_splits(script_args)

    splits = {"dataset_train_split": script_args.dataset_train_split}
    if with_eval:
        splits["dataset_test_split"] = script_args.dataset_test_split
    for option, split in splits.items():
        if split not in dataset:
            have = ", ".join(dataset)
            hint = "; give one that it has, or eval_strategy: no" if option == "dataset_test_split" else ""
            raise UserError(f"the dataset has no split {split} ({option}), only: {have}{hint}")
    return dataset[script_args.dataset_train_split], dataset[script_args.dataset_test_split] if with_eval else None


def find_checkpoint(training_args) -> str | bool | None:
    """The checkpoint directory to resume from, or True for the last complete one, which the trainer finds."""
    wanted = str(training_args.resume_from_checkpoint)
    if wanted.lower() in ("none", "false"):
        return None
    if wanted.lower() == "true":
        return True
    if not is_complete(Path(wanted)):
        raise UserError(f"cannot resume: {wanted} is not a checkpoint that was written to its end")
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
    where = "" if Path(model_name).exists() else " (not a local directory, and not found on the hub)"
    with user_error(ValueError), user_error(OSError, prefix=f"cannot load the model {model_name}{where}: "):
        check_model(model_name, model_args.model_revision, training_args.trust_remote_code)


def build_trainer(method: str, script_args, training_args, model_args, dataset_args):
    """Build the trainer that the arguments describe; every mistake in them ends in a `UserError`."""
    find_model(training_args, model_args)
    with_eval = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_data(script_args, dataset_args, with_eval)

    with user_error(ValueError, OSError, ImportError, NotImplementedError):
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
    if unused:
        raise UserError(f"{unused[0]} is not an option of the script: flags of `accelerate launch` go before its name")
    script_args, training_args, *_ = arguments
    checkpoint = find_checkpoint(training_args)
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
    sys.exit(main(sys.argv[1], sys.argv[2:]))
