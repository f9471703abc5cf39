"""
Runs recipes through the training entry point and writes down what was built.

`trl-rdro` starts `trl_rdro.cli.train` in every process of a run. The tests of the distributed recipes have it start
this module in its place, with the same arguments, because starting takes longer than training: it trains the recipe
that the command line names and then, in the same processes, the others of RECIPE_RUNS (a JSON list of
`[name, method, argv]`). Each process writes `<name>.rank<n>.json` beside that file, with what `run` returns.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest import mock


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (before torch: threads, no hub)

import torch

from trl_rdro.cli import train


# Options of the training, each with the reason why a test on a CPU cannot keep the recipe's
OVERRIDES = {
    "use_cpu": ("true", "there is no GPU"),
    "bf16": ("false", "DeepSpeed's bf16 on a CPU rounds the losses that are compared with constants"),
    "dtype": ("float32", "as bf16: without it DeepSpeed trains in the type of the weights"),
    "model_name_or_path": ("{model}", "a tiny model of the same architecture"),
    "dataset_name": ("{data}", "a small file with the same columns"),
    "max_steps": ("2", "two steps"),
    "logging_steps": ("1", "to see the first one"),
    "output_dir": ("{output}", "a temporary directory"),
}
# Options of `accelerate launch`
LAUNCH_OVERRIDES = {
    "num_processes": ("2", "two processes stand for all GPUs"),
    "num_machines": ("1", "and one node for all nodes"),
    "main_process_port": ("{port}", "a free one"),
    "mixed_precision": ("no", "as bf16"),
}
# Switches inside the libraries that no option reaches
PATCHES = {
    "bitsandbytes.nn.modules.has_avx512bf16": (
        lambda: False,
        "on some CPUs bitsandbytes repacks 4-bit weights in evaluation, and then cannot train on (nor under ZeRO-3)",
    ),
    "deepspeed.ops.__compatible_ops__": (
        {"deepspeed_shm_comm": False},
        "DeepSpeed would compile half a minute for faster communication on a CPU",
    ),
}


def patches() -> ExitStack:
    """`PATCHES`, of the libraries that are installed."""
    stack = ExitStack()
    for target, (value, _) in PATCHES.items():
        if importlib.util.find_spec(target.split(".")[0]) is None:
            continue
        if isinstance(value, dict):
            module, name = target.rsplit(".", 1)
            stack.enter_context(mock.patch.dict(getattr(importlib.import_module(module), name), value))
        else:
            stack.enter_context(mock.patch(target, value))
    return stack


def run(method: str, argv: list[str]) -> dict:
    """Train as `python -m trl_rdro.cli.train <method> <argv>` does, and say what was built on this process."""
    built = {}
    build_trainer = train.build_trainer

    def recording(*args):
        trainer = build_trainer(*args)
        trainer.end = lambda: None  # it would close the process group, which the next recipe needs
        plugin = trainer.accelerator.state.deepspeed_plugin
        built.update(
            world_size=trainer.accelerator.num_processes,
            engine=str(trainer.accelerator.distributed_type.value),
            zero_stage=plugin.zero_stage if plugin is not None else 0,
            bits=4 if getattr(trainer.model, "is_loaded_in_4bit", False) else 16,
            lora=hasattr(trainer.model, "peft_config"),
            batch=trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
            trainer=trainer,
        )
        return trainer

    with patches(), mock.patch.object(train, "build_trainer", recording):
        code = train.main(method, argv)
    if code != 0:
        return {"code": code}
    trainer = built.pop("trainer")
    # Switched on by `train`
    built["checkpointing"] = trainer.model.is_activation_checkpointing
    return {"code": code, **built, "log": trainer.state.log_history}


def main() -> None:
    method, *argv = sys.argv[1:]
    runs = Path(os.environ["RECIPE_RUNS"])
    listed = json.loads(runs.read_text())
    assert listed[0][1:] == [method, argv], (listed[0], method, argv)
    for name, method, argv in listed:
        try:
            result = run(method, argv)
        except Exception:
            result = {"error": traceback.format_exc()}
        (runs.parent / f"{name}.rank{os.environ['RANK']}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
    # The teardown of a process group on CPU sometimes aborts after everything is done
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
