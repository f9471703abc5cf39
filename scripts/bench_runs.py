"""
What `scripts/bench.py` measures: trainers of ours and of stock TRL on the same model, data and settings.

`alternate` times the steps of several trainers in turn, `peak_bytes` the tensors that one holds at its peak. Models
are built from configs with random weights, data are random letters of one token each and fill every row to its length,
so nothing is downloaded and every step does the same work.
"""

import gc
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_lengths import grouped, pair_lengths  # noqa: E402

import trl_rdro  # noqa: E402
from trl_rdro.compat import trl as trl_compat  # noqa: E402
from trl_rdro.tools.profiling import profiled_peak  # noqa: E402
from trl_rdro.trainers.input_gradient import hooked  # noqa: E402


CUDA = torch.cuda.is_available()
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WDPO_RHO = 0.01


@dataclass(frozen=True)
class Run:
    """One trainer. Everything but `library` and `loss` is the same in a fair comparison."""

    library: str = "trl"  # or "trl_rdro", or "exact": WDPO by double backward
    loss: str = "sigmoid"
    paired: bool = True
    model: str | dict = field(default_factory=dict)  # a directory, a config.json, or the fields of a tiny Qwen2
    length: int = 128
    batch: int = 4  # pairs, or completions
    accumulation: int = 1
    method: str = "full"  # or "lora", "qlora"
    precomputed: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"
    lengths: str = ""  # a corpus of `bench_lengths.py`; or every row is filled
    grouped: bool = False  # its pairs are in order of length
    settings: tuple[tuple[str, Any], ...] = ()  # more fields of the config

    @property
    def name(self) -> str:
        extra = "".join(f" {key.removeprefix('wdpo_')} {value}" for key, value in self.settings)
        return f"{self.loss}{extra}" + {"trl": "", "trl_rdro": "", "exact": ", double backward"}[self.library]

    @property
    def setting(self) -> str:
        rows = f"{self.batch} {'pairs' if self.paired else 'completions'} x {self.length} tokens"
        if self.lengths:
            rows = f"{self.lengths}, {self.batch} at a time, at most {self.length} tokens"
        more = [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        more += ["reference precomputed"] * self.precomputed + ["checkpointing"] * self.checkpointing
        return ", ".join([f"{self.method} {model_name(self.model)}", rows, *more])


def model_name(model: str | dict) -> str:
    if isinstance(model, dict):
        return f"Qwen2 {model['num_hidden_layers']} x {model['hidden_size']}, vocabulary {model['vocab_size']}"
    return Path(model).parent.name if model.endswith(".json") else Path(model).name


# Building


def build_model(run: Run) -> torch.nn.Module:
    dtype = torch.bfloat16 if CUDA else torch.float32
    if isinstance(run.model, dict):
        fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, **run.model}
        config = Qwen2Config(**{"tie_word_embeddings": False, **fields}, attn_implementation=run.attention)
        if run.method == "qlora":
            return quantised(config)
        with torch.device("cuda" if CUDA else "cpu"), torch.random.fork_rng():
            torch.manual_seed(0)  # the same weights for all that are compared
            return Qwen2ForCausalLM(config).to(dtype)
    if not run.model.endswith(".json"):
        return AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype, attn_implementation=run.attention)
    config = AutoConfig.from_pretrained(run.model)
    config._attn_implementation = run.attention
    if run.method == "qlora":
        return quantised(config)
    with torch.device("cuda" if CUDA else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def quantised(config: Any) -> torch.nn.Module:
    """A 4-bit model with random weights, those of one layer for all: billions of random numbers take minutes."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    weights, made = {}, {}
    for name, value in empty.state_dict().items():
        key = name.rpartition(".layers.")[2].partition(".")[2] or name
        if key not in made:
            made[key] = torch.randn(value.shape, dtype=torch.bfloat16) * config.initializer_range
            if key.endswith("norm.weight"):
                made[key] = torch.ones(value.shape, dtype=torch.bfloat16)
        weights[name] = made[key]
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return type(empty).from_pretrained(
        None, config=config, state_dict=weights, quantization_config=four_bit, dtype=torch.bfloat16
    )


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of a text."""
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def text_data(run: Run, rows: int) -> Dataset:
    """Prompts of a quarter of the length; completions that fill the rest, and more, which TRL cuts off."""
    generator = random.Random(0)

    def letters(n: int) -> str:
        return "".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=n))

    prompts = [letters(run.length // 4) for _ in range(rows)]
    if run.lengths:
        found = (
            grouped(run.lengths, rows, run.length, run.batch)
            if run.grouped
            else pair_lengths(run.lengths, rows, run.length)
        )
        names = ("prompt", "chosen", "rejected")
        return Dataset.from_list([dict(zip(names, map(letters, pair), strict=True)) for pair in found])
    if run.paired:
        return Dataset.from_list(
            [{"prompt": prompt, "chosen": letters(run.length), "rejected": letters(run.length)} for prompt in prompts]
        )
    return Dataset.from_list(
        [
            {"prompt": prompt, "completion": letters(run.length), "label": i % 2 == 0}
            for i, prompt in enumerate(prompts)
        ]
    )


def build_trainer(run: Run, steps: int, folder: str, rows: int | None = None) -> Any:
    """A trainer whose `train()` makes `steps` optimiser steps."""
    library = trl_rdro if run.library == "trl_rdro" else trl
    kind = "DPO" if run.paired else "KTO"
    trainer_class = ExactWDPO if run.library == "exact" else getattr(library, f"{kind}Trainer")
    args = getattr(library, f"{kind}Config")(
        output_dir=folder,
        use_cpu=not CUDA,
        bf16=CUDA,
        loss_type="sigmoid" if run.library == "exact" else run.loss,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        max_steps=steps,
        max_length=run.length,
        learning_rate=1e-6,
        precompute_ref_log_probs=run.precomputed,
        activation_checkpointing=run.checkpointing,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **dict(run.settings),
    )
    kwargs = {}
    if run.method != "full":
        from peft import LoraConfig

        kwargs["peft_config"] = LoraConfig(**LORA)
    model = build_model(run)
    if run.method == "full" and not run.precomputed:
        kwargs["ref_model"] = build_model(run)
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=text_data(run, steps * run.batch * run.accumulation if rows is None else rows),
        processing_class=letter_tokenizer(),
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class ExactWDPO(trl.DPOTrainer):
    """WDPO as its authors ran it: plain logits, and the penalty's gradient by a second backward through the first.
    For comparison only; it needs eager attention."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ref_logps = trl_compat.pair_reference_logps(self, inputs)
        embedded = []

        def capture(output):
            embedded.append(output if output.requires_grad else output.requires_grad_())
            return embedded[0]

        with hooked(trl_compat.input_embeddings(self), capture):
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        targets, mask = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]
        log_probs = logits[:, :-1].float().log_softmax(dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
        chosen, rejected = ((log_probs * mask).sum(dim=1) - ref_logps).chunk(2)
        losses = -F.logsigmoid(self.beta * (chosen - rejected))
        (gradient,) = torch.autograd.grad(losses.sum(), embedded[0], create_graph=True)
        return losses.mean() + WDPO_RHO * gradient.float().square().sum() / len(losses)


# Measuring


def now() -> float:
    """Without a GPU, processor time: what else the machine does is not in it."""
    return time.perf_counter() if CUDA else time.process_time()


class Clock(TrainerCallback):
    """When each optimiser step ended. What comes before a step's forward, fetching batches included, is in it."""

    def on_train_begin(self, *args, **kwargs):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(now())

    @property
    def durations(self) -> list[float]:
        """Of all steps but the first, which is warm-up."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


@contextmanager
def quiet() -> Iterator[str]:
    """A folder for output, and no progress bars or warnings: they are those of both libraries."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def alternate(runs: list[Run], rounds: int, steps: int) -> list[list[list[float]]]:
    """Seconds per optimiser step, by run and round. The runs take turns, `steps` steps each after one that is not
    counted; the first round is warm-up; the order is turned round from round to round."""
    with quiet() as folder:
        trainers, clocks = [], []
        for run in runs:
            trainers.append(build_trainer(run, steps + 1, folder))
            clocks.append(Clock())
            trainers[-1].add_callback(clocks[-1])
        gc.collect()
        gc.freeze()  # `train` collects garbage on its way out: not what the trainers above hold for good
        times: list[list[list[float]]] = [[] for _ in runs]
        for round_ in range(rounds + 1):
            order = range(len(runs)) if round_ % 2 else reversed(range(len(runs)))
            for i in order:
                trainers[i].train()
                if round_:
                    times[i].append(clocks[i].durations)
        gc.unfreeze()
        del trainers, clocks
    return times


def peak_bytes(run: Run, steps: int = 2) -> int:
    """The most bytes of tensors alive at once in training, model and optimiser included."""
    with quiet() as folder:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            build_trainer(run, steps, folder).train()
            return torch.cuda.max_memory_allocated() - before
        # Every allocation of a tensor, as the profiler sees it: the size of a process says less, since allocators keep
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer = build_trainer(run, steps, folder)
            with record_function("training"):
                trainer.train()
        return profiled_peak(profiler)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU's memory was too small. PyTorch's allocator has an exception for that, cuBLAS, cuDNN and Triton
    say it in a message; cuBLAS that finds no room for itself calls itself not initialised."""
    words = ("out of memory", "STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in words)


def largest_batch(run: Run, most: int = 512) -> int:
    """The largest power of two of pairs that a step fits on the GPU with, 0 if not one does."""
    fits = 0
    while fits < most:
        try:
            peak_bytes(replace(run, batch=max(2 * fits, 1)), steps=1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        fits = max(2 * fits, 1)
    return fits


def alternate_calls(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call, by call, taken in turn; the first round is warm-up."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if round_:
                times[i].append(time.perf_counter() - start)
    return times
