"""Which settings would save memory, and how much."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .model import Shape
from .peak import GIB, estimate
from .persistent import trainable
from .run import Run


def knobs(run: Run) -> Iterator[tuple[str, Run]]:
    """Each setting that would save memory, and the run with it."""
    if not run.checkpointing:
        yield "activation_checkpointing: true", replace(run, checkpointing=True)
    if not run.precomputed and not run.lora:
        yield "precompute_ref_log_probs: true", replace(run, precomputed=True)
    if run.batch > 1:
        half = run.batch // 2
        changed = replace(run, batch=half, accumulation=run.accumulation * 2)
        if run.packed_tokens:
            changed = replace(changed, packed_tokens=run.packed_tokens * half // run.batch)
        yield f"per_device_train_batch_size: {half}, gradient_accumulation_steps: {changed.accumulation}", changed
    if not run.packed_tokens:
        yield f"max_length: {run.length // 2}", replace(run, length=run.length // 2)
    if run.wdpo and not run.wdpo_one_sided and run.engine != "deepspeed" and len(run.losses) == 1:
        yield "wdpo_difference: one_sided", replace(run, wdpo_one_sided=True)
    if "8bit" not in run.optim and not run.offload_optimizer:
        yield "optim: adamw_8bit", replace(run, optim="adamw_8bit")
    if run.engine in ("single", "ddp", "deepspeed") and run.gpus > 1 and run.stage < 3:
        yield "--accelerate_config zero3", replace(run, engine="deepspeed", stage=3)
    if run.stage == 3 and not run.offload_optimizer:
        yield (
            "--accelerate_config recipes/accelerate/zero3_offload.yaml",
            replace(run, offload_optimizer=True),
        )
    if run.gpus > 1 and (run.stage >= 1 or run.engine == "fsdp"):
        yield f"--num_processes {2 * run.gpus}", replace(run, gpus=2 * run.gpus)
    if run.lora and run.dtype == "float32" and run.bits == 16:
        yield "dtype: bfloat16", replace(run, dtype="bfloat16")
    if run.bits == 16 and run.lora:
        yield "load_in_4bit: true", replace(run, bits=4, nested=True, dtype="bfloat16")
    if run.bits == 4 and not run.nested:
        yield "use_bnb_nested_quant: true", replace(run, nested=True)


def savings(shape: Shape, run: Run) -> list[tuple[str, float]]:
    """The knobs by what they save, the best first; those that save less than one per cent are left out."""
    total = estimate(shape, run).total
    saved = [(name, total - estimate(shape, changed).total) for name, changed in knobs(run)]
    return sorted((item for item in saved if item[1] > 0.01 * total), key=lambda item: -item[1])


def as_dict(shape: Shape, run: Run) -> dict[str, Any]:
    """The estimate as plain data, in GiB."""
    result = estimate(shape, run)
    return {
        "run": run.describe(),
        "parameters": shape.parameters,
        "trained": trainable(shape, run)[0],
        "gib": {name: round(size / GIB, 2) for name, size in result.parts.items()},
        "total_gib": round(result.total / GIB, 2),
        "loading_gib": round(result.loading / GIB, 2),
        "peak": result.peak,
        "fits": result.cards(),
        "saves_gib": {name: round(size / GIB, 2) for name, size in savings(shape, run)},
    }
