"""
Run what needs a GPU, and write down what came of it.

    python -m tests.distributed.gpu_check --output gpu_check.json            # every check
    python -m tests.distributed.gpu_check --only bf16 zero3 --losses rdro    # some

The engine tests run on a CPU. This runs the cells that they cannot reach: attention kernels, fp16, the 4-bit kernels,
DeepSpeed and FSDP2 over NCCL. A check trains a small model, built from a config, twice for three steps, once in a
plain way and once in its own, and compares losses, gradient norms and parameters as the engine tests do. Each run is a
process of its own, on the first GPU unless CUDA_VISIBLE_DEVICES says otherwise.

Where there is no GPU, a check runs on the CPU if it can; its status is "untested" all the same. The exit code is 1 if
a check failed.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
STEPS, PAIRS = 3, 8
LOSSES = {
    "rdro": {"loss_type": "rdro"},
    "kldpo": {"loss_type": "kldpo", "kldpo_tau": 0.05, "gradient_accumulation_steps": 2},
    "wdpo": {"loss_type": "wdpo", "wdpo_rho": 0.1},
}
PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "flash-attn")


@dataclass(frozen=True)
class Run:
    """How a model is trained."""

    attention: str = "sdpa"
    precision: str = "fp32"  # or "bf16", "fp16"
    model: str = "full"  # or "qlora"
    engine: str = "single"  # or "zero2", "zero3", "fsdp2"
    checkpointing: bool = False
    packed: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Check:
    """Two runs, or a kernel against a loop, and the largest relative difference allowed between them."""

    what: str
    run: Run | None
    baseline: Run | None
    tolerance: float
    on_cpu: bool = True  # whether it also runs without a GPU
    needs: list[str] = field(default_factory=list)  # packages


FP32, BF16 = 1e-3, 0.1
QLORA = Run(model="qlora")
CHECKS = {
    "cuda": Check("fp32 on the GPU against the CPU", Run(), Run(device="cpu"), FP32, False),
    "sdpa": Check("SDPA attention against eager attention", Run(), Run("eager"), FP32),
    "bf16": Check("bf16 mixed precision against fp32", Run(precision="bf16"), Run(), BF16),
    "fp16": Check("fp16 mixed precision with loss scaling against fp32", Run(precision="fp16"), Run(), BF16, False),
    "flash_attention_2": Check(
        "FlashAttention 2 against SDPA, both bf16",
        Run("flash_attention_2", "bf16"),
        Run(precision="bf16"),
        BF16,
        False,
        ["flash_attn"],
    ),
    "varlen_attn": Check("PyTorch's `varlen_attn` as packed rows call it, against a loop", None, None, 2e-2, False),
    "packed": Check("packed rows and shared prompts in fp32 against padded ones", Run(packed=True), Run(), FP32),
    "packed_bf16": Check(
        "packed rows by `varlen_attn` in bf16 against padded ones",
        Run(precision="bf16", packed=True),
        Run(precision="bf16"),
        BF16,
        False,
    ),
    "packed_flash_attention_2": Check(
        "packed rows by FlashAttention 2 against padded ones",
        Run("flash_attention_2", "bf16", packed=True),
        Run("flash_attention_2", "bf16"),
        BF16,
        False,
        ["flash_attn"],
    ),
    "qlora": Check(
        "QLoRA NF4 with the CUDA kernels against the CPU's", QLORA, Run(model="qlora", device="cpu"), FP32, False
    ),
    "qlora_checkpointing": Check(
        "QLoRA NF4 with gradient checkpointing", Run(model="qlora", checkpointing=True), QLORA, FP32
    ),
    "zero2": Check("DeepSpeed ZeRO-2 over NCCL", Run(engine="zero2"), Run(), FP32, False, ["deepspeed"]),
    "zero3": Check("DeepSpeed ZeRO-3 over NCCL", Run(engine="zero3"), Run(), FP32, False, ["deepspeed"]),
    "zero3_bf16": Check(
        "DeepSpeed ZeRO-3 over NCCL in bf16", Run(precision="bf16", engine="zero3"), Run(), BF16, False, ["deepspeed"]
    ),
    "zero3_qlora": Check(
        "QLoRA NF4 under ZeRO-3 over NCCL", Run(model="qlora", engine="zero3"), QLORA, FP32, False, ["deepspeed"]
    ),
    "fsdp2": Check("FSDP2 over NCCL", Run(engine="fsdp2"), Run(), FP32, False),
    "fsdp2_bf16": Check("FSDP2 over NCCL in bf16", Run(precision="bf16", engine="fsdp2"), Run(), BF16, False),
}


# One run, in a process of its own


def train(run: Run, loss: str, output: Path) -> None:
    """Train and save the result to `output`."""
    import torch
    from accelerate.utils import set_seed
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from trl_rdro import DPOConfig, DPOTrainer

    from ..tiny import save_tiny, tiny_preferences
    from .worker import deepspeed_config, trainable

    torch.backends.cuda.matmul.allow_tf32 = False
    size = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "initializer_range": 0.05}
    kwargs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "use_cpu": run.device == "cpu",
            "bf16": run.precision == "bf16",
            "fp16": run.precision == "fp16",
            "activation_checkpointing": run.checkpointing,
            "padding_free": run.packed,
            "per_device_train_batch_size": PAIRS // LOSSES[loss].get("gradient_accumulation_steps", 1),
            "max_steps": STEPS,
            "optim": "sgd",
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "model_init_kwargs": {"attn_implementation": run.attention, "dtype": "float32"},
            **LOSSES[loss],
        }
        if run.engine.startswith("zero"):
            settings["deepspeed"] = deepspeed_config(int(run.engine[-1]), run.precision == "bf16")
        if run.engine == "fsdp2":
            layers = {"version": 2, "transformer_layer_cls_to_wrap": "Qwen2DecoderLayer"}
            settings |= {"fsdp": True, "fsdp_config": layers}
        args = DPOConfig(**settings)
        model = save_tiny(Path(folder) / "policy", seed=1, **size)
        reference = save_tiny(Path(folder) / "reference", seed=0, **size)
        if run.model == "qlora":
            set_seed(0)
            kwargs["peft_config"] = LoraConfig(
                r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
            )
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
            )
        else:
            kwargs["ref_model"] = AutoModelForCausalLM.from_pretrained(
                reference, attn_implementation=run.attention, dtype="float32"
            )
        trainer = DPOTrainer(model, args=args, train_dataset=tiny_preferences(STEPS * PAIRS), **kwargs)
        for parameter in trainer.model.parameters():  # TRL makes adapters of 4-bit models bf16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        before = {name: value.cpu() for name, value in trainable(trainer).items()}
        trainer.train()
        after = {name: value.cpu() for name, value in trainable(trainer).items()}
        logs = [log for log in trainer.state.log_history if "loss" in log]
        result = {key: [log[key] for log in logs] for key in ("loss", "grad_norm")}
        torch.save({**result, "before": before, "after": after}, output)


def train_apart(run: Run, loss: str, output: Path) -> None:
    """`train` in a process of its own. Raises `RuntimeError` with the end of what a failing one said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ)
    if run.engine != "single":
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1"}
        environment |= {"RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "tests.distributed.gpu_check", "--run", json.dumps(asdict(run))]
    command += ["--losses", loss, "--output", str(output)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if not output.exists():
        raise RuntimeError(finished.stderr.strip()[-1500:])


def varlen_errors() -> dict[str, float]:
    """Relative errors of `varlen_attn` where queries are fewer than keys, heads are grouped and windows slide: of the
    output and of the three gradients, in bf16 against a loop in fp32."""
    import torch

    from tests.packing.batches import PAIRS, padded
    from trl_rdro.packing import attention
    from trl_rdro.packing.layout import make_layout

    batch = {name: value.cuda() for name, value in padded(PAIRS).items()}
    found: dict[str, float] = {}
    for share in (False, True):
        layout = make_layout(**batch, share=share)
        queries, keys = sum(layout.query_lengths), sum(layout.key_lengths)
        torch.manual_seed(0)
        states = [torch.randn(1, h, n, 64, device="cuda") for h, n in ((8, queries), (2, keys), (2, keys))]
        weights = torch.randn(1, queries, 8, 64, device="cuda")
        for window in (None, 5):
            results = []
            for compute, dtype in ((attention._varlen, torch.bfloat16), (attention._loop, torch.float32)):
                inputs = [state.bfloat16().to(dtype).requires_grad_() for state in states]
                out = compute(*inputs, layout, 0.1, window)
                results.append([out, *torch.autograd.grad((out.float() * weights).sum(), inputs)])
            for name, value, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
                key = f"{name}, {'shared' if share else 'packed'}, window {window}"
                found[key] = ((value.float() - expected).norm() / expected.norm()).item()
    return found


# All checks


def without_cuda(run: Run) -> Run:
    return Run(**{**asdict(run), "device": "cpu"})


def carry_out(check: Check, losses: list[str], cuda: bool, folder: Path) -> dict[str, Any]:
    """The status of a check, with the errors of each loss."""
    import torch

    from .matrix import errors

    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"status": "untested", "reason": f"{' and '.join(missing)} not installed"}
    if not cuda and not check.on_cpu:
        return {"status": "untested", "reason": "needs a GPU"}
    found, failure = {}, None
    if check.run is None:
        losses, found = [], {"kernel": varlen_errors()}
    for loss in losses:
        results = []
        try:
            for run in (check.run, check.baseline):
                run = run if cuda else without_cuda(run)
                path = folder / f"{loss}-{'-'.join(str(value) for value in asdict(run).values())}.pt"
                if not path.exists():
                    train_apart(run, loss, path)
                results.append(torch.load(path))
            found[loss] = errors(*results)
        except RuntimeError as error:
            failure = f"{loss}: {error}"
            break
    passed = failure is None and all(e <= check.tolerance for of_loss in found.values() for e in of_loss.values())
    outcome = {"status": "passed" if passed else "failed", "tolerance": check.tolerance, "errors": found}
    outcome |= {"reason": failure} if failure else {}
    return outcome if cuda else {"status": "untested", "reason": "no GPU", "on_cpu": outcome}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        train(Run(**args.run), args.losses[0], args.output)
        return 0

    # Of several GPUs one, or the Trainer multiplies the batch. Before CUDA is initialised, and for the processes below
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import torch

    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {package: version(package) for package in ("trl-rdro", *PACKAGES)},
        "checks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            outcome = carry_out(CHECKS[name], args.losses, cuda, Path(folder))
            report["checks"][name] = {"what": CHECKS[name].what, **outcome}
            print(f"{name}: {outcome['status']}{' (' + outcome['reason'] + ')' if 'reason' in outcome else ''}")
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    outcomes = [check.get("on_cpu", check) for check in report["checks"].values()]
    return int(any(outcome["status"] == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
