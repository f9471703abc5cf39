"""
Trains the cells it is given, one after another, and writes what came of each.

    accelerate launch ... tests/distributed/worker.py ENGINE INPUTS OUTPUT

`main` does it in a process that the tests have started.

An engine is a state of the whole process, and starting it takes longer than training a cell, so one launch runs all
the cells in OUTPUT/cells.json. OUTPUT gets one `<cell>.pt` for each, with losses, gradient norms and the trainable
parameters before and after; or, for a cell that fails, `<cell>.rank<n>.err` with the traceback.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tests.conftest  # noqa: E402, F401, I001  (before torch: threads, no hub)

import torch  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from tests.distributed.matrix import ENGINES, STEP_SIZE, Cell  # noqa: E402
from tests.tiny import cpu_args  # noqa: E402
from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # noqa: E402


RANK = int(os.environ.get("RANK", 0))
# Looked up now, because transformers sets it too
CONFIGURED_BY_ACCELERATE = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
# Tiny models are below the thresholds from which on ZeRO-3 shards
ALWAYS_SHARD = dict.fromkeys(
    ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_max_live_parameters"), 0
)


def deepspeed_config(stage: int, bf16: bool) -> dict[str, Any]:
    zero = {"stage": stage, **(ALWAYS_SHARD if stage == 3 else {})}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": zero,
        **dict.fromkeys(sizes, "auto"),
        "bf16": {"enabled": bf16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def build_args(cell: Cell, engine: str, inputs: Path, output: Path) -> DPOConfig | KTOConfig:
    accumulation = cell.accumulation
    if engine == "single" and ("sft" in cell.loss or cell.noise):
        # TRL's `sft` divides by the tokens of a micro-batch, and masks are drawn for one: the baseline has the
        # micro-batches of two ranks
        accumulation *= 2
    settings = cpu_args(
        output_dir=str(output / "trainer"),
        per_device_train_batch_size=cell.micro_batch or STEP_SIZE // ENGINES[engine] // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=cell.steps,
        optim="sgd",
        # Steps that change the losses visibly, but not so much that rounding grows from step to step
        learning_rate=1.0 if cell.steps == 1 else 0.01 if cell.dtype == "bf16" else 0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        activation_checkpointing=cell.checkpointing,
        precompute_ref_log_probs=cell.precomputed,
        bf16=cell.dtype == "bf16",
        padding_free=cell.packed,
        disable_dropout=not cell.noise,
        **cell.settings,
    )
    if cell.noise and cell.model == "full":
        settings["model_init_kwargs"] = {"dtype": "float32", "attention_dropout": 0.2}
    if cell.loss == "mrpo":
        settings["mrpo_reference"] = str(inputs / "policy" / "qwen2")
    if engine.startswith("zero") and not CONFIGURED_BY_ACCELERATE:
        settings["deepspeed"] = deepspeed_config(int(engine[-1]), cell.dtype == "bf16")
    if engine == "fsdp2":
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "Qwen2DecoderLayer"}}
    args = (KTOConfig if cell.unpaired else DPOConfig)(**settings)
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute of compiling otherwise
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        if CONFIGURED_BY_ACCELERATE:
            for config in (args.deepspeed_plugin.deepspeed_config, args.deepspeed_plugin.dschf.config):
                config["zero_optimization"] |= ALWAYS_SHARD
    if engine == "fsdp2":
        # Without a GPU accelerate says "multi CPU" here, and would prepare the model for DDP
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def build_trainer(cell: Cell, engine: str, inputs: Path, output: Path) -> DPOTrainer | KTOTrainer:
    args = build_args(cell, engine, inputs, output)
    kwargs: dict[str, Any] = {}
    if cell.model != "full":
        kwargs["peft_config"] = LoraConfig(
            r=4,
            lora_dropout=0.3 if cell.noise else 0.0,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
    elif not cell.precomputed:
        # Not the policy's start, so that losses differ from pair to pair. Precomputing takes TRL's way, that start.
        kwargs["ref_model"] = AutoModelForCausalLM.from_pretrained(inputs / "reference" / "qwen2", dtype="float32")
    if cell.model == "qlora":
        compute_dtype = "float32" if cell.dtype == "fp32" else "bfloat16"
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    rows = str(inputs / f"{cell.data}.jsonl")
    # Data sets cached by another launch would hide what this one computes beforehand
    data = load_dataset("json", data_files=rows, split="train", cache_dir=str(output / "cache"))
    if cell.steps == 1:
        data = data.select(range(STEP_SIZE))
    trainer_class = KTOTrainer if cell.unpaired else DPOTrainer
    trainer = trainer_class(str(inputs / "policy" / "qwen2"), args=args, train_dataset=data, **kwargs)
    if cell.model != "full":
        # Under DeepSpeed the adapters of 4-bit models are bf16, whose rounding would hide differences of up to a
        # tenth. And in bf16 cells all engines are to start from the same adapters, also those that round them.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and cell.dtype == "bf16":
                parameter.data = parameter.data.bfloat16().to(parameter.dtype)
            elif parameter.requires_grad:
                parameter.data = parameter.data.float()
    if cell.noise:
        draw_masks_by_content(trainer)
    return trainer


def draw_masks_by_content(trainer: DPOTrainer | KTOTrainer) -> None:
    """Let a micro-batch's masks depend on its samples alone, and not on the rank or on what was drawn before."""
    prepare = trainer._prepare_inputs

    def prepare_and_seed(inputs):
        torch.manual_seed(inputs["input_ids"].sum().item())
        return prepare(inputs)

    trainer._prepare_inputs = prepare_and_seed


def trainable(trainer: DPOTrainer | KTOTrainer) -> dict[str, torch.Tensor]:
    """The trainable parameters, whole, in fp32."""
    return {
        name.removeprefix("module."): whole(parameter).float().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if hasattr(parameter, "ds_id"):  # not yet in an optimizer
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def check_engine(trainer: DPOTrainer | KTOTrainer, cell: Cell, engine: str) -> None:
    """That what was to be tested really was at work, and not something else that gives the same numbers."""
    state = trainer.accelerator.state
    expected = {"single": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    assert state.distributed_type == expected, f"{engine} became {state.distributed_type}"
    assert state.num_processes == ENGINES[engine], f"{state.num_processes} processes, not {ENGINES[engine]}"
    assert trainer.model.is_gradient_checkpointing == cell.checkpointing
    assert (trainer.stand_in(trainer.model) is not trainer.model) == cell.packed
    embedding = trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings().weight
    if engine == "zero2":
        assert state.deepspeed_plugin.zero_stage == 2
    if engine == "zero3":
        assert embedding.numel() == 0 < embedding.ds_numel, "the embedding is not sharded"
    if engine == "fsdp2":
        assert embedding.to_local().numel() < embedding.numel(), "the embedding is not sharded"


def run(cell: Cell, engine: str, inputs: Path, output: Path) -> None:
    trainer = build_trainer(cell, engine, inputs, output)
    before = trainable(trainer)
    trainer.train()
    check_engine(trainer, cell, engine)
    after = trainable(trainer)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result = {key: [log[key] for log in logs] for key in ("loss", "grad_norm")}
    if RANK == 0:
        torch.save({**result, "before": before, "after": after, "logs": logs}, output / f"{cell.name}.pt")


def main(engine: str, inputs: str, output: str) -> None:
    folder = Path(output)
    try:
        for fields in json.loads((folder / "cells.json").read_text()):
            cell = Cell(**fields)
            try:
                run(cell, engine, Path(inputs), folder)
            except Exception:
                (folder / f"{cell.name}.rank{RANK}.err").write_text(traceback.format_exc())
            gc.freeze()  # `Trainer.train` collects garbage, and would look again at everything imported on the way
        (folder / f"done.{RANK}").touch()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # taking down process groups aborts now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
