"""What a GPU holds from the first step of a run to its last, in bytes."""

from ...losses.types import LOSS_TYPES
from .model import Shape
from .run import Run


# DeepSpeed's defaults, which accelerate leaves alone: deepspeed/runtime/zero/config.py
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
# Optimisers whose state is not two numbers for each trained one, as Adam's
FULL_STATES = {"sgd": 0, "adafactor": 0, "lion_32bit": 1}


def weights(shape: Shape, run: Run) -> float:
    return model_bytes(shape, run) / (run.shards if not run.offload_param else float("inf")) + constant_bytes(
        shape, run
    )


def model_bytes(shape: Shape, run: Run) -> float:
    """All of a model's weights, with the adapters."""
    adapter = shape.adapter * adapter_bytes(run) if run.lora else 0
    quantised = shape.linear * run.bits / 8 if run.bits < 16 else shape.linear * run.weight_bytes
    return quantised + (shape.parameters - shape.linear) * run.weight_bytes + adapter


def constant_bytes(shape: Shape, run: Run) -> float:
    """The scales of 4-bit blocks: 64 weights share one, in fp32, or nested in 8 bits. ZeRO does not shard them."""
    if run.bits == 4:
        return shape.linear / 64 * (1 + 4 / 256 if run.nested else 4)
    return shape.linear / shape.hidden * 4 if run.bits == 8 else 0


def adapter_bytes(run: Run) -> int:
    """Of a LoRA weight: PEFT makes it fp32, TRL bf16 for quantised models and for ZeRO-3. With a loss of ours it is
    fp32 again for quantised models, but not under DeepSpeed."""
    if run.engine == "deepspeed":
        return 2 if run.half or run.bits < 16 else 4
    return 2 if run.bits < 16 and LOSS_TYPES.keys().isdisjoint(run.losses) else 4


def trainable(shape: Shape, run: Run) -> tuple[int, int]:
    """The number of trained parameters, and the bytes of each."""
    return (shape.adapter, adapter_bytes(run)) if run.lora else (shape.parameters, run.weight_bytes)


def reference(shape: Shape, run: Run) -> float:
    """A second copy of the model, unless it is the first one without its adapters or was asked beforehand."""
    return 0 if run.lora or run.precomputed else model_bytes(shape, run) / run.shards


def gradients(shape: Shape, run: Run) -> float:
    number, size = trainable(shape, run)
    return number * size / (run.gpus if run.engine == "fsdp" or run.stage >= 2 else 1)


def optimizer(shape: Shape, run: Run) -> float:
    """Optimiser states, and under DeepSpeed in half precision the fp32 copy of what is trained."""
    if run.offload_optimizer:
        return 0
    number, size = trainable(shape, run)
    master = run.engine == "deepspeed" and size == 2
    states = 2 if "8bit" in run.optim else (4 if master else size) * FULL_STATES.get(run.optim, 2)
    return number * (states + 4 * master) / (run.gpus if run.engine == "fsdp" or run.stage >= 1 else 1)


def buffers(shape: Shape, run: Run) -> float:
    """What communication needs: DDP's copy of the gradients, DeepSpeed's bucket, gathered parameters."""
    number, size = trainable(shape, run)
    if run.engine == "ddp":
        return number * size
    if run.engine == "fsdp":
        return (2 * shape.linear / shape.layers + shape.head) * run.compute_bytes
    total = 0.0
    if run.engine == "deepspeed" and run.stage >= 1 and run.gpus > 1:
        total += REDUCE_BUCKET * size
    if run.stage == 3 and run.gpus > 1:
        total += min(model_bytes(shape, run), (MAX_LIVE + shape.head) * run.weight_bytes)
    return total
