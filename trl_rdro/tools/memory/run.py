"""The settings of a run that memory depends on, and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """The settings of a run that memory depends on."""

    length: int  # tokens of a padded row
    batch: int  # pairs, or unpaired completions, of a micro-batch
    paired: bool = True
    losses: tuple[str, ...] = ("sigmoid",)
    wdpo_penalised: bool = True  # wdpo_rho > 0
    wdpo_one_sided: bool = False
    packed_tokens: int | None = None  # of a micro-batch's row without padding; None: padded rows
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
    def copies(self) -> int:
        """Of the batch, in the forward that training goes through."""
        return 2 if self.wdpo and not self.wdpo_one_sided else 1

    @property
    def rows(self) -> int:
        """Sequences of the forward that training goes through; a packed row is one."""
        return self.copies * (1 if self.packed_tokens else self.batch * (2 if self.paired else 1))

    @property
    def row_length(self) -> int:
        """Tokens of each of them."""
        return self.packed_tokens or self.length

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
        packed = f"packed in {self.packed_tokens} tokens" if self.packed_tokens else ""
        checkpointing = f"{'with' if self.checkpointing else 'without'} activation checkpointing"
        return (
            f"{what}, {'+'.join(self.losses)}, {where}{engine[self.engine]}{offload}; "
            f"micro-batch of {self.batch} {unit}, {packed or f'{self.length} tokens'}, {checkpointing}"
        )


def engine_of(accelerate: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """
    What the settings of an accelerate config say about sharding and offloading, as fields of `Run`.

    Raises:
        `ValueError`: for a DeepSpeed JSON file, which is not read, and for settings of another kind.
    """
    kind = accelerate.get("distributed_type")
    if kind == "FSDP":
        fsdp = _section(accelerate, "fsdp_config")
        return {"engine": "fsdp", "offload_param": bool(fsdp.get("fsdp_offload_params"))}
    if kind not in (None, "NO", "DEEPSPEED") and not str(kind).startswith("MULTI_"):
        raise ValueError(f"the accelerate config has distributed_type {kind!r}, which is not known here")
    if kind != "DEEPSPEED":
        return {"engine": "ddp" if gpus > 1 else "single"}
    deepspeed = _section(accelerate, "deepspeed_config")
    if "deepspeed_config_file" in deepspeed:
        raise ValueError("the accelerate config refers to a DeepSpeed JSON file, which is not read here")
    stage = deepspeed.get("zero_stage", 2)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"the accelerate config has zero_stage {stage!r}: it must be 0, 1, 2 or 3")
    return {
        "engine": "deepspeed",
        "stage": stage,
        "offload_optimizer": deepspeed.get("offload_optimizer_device", "none") != "none",
        "offload_param": deepspeed.get("offload_param_device", "none") != "none",
    }


def processes_of(accelerate: Mapping[str, Any]) -> int:
    """The processes that the settings of an accelerate config ask for. Raises `ValueError` for no whole number."""
    number = 1 if accelerate.get("distributed_type") == "NO" else accelerate.get("num_processes", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"the accelerate config has num_processes {number!r}: it must be a whole number >= 1")
    return number


def _section(accelerate: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = accelerate.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"the accelerate config has {name} {section!r}: it must be a mapping")
    return section


def run_of(
    args: Any, model_args: Any, dtype: str, gpus: int = 1, packed_tokens: int | None = None, **engine: Any
) -> Run:
    """
    The run that training arguments describe.

    Args:
        args: a `DPOConfig` or `KTOConfig` with a `max_length`.
        model_args: TRL's `ModelConfig`.
        dtype: of the weights as they are loaded.
        gpus: processes in all.
        packed_tokens: of the largest packed row, with `padding_free`. Without it, as if nothing were padding.
        engine: of `engine_of`.
    """
    paired = not hasattr(args, "desirable_weight")
    if args.padding_free and packed_tokens is None:
        packed_tokens = args.per_device_train_batch_size * args.max_length * (2 if paired else 1)
    return Run(
        length=args.max_length,
        batch=args.per_device_train_batch_size,
        paired=paired,
        losses=tuple([args.loss_type] if isinstance(args.loss_type, str) else args.loss_type),
        wdpo_penalised=getattr(args, "wdpo_rho", 0) > 0,
        wdpo_one_sided=getattr(args, "wdpo_difference", "central") == "one_sided",
        packed_tokens=packed_tokens,
        accumulation=args.gradient_accumulation_steps,
        lora=model_args.use_peft,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        nested=model_args.use_bnb_nested_quant,
        dtype=dtype,
        half=bool(args.bf16 or args.fp16),
        checkpointing=bool(args.activation_checkpointing or args.gradient_checkpointing),
        precomputed=args.precompute_ref_log_probs,
        optim=str(args.optim).split(".")[-1].lower(),
        gpus=gpus,
        **engine,
    )
