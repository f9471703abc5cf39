"""What comes and goes in a step of training, in bytes, and the moments in which it can peak."""

from collections.abc import Iterator

from .model import Shape
from .persistent import adapter_bytes, gradients, trainable
from .run import Run


# TRL's fused LM head works on tiles of the logits: trl/kernels/chunked_logprob.py, trl/trainer/utils.py
HEAD_TOKENS, HEAD_VOCAB = 4096, 32768


def layer_bytes(shape: Shape, run: Run) -> float:
    """What autograd keeps of one decoder layer, per row: the terms are those of transformers' Llama and Qwen2."""
    stream, compute = run.weight_bytes, run.compute_bytes
    attention = shape.heads * shape.head_dim
    # RMSNorm works in fp32 and keeps its input, and for the gradient of its weight what it multiplies by that
    norms = 2 * (4 + stream * (not run.lora)) * shape.hidden
    if run.lora:
        # Frozen layers keep no input, LoRA's A matrices do
        share = shape.adapted / 7
        inputs = (5 if adapter_bytes(run) != compute else 2) * shape.hidden * compute * share
        down = shape.intermediate * compute * share
    else:
        # Autocast casts the input of each of q, k, v, gate and up by itself
        inputs = (5 if stream != compute else 2) * shape.hidden * compute
        down = shape.intermediate * compute
    # Queries, keys and values repeated to all heads, the output, and the mask of padding that the kernel is given
    mask = 0 if run.packed_tokens else run.length * compute
    attended = 4 * attention * compute + 4 * shape.heads + mask
    gated = 3 * shape.intermediate * compute + down
    return run.row_length * (norms + inputs + attended + gated)


def checkpoint_bytes(shape: Shape, run: Run) -> float:
    """The input of one decoder layer, per row: all that checkpointing keeps of it."""
    return run.row_length * shape.hidden * run.weight_bytes


def layer_gradients(shape: Shape, run: Run) -> float:
    """The largest gradients that are alive at once in the backward pass of a layer, per row."""
    sizes = 2 * shape.intermediate * run.compute_bytes + shape.hidden * run.weight_bytes
    if run.lora and adapter_bytes(run) != run.compute_bytes:  # PEFT casts the input to the type of the adapter
        sizes += shape.intermediate * run.weight_bytes
    return run.row_length * sizes


def head_tiles(shape: Shape, run: Run, backward: bool) -> float:
    """The fused LM head's buffer for a tile of logits, which has its full width also where the vocabulary is smaller.
    Triton works in place; elsewhere torch makes temporary fp32 copies of the tile, and a boolean one."""
    tokens = min(run.rows * (run.row_length - 1), HEAD_TOKENS)
    copies = 0 if run.device == "cuda" else (7.25 if backward else 3.25)
    return tokens * (HEAD_VOCAB * run.compute_bytes + min(shape.vocab, HEAD_VOCAB) * 4 * copies)


def moments(shape: Shape, run: Run) -> Iterator[tuple[str, dict[str, float]]]:
    """The moments of a step in which memory can peak, with what comes on top of the persistent tensors.

    Long because it is one sum after the other, in the order of a step, over terms that the moments share.
    """
    rows, layers = run.rows, shape.layers
    tokens = rows * run.row_length
    stream, compute = run.weight_bytes, run.compute_bytes
    layer = rows * layer_bytes(shape, run)
    kept = layers * (rows * checkpoint_bytes(shape, run) if run.checkpointing else layer)
    kept += tokens * shape.hidden * (4 + 2 * stream)  # the last norm, its output, and the head's copy of it
    # Autocast makes half-precision copies of weights: of trained ones one for the whole forward, of frozen ones for
    # each use. The backward pass needs them, and with checkpointing makes those of a layer again.
    casts = cast_forward = 0.0
    if stream != compute:
        casts = 0 if run.checkpointing else (shape.linear if run.lora else shape.parameters) * compute
        cast_forward = casts if run.lora else shape.parameters * compute
    work = layer * run.checkpointing + rows * layer_gradients(shape, run)
    if run.lora and stream != compute:
        work += shape.largest_linear * compute
    if run.bits < 16:  # a quantised weight is expanded for each use, before all of the layer's gradients are there
        work = max(work, work - rows * layer_gradients(shape, run) / 2 + shape.largest_linear * compute)
    head_cast = min(shape.vocab, HEAD_VOCAB) * shape.hidden * compute if stream != compute else 0
    # Central: the direction v and the shifts +hv, -hv; one-sided: the gradient, the direction and the shift
    extra = 3 * 4 * tokens / run.copies * shape.hidden if run.wdpo else 0

    grads = gradients(shape, run)
    # The first backward pass of a step finds no gradients, and makes them one by one
    one_sided = run.wdpo and run.wdpo_one_sided
    waiting = grads if run.accumulation > 1 or run.engine == "deepspeed" or one_sided else 0
    head_grad = 4 * shape.head if not run.lora else 0
    if head_grad and stream == 2:
        head_grad += stream * shape.head  # fp32 while it is summed, then as the weight

    def moment(gradients, activations, head=0.0, wdpo=0.0):
        return {"gradients": gradients, "activations": activations, "head": head, "wdpo": wdpo}

    yield (
        "forward, LM head",
        moment(waiting, kept + cast_forward, head_tiles(shape, run, backward=False) + head_cast, extra),
    )
    yield (
        "backward, LM head",
        moment(
            waiting,
            kept + casts,
            head_tiles(shape, run, backward=True) + head_cast + head_grad + 4 * tokens * shape.hidden,
        ),
    )
    own_head_grad = 0 if run.lora or waiting else shape.head * stream
    yield (
        "backward, last layer",
        moment(max(waiting, own_head_grad), kept + casts + work),
    )
    # By then the gradients of its own MLP's last matrix are there, and not yet those of the rest and of the embedding
    missing = (
        0 if run.lora else shape.linear / layers - shape.intermediate * shape.hidden + shape.head * (not shape.tied)
    )
    yield (
        "backward, first layer",
        moment(max(waiting, grads - missing * stream), (kept / layers if run.checkpointing else layer) + work),
    )
    # A tied embedding's second gradient is made before it is added to the first
    yield "backward, embedding", moment(grads + (shape.head * stream if shape.tied and not run.lora else 0), 0)
    # DeepSpeed takes the step with fp32 copies of the gradients
    number, size = trainable(shape, run)
    fp32 = number * 4 / run.gpus if run.engine == "deepspeed" and size == 2 and not run.offload_optimizer else 0
    yield "optimiser step", {**moment(grads, 0), "fp32 gradients": fp32}
