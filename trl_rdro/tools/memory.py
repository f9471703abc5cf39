"""
What each GPU will hold during training, computed before anything is loaded.

Parameters are counted on a model without data (torch's "meta" device) built from its config. Activations are what
autograd keeps of a Llama-like decoder layer (RMSNorm, grouped-query attention, gated MLP), written out term by term in
`layer_bytes`. A step is a sequence of moments, each with its own set of live tensors, and the estimate is the largest:
adding up all that is ever allocated would overshoot by a third. `docs/estimate.md` states the assumptions and how the
figures compare with measured ones.

Everything is in bytes. Nothing here knows the command line: `trl_rdro/cli/estimate.py` translates a recipe.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


GIB = 2**30
# Cards by the size they are sold with, and the GiB of it that a process can use
CARDS = {24: 23, 40: 39, 80: 78, 141: 139}
# CUDA context, cuBLAS and NCCL workspaces. Not measured here: a usual size, the same for every run
CUDA_OVERHEAD = 1 * GIB
# The share of a card to leave free for the allocator's fragmentation
RESERVE = 0.1

# TRL's fused LM head works on tiles of the logits: trl/kernels/chunked_logprob.py, trl/trainer/utils.py
HEAD_TOKENS, HEAD_VOCAB = 4096, 32768
# DeepSpeed's defaults, which accelerate leaves alone: deepspeed/runtime/zero/config.py
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000

# Optimisers whose state is not two numbers for each trained one, as Adam's
FULL_STATES = {"sgd": 0, "adafactor": 0, "lion_32bit": 1}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    tied: bool
    parameters: int  # all, tied ones once
    linear: int  # weights of linear layers other than the LM head: what quantisation applies to
    largest_linear: int
    adapter: int  # LoRA weights
    adapted: int  # linear layers with LoRA in a decoder layer

    @property
    def head(self) -> int:
        return self.vocab * self.hidden


def read_shape(config: PretrainedConfig, lora_targets: str | list[str] | None = None, lora_r: int = 0) -> Shape:
    """Count a model's parameters from its config alone. `lora_targets` as PEFT takes them, `lora_r` 0 for none."""
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if lora_targets is None:
        lora_targets = ["q_proj", "v_proj"]  # PEFT's own choice for Llama and Qwen2
    names = [lora_targets] if isinstance(lora_targets, str) and lora_targets != "all-linear" else lora_targets
    adapted = [
        module for name, module in linears.items() if names == "all-linear" or any(name.endswith(end) for end in names)
    ]
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linears.values()),
        largest_linear=max(module.weight.numel() for module in linears.values()),
        adapter=sum(lora_r * (module.in_features + module.out_features) for module in adapted) if lora_r else 0,
        adapted=round(len(adapted) / text.num_hidden_layers) if lora_r else 0,
    )


@dataclass(frozen=True)
class Run:
    """The settings of a run that memory depends on."""

    length: int  # tokens of a padded row
    batch: int  # pairs, or unpaired completions, of a micro-batch
    paired: bool = True
    losses: tuple[str, ...] = ("sigmoid",)
    wdpo_penalised: bool = True  # wdpo_rho > 0
    accumulation: int = 1
    lora: bool = False
    bits: int = 16  # 4 or 8: quantised weights
    nested: bool = False  # quantised quantisation constants
    dtype: str = "float32"  # of the loaded weights
    half: bool = True  # bf16 or fp16: half-precision computation
    checkpointing: bool = True
    precomputed: bool = False
    optim: str = "adamw_torch_fused"
    engine: str = "single"  # or "ddp", "deepspeed", "fsdp"
    stage: int = 0  # of ZeRO
    offload_optimizer: bool = False
    offload_param: bool = False
    gpus: int = 1
    device: str = "cuda"  # on "cpu", the fused head makes more copies of its tiles

    @property
    def wdpo(self) -> bool:
        return "wdpo" in self.losses and self.wdpo_penalised

    @property
    def rows(self) -> int:
        """Sequences of the forward that training goes through."""
        return self.batch * (2 if self.paired else 1) * (2 if self.wdpo else 1)

    @property
    def weight_bytes(self) -> int:
        """Of an unquantised weight: DeepSpeed casts the model to the half-precision type it trains in."""
        if self.dtype != "float32" or (self.engine == "deepspeed" and self.half):
            return 2
        return 4

    @property
    def compute_bytes(self) -> int:
        return 2 if self.half else self.weight_bytes

    @property
    def shards(self) -> int:
        """Processes that share the weights."""
        return self.gpus if self.engine == "fsdp" or self.stage == 3 else 1

    def describe(self) -> str:
        """The run in words, in the order of a recipe."""
        what = f"{'Q' if self.bits < 16 else ''}LoRA" if self.lora else "full fine-tuning"
        where = f"{self.gpus} GPU{'s' * (self.gpus > 1)}"
        engine = {"single": "", "ddp": ", data parallel", "fsdp": ", FSDP2", "deepspeed": f", ZeRO-{self.stage}"}
        offload = ", offloaded" if self.offload_optimizer or self.offload_param else ""
        unit = "pairs" if self.paired else "completions"
        checkpointing = f"{'with' if self.checkpointing else 'without'} activation checkpointing"
        return (
            f"{what}, {'+'.join(self.losses)}, {where}{engine[self.engine]}{offload}; "
            f"micro-batch of {self.batch} {unit}, {self.length} tokens, {checkpointing}"
        )


# What is there from the first step to the last


def weights(shape: Shape, run: Run) -> float:
    return _model(shape, run) / (run.shards if not run.offload_param else float("inf")) + _constants(shape, run)


def _model(shape: Shape, run: Run) -> float:
    """All of a model's weights, with the adapters."""
    adapter = shape.adapter * adapter_bytes(run) if run.lora else 0
    quantised = shape.linear * run.bits / 8 if run.bits < 16 else shape.linear * run.weight_bytes
    return quantised + (shape.parameters - shape.linear) * run.weight_bytes + adapter


def _constants(shape: Shape, run: Run) -> float:
    """The scales of 4-bit blocks: 64 weights share one, in fp32, or nested in 8 bits. ZeRO does not shard them."""
    if run.bits == 4:
        return shape.linear / 64 * (1 + 4 / 256 if run.nested else 4)
    return shape.linear / shape.hidden * 4 if run.bits == 8 else 0


def adapter_bytes(run: Run) -> int:
    """Of a LoRA weight: PEFT makes it fp32, TRL bf16 for quantised models and for ZeRO-3."""
    return 2 if run.bits < 16 or (run.engine == "deepspeed" and run.half) else 4


def trainable(shape: Shape, run: Run) -> tuple[int, int]:
    """The number of trained parameters, and the bytes of each."""
    return (shape.adapter, adapter_bytes(run)) if run.lora else (shape.parameters, run.weight_bytes)


def reference(shape: Shape, run: Run) -> float:
    """A second copy of the model, unless it is the first one without its adapters or was asked beforehand."""
    return 0 if run.lora or run.precomputed else _model(shape, run) / run.shards


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
        total += min(_model(shape, run), (MAX_LIVE + shape.head) * run.weight_bytes)
    return total


# What comes and goes in a step


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
    attended = 4 * attention * compute + 4 * shape.heads + run.length * compute
    gated = 3 * shape.intermediate * compute + down
    return run.length * (norms + inputs + attended + gated)


def checkpoint_bytes(shape: Shape, run: Run) -> float:
    """The input of one decoder layer, per row: all that checkpointing keeps of it."""
    return run.length * shape.hidden * run.weight_bytes


def layer_gradients(shape: Shape, run: Run) -> float:
    """The largest gradients that are alive at once in the backward pass of a layer, per row."""
    sizes = 2 * shape.intermediate * run.compute_bytes + shape.hidden * run.weight_bytes
    if run.lora and adapter_bytes(run) != run.compute_bytes:  # PEFT casts the input to the type of the adapter
        sizes += shape.intermediate * run.weight_bytes
    return run.length * sizes


def head_tiles(shape: Shape, run: Run, backward: bool) -> float:
    """The fused LM head's buffer for a tile of logits, which has its full width also where the vocabulary is smaller.
    Triton works in place; elsewhere torch makes temporary fp32 copies of the tile, and a boolean one."""
    tokens = min(run.rows * (run.length - 1), HEAD_TOKENS)
    copies = 0 if run.device == "cuda" else (7.25 if backward else 3.25)
    return tokens * (HEAD_VOCAB * run.compute_bytes + min(shape.vocab, HEAD_VOCAB) * 4 * copies)


def moments(shape: Shape, run: Run) -> Iterator[tuple[str, dict[str, float]]]:
    """The moments of a step in which memory can peak, with what comes on top of the persistent tensors."""
    rows, layers = run.rows, shape.layers
    tokens = rows * run.length
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
    extra = 3 * 4 * tokens / 2 * shape.hidden if run.wdpo else 0  # the direction v and the shifts +hv, -hv

    grads = gradients(shape, run)
    # The first micro-batch of a step finds no gradients, and its backward pass makes them one by one
    waiting = grads if run.accumulation > 1 or run.engine == "deepspeed" else 0
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


@dataclass(frozen=True)
class Estimate:
    """The bytes on each GPU at the peak, by what they are for."""

    parts: dict[str, float]
    peak: str  # the moment
    loading: float  # the peak while the model is loaded

    @property
    def total(self) -> float:
        return max(sum(self.parts.values()), self.loading)

    def cards(self) -> list[int]:
        """The cards of `CARDS` that it fits on with the reserve left free."""
        return [card for card, usable in CARDS.items() if self.total <= (1 - RESERVE) * usable * GIB]


def estimate(shape: Shape, run: Run) -> Estimate:
    """What each GPU holds at the peak of a training step."""
    persistent = {
        "weights": weights(shape, run),
        "reference": reference(shape, run),
        "optimiser": optimizer(shape, run),
        "communication": buffers(shape, run),
    }
    name, live = max(moments(shape, run), key=lambda item: sum(item[1].values()))
    overhead = CUDA_OVERHEAD if run.device == "cuda" else 0
    # ZeRO shards unquantised models while they load, quantised ones afterwards; ZeRO-1 and 2 never do
    loading = _model(shape, run) + _constants(shape, run) + overhead if run.bits < 16 else 0
    return Estimate({**persistent, **live, "overhead": overhead}, name, loading)


# What would help


def knobs(run: Run) -> Iterator[tuple[str, Run]]:
    """Each setting that would save memory, and the run with it."""
    if not run.checkpointing:
        yield "activation_checkpointing: true", replace(run, checkpointing=True)
    if not run.precomputed and not run.lora:
        yield "precompute_ref_log_probs: true", replace(run, precomputed=True)
    if run.batch > 1:
        half = run.batch // 2
        changed = replace(run, batch=half, accumulation=run.accumulation * 2)
        yield f"per_device_train_batch_size: {half}, gradient_accumulation_steps: {changed.accumulation}", changed
    yield f"max_length: {run.length // 2}", replace(run, length=run.length // 2)
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
