"""
`trl-rdro iterate`: check the arguments here, then run the loop under `accelerate launch`.

`python -m trl_rdro.cli.iterate --config my.yaml` is what every process of a launched run executes.
"""

import sys


if __name__ == "__main__":  # before the imports below, which take seconds
    from trl_rdro.run.signals import end_on_signals

    end_on_signals()

from trl import ModelConfig, ScriptArguments

import trl_rdro
from trl_rdro.checks.datasets import check_rows
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.judges import Judge, make_judge
from trl_rdro.iterate.vllm_sampling import max_lora_rank

from ..errors import NotFinite, UserError, user_error
from ..run.disk import DiskFull, full_disk_said
from ..run.lock import only_run_in
from ..run.search_path import restore_search_path
from ..run.secrets import take_hub_token
from ..run.signals import say_when_stopped
from ..tools.loading import load_splits, require_split
from .errors import report_user_errors
from .launch import launch_module, without
from .option_table import find_method, find_option, require_model_name
from .train import find_model, make_output_dir
from .training_options import (
    TrainingParser,
    parse_strictly,
    refuse_launch_flags,
)


LOOP_MODULE = "trl_rdro.cli.iterate"
# With TRL's 0.1 a logistic loss moves the policy ten times as far, beyond what the loop's defaults keep stable
DEFAULT_BETA = 1.0
# And with a judge that is certain TRL's `sigmoid` has no bound at all: one round may end in a single answer
DEFAULT_LOSS = "cdpo"
DEFAULT_LABEL_SMOOTHING = 0.1
GO_ON = "the same command goes on where this one was"


def make_parser(method: str, loss_is_given: bool = False) -> TrainingParser:
    parser = TrainingParser(
        (IterateConfig, ScriptArguments, getattr(trl_rdro, f"{method.upper()}Config"), ModelConfig),
        prog="trl-rdro iterate",
        usage="%(prog)s [--config FILE] [--accelerate_config NAME_OR_FILE] [--OPTION VALUE ...]",
        description="Rounds of sampling, judging and training, with a reference and a sampling distribution that move "
        "by set shares, and a stability report for each round. FILE is a YAML file of any of these options, which the "
        "command line overrides. The training options are those of `trl-rdro dpo`, or with `method: kto` those of "
        f"`trl-rdro kto`; `beta` is {DEFAULT_BETA} unless set, and for pairs the loss `{DEFAULT_LOSS}` with "
        f"`label_smoothing` {DEFAULT_LABEL_SMOOTHING}.",
    )
    parser.set_defaults(beta=DEFAULT_BETA)
    if method == "dpo" and not loss_is_given:
        parser.set_defaults(loss_type=[DEFAULT_LOSS], label_smoothing=DEFAULT_LABEL_SMOOTHING)
    return parser


def parse(argv: list[str]) -> tuple[tuple, Judge, list[str], list[str]]:
    """
    Parse the command line and its YAML file, and refuse what does not go together.

    Returns:
        The loop, script, training and model arguments; the judge; and the launch flags of the YAML file and of the
        command line.
    """
    (config, script_args, args, model_args), launch_flags, from_command_line = parse_strictly(
        make_parser(find_method(argv), find_option(argv, "loss_type") is not None), argv
    )
    require_model_name(model_args.model_name_or_path)
    if script_args.dataset_name is None:
        raise UserError("no prompts given: set dataset_name (a hub id, directory or file with a column prompt)")
    with user_error(ValueError):
        config.validate_with(args)
        if config.use_vllm and model_args.use_peft:
            max_lora_rank(model_args.lora_r)
        judge = make_judge(config)
    return (config, script_args, args, model_args), judge, launch_flags, from_command_line


def load_prompts(script_args: ScriptArguments) -> tuple[list[dict], list[dict]]:
    """The rows of the training split, and those of the test split, or the same where there is none."""
    assert script_args.dataset_name is not None  # refused before
    splits = load_splits(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    names = (script_args.dataset_train_split, script_args.dataset_test_split)
    require_split(splits, names[0], "dataset_train_split")
    found = [list(splits[name]) for name in names if name in splits]
    for name, rows in zip(names, found, strict=False):
        with user_error(ValueError):
            check_rows(rows, name, "prompts")
    return found[0], found[-1]


def launch(argv: list[str]) -> int:
    """Run the loop in the processes that the command line asks for."""
    *_, launch_flags, launch_argv = parse(argv)
    return launch_module(LOOP_MODULE, without(argv, launch_argv), [*launch_flags, *launch_argv])


@report_user_errors
def run(argv: list[str] | None = None) -> int:
    """Run the loop in this process, one of those launched."""
    (config, script_args, args, model_args), judge, _, unused = parse(sys.argv[1:] if argv is None else argv)
    refuse_launch_flags(unused)
    make_output_dir(args)
    take_hub_token(args)
    say_when_stopped(lambda: GO_ON)
    room = full_disk_said(args.output_dir, lambda: f"Make room: {GO_ON}.")
    with user_error(DiskFull, NotFinite), room, only_run_in(args.output_dir):
        find_model(args, model_args)
        rows, monitor_rows = load_prompts(script_args)
        from trl_rdro.iterate.rounds import Loop

        with user_error(ValueError):
            loop = Loop(config, args, model_args, judge, rows, monitor_rows)
        sampled = loop.sample() if config.sample_only else None
        result = None if config.sample_only else loop.run()
    if args.process_index == 0 and sampled is not None:
        print(
            f"Completions judged, pairs in {sampled}. Train on them with: trl-rdro {config.method} --dataset_name "
            f"{sampled.parent} --precompute_ref_log_probs true --model_name_or_path {model_args.model_name_or_path}"
        )
    elif args.process_index == 0 and result is not None:
        stopped = "stopped at the entropy floor, " if result["stopped"] else ""
        print(f"Loop completed: {stopped}model of round {result['final_round'] + 1} in {args.output_dir}/final")
    return 0


main = launch


if __name__ == "__main__":
    restore_search_path()
    sys.exit(run())
