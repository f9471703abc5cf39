"""
`trl-rdro estimate`: does a recipe fit, and if not, which of its settings to change?

Reads the recipe as the training command would, and the model's config; loads neither weights nor data. A recipe's
header says which command, how many GPUs and which accelerate config it is meant for; options override that.
"""

import json
from typing import Any

from ..errors import UserError, user_error
from ..tools.recipes import read_header
from .parsing import Parser, require_between


METHODS = ("dpo", "kto")


def read_accelerate(name: str | None) -> dict[str, Any]:
    """The settings of an accelerate config; none without one."""
    from .launch import accelerate_config_file
    from .launch_settings import check_accelerate_config

    return {} if name is None else check_accelerate_config(accelerate_config_file(name))


def read_run(
    method: str, argv: list[str], gpus: int | None, accelerate_config: str | None, packed_tokens: int | None = None
) -> tuple:
    """
    The sizes of the model and the settings of the run that a training command line describes: a `Shape` and a `Run`
    of `trl_rdro.tools.memory`. Without `gpus` the accelerate config says how many.
    """
    from ..tools.loading import load_config
    from ..tools.memory import engine_of, processes_of, read_shape, run_of
    from .training_options import parse

    accelerate = read_accelerate(accelerate_config)
    # A machine without a GPU refuses bf16 unless it is told that the run is meant for it
    (_, args, model_args, _), _, unused = parse(method, [*argv, "--use_cpu"])
    if unused:
        raise UserError(f"estimate does not read {unused[0]}: give --gpus and --accelerate_config")
    if args.max_length is None:
        raise UserError("max_length is not set: without it the longest example decides; give --max_length")
    if packed_tokens is not None and not args.padding_free:
        raise UserError("--packed_tokens is of packed rows: add --padding_free true")
    name = model_args.model_name_or_path
    config = load_config(name, model_args.model_revision, args.trust_remote_code)
    with user_error(AttributeError, ValueError, prefix=f"cannot count the parameters of {name}: "):
        shape = read_shape(config, model_args.lora_target_modules, model_args.lora_r if model_args.use_peft else 0)
    dtype = model_args.dtype
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    with user_error(ValueError):
        gpus = processes_of(accelerate) if gpus is None else gpus
        return shape, run_of(args, model_args, dtype, gpus, packed_tokens, **engine_of(accelerate, gpus))


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-rdro estimate",
        description="Say what each GPU will hold, before anything is loaded. Any option of the training command may "
        "be added, to see what it changes.",
    )
    parser.add_argument("--config", help="a recipe, or any YAML file of the training commands")
    parser.add_argument("--method", choices=METHODS, help="the training command; default: the recipe's, or dpo")
    parser.add_argument("--gpus", type=int, help="processes in all; default: the recipe's, or the accelerate config's")
    parser.add_argument("--accelerate_config", help="a name or file; default: the recipe's")
    parser.add_argument(
        "--packed_tokens",
        type=int,
        metavar="N",
        help="with padding_free, tokens of the largest packed row, as `trl-rdro inspect` says; default: as if all "
        "rows were of max_length and no prompt shared",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def report(shape: Any, run: Any) -> str:
    """The estimate for people."""
    from ..tools.memory import CARDS, GIB, RESERVE, estimate, savings, trainable

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
    require_between("--gpus", options.gpus, 1)
    require_between("--packed_tokens", options.packed_tokens, 1)
    header = {}
    if options.config is not None:
        header = read_header(options.config)
        training_argv = ["--config", options.config, *training_argv]
    method = options.method or header.get("method", "dpo")
    if method not in METHODS:
        raise UserError(f"estimate is about a training run: {options.config} is a recipe of trl-rdro {method}")
    gpus = options.gpus
    if gpus is None and "gpus" in header and options.accelerate_config is None:
        gpus = int(header["gpus"])
    accelerate_config = options.accelerate_config or header.get("accelerate")
    shape, run = read_run(method, training_argv, gpus, accelerate_config, options.packed_tokens)

    from ..tools.memory import as_dict

    print(json.dumps(as_dict(shape, run), indent=2) if options.json else report(shape, run))
    return 0
