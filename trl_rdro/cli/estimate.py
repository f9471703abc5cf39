"""
`trl-rdro estimate`: does a recipe fit, and if not, which of its settings to change?

Reads the recipe as the training command would, and the model's config; loads neither weights nor data. A recipe's
header says which command, how many GPUs and which accelerate config it is meant for; options override that.
"""

import argparse
import json
import re
from pathlib import Path

import yaml
from trl.trainer.utils import get_peft_config

from ..checks.models import check_config
from ..tools.memory import CARDS, GIB, RESERVE, Run, Shape, as_dict, estimate, read_shape, savings, trainable
from .errors import UserError, user_error
from .launch import accelerate_config_file
from .train import parse


def read_header(path: str | Path) -> dict[str, str]:
    """The `# name: value` lines at the top of a recipe."""
    header = re.match(r"(?:#.*\n)*", Path(path).read_text()).group()
    return dict(re.findall(r"^# (method|accelerate|gpus|memory): (.+)$", header, re.MULTILINE))


def engine_of(accelerate_config: str | None, gpus: int) -> dict:
    """What an accelerate config says about sharding and offloading, as fields of `Run`."""
    if accelerate_config is None:
        return {"engine": "ddp" if gpus > 1 else "single"}
    with user_error(OSError, yaml.YAMLError):
        settings = yaml.safe_load(Path(accelerate_config_file(accelerate_config)).read_text())
    kind = settings.get("distributed_type")
    if kind == "FSDP":
        return {"engine": "fsdp", "offload_param": bool(settings["fsdp_config"].get("fsdp_offload_params"))}
    if kind != "DEEPSPEED":
        return {"engine": "ddp" if gpus > 1 else "single"}
    deepspeed = settings.get("deepspeed_config") or {}
    if "deepspeed_config_file" in deepspeed:
        raise UserError("the accelerate config refers to a DeepSpeed JSON file, which `estimate` does not read")
    return {
        "engine": "deepspeed",
        "stage": int(deepspeed.get("zero_stage", 2)),
        "offload_optimizer": deepspeed.get("offload_optimizer_device", "none") != "none",
        "offload_param": deepspeed.get("offload_param_device", "none") != "none",
    }


def processes_of(accelerate_config: str | None) -> int:
    if accelerate_config is None:
        return 1
    with user_error(OSError, yaml.YAMLError):
        settings = yaml.safe_load(Path(accelerate_config_file(accelerate_config)).read_text())
    return 1 if settings.get("distributed_type") == "NO" else int(settings.get("num_processes", 1))


def read_run(method: str, argv: list[str], gpus: int, accelerate_config: str | None) -> tuple[Shape, Run]:
    """The sizes of the model and the settings of the run that a training command line describes."""
    # A machine without a GPU refuses bf16 unless it is told that the run is meant for it
    (_, args, model_args, _), *_ = parse(method, [*argv, "--use_cpu"])
    if args.max_length is None:
        raise UserError("max_length is not set: without it the longest example decides; give --max_length")
    name = model_args.model_name_or_path
    with user_error(ValueError), user_error(OSError, prefix=f"cannot read the config of {name}: "):
        config = check_config(name, model_args.model_revision, args.trust_remote_code)
    lora = get_peft_config(model_args)
    with user_error(AttributeError, ValueError, prefix=f"cannot count the parameters of {name}: "):
        targets = model_args.lora_target_modules if lora is not None else None
        shape = read_shape(config, targets, lora.r if lora is not None else 0)
    dtype = model_args.dtype
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    return shape, Run(
        length=args.max_length,
        batch=args.per_device_train_batch_size,
        paired=method == "dpo",
        losses=tuple([args.loss_type] if isinstance(args.loss_type, str) else args.loss_type),
        wdpo_penalised=getattr(args, "wdpo_rho", 0) > 0,
        accumulation=args.gradient_accumulation_steps,
        lora=lora is not None,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        nested=model_args.use_bnb_nested_quant,
        dtype=dtype,
        half=bool(args.bf16 or args.fp16),
        checkpointing=bool(args.activation_checkpointing or args.gradient_checkpointing),
        precomputed=args.precompute_ref_log_probs,
        optim=str(args.optim).split(".")[-1].lower(),
        gpus=gpus,
        **engine_of(accelerate_config, gpus),
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-rdro estimate",
        description="Say what each GPU will hold, before anything is loaded. Any option of the training command may "
        "be added, to see what it changes.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a recipe, or any YAML file of the training commands")
    parser.add_argument("--method", choices=["dpo", "kto"], help="the training command; default: the recipe's, or dpo")
    parser.add_argument("--gpus", type=int, help="processes in all; default: the recipe's, or the accelerate config's")
    parser.add_argument("--accelerate_config", help="a name or file; default: the recipe's")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def fail(message):
        raise UserError(message)

    parser.error = fail
    return parser


def report(shape: Shape, run: Run) -> str:
    """The estimate for people."""
    result = estimate(shape, run)
    lines = [
        run.describe(),
        f"{shape.parameters / 1e9:.2f}B parameters, {trainable(shape, run)[0] / 1e6:.1f}M trained",
    ]
    lines += ["", f"GiB on each GPU at the peak ({result.peak}):"]
    lines += [f"  {name:14}{size / GIB:8.2f}" for name, size in result.parts.items() if size]
    lines += [f"  {'total':14}{sum(result.parts.values()) / GIB:8.2f}"]
    if result.loading > sum(result.parts.values()):
        lines += [f"  {'while loading':14}{result.loading / GIB:8.2f}  each process loads all quantised weights"]
    cards = result.cards()
    verdicts = ", ".join(f"{card} GB {'yes' if card in cards else 'no'}" for card in CARDS)
    lines += ["", f"Fits, with {RESERVE:.0%} left free: {verdicts}"]
    if saved := savings(shape, run):
        lines += ["", "What would save most, GiB:"]
        lines += [f"  {size / GIB:7.2f}  {name}" for name, size in saved[:5]]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the estimate for the command line `argv`."""
    options, training_argv = make_parser().parse_known_args(argv)
    header = {}
    if options.config is not None:
        with user_error(OSError):
            header = read_header(options.config)
        training_argv = ["--config", options.config, *training_argv]
    accelerate_config = options.accelerate_config or header.get("accelerate")
    gpus = options.gpus
    if gpus is None:
        own = "gpus" in header and options.accelerate_config is None
        gpus = int(header["gpus"]) if own else processes_of(accelerate_config)
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    shape, run = read_run(options.method or header.get("method", "dpo"), training_argv, gpus, accelerate_config)
    print(json.dumps(as_dict(shape, run), indent=2) if options.json else report(shape, run))
    return 0
