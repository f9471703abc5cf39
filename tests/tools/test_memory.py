"""
The memory estimate against what training allocates.

Each cell of `CELLS` trains two steps on a CPU under torch's profiler, which sees every allocation of a tensor, and
compares the peak in training with the estimate for the same run. The cells cover the moments of a step in which memory
can peak, each loss that has a batch of its own size, full fine-tuning, LoRA and QLoRA, and both precisions.
docs/estimate.md has the figures; `pytest tests/tools/test_memory.py -s` prints them.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.cli import main
from trl_rdro.tools.memory import GIB, Run, engine_of, estimate, knobs, processes_of, read_shape, savings
from trl_rdro.tools.profiling import profiled_peak

from ..tiny import cpu_args, save_tiny, tiny_qwen2, tiny_tokenizer


CONFIGS = Path(__file__).parents[1] / "fixtures" / "model_configs"
RECIPES = Path(__file__).parents[2] / "recipes"
TOLERANCE = 0.05  # promised: 15 %

NARROW = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4)  # the LM head dominates
WIDE = dict(hidden_size=256, intermediate_size=8192, num_hidden_layers=2)  # the layers do


def cpu_run(*args, **kwargs) -> Run:
    """In fp32 unless it says otherwise, which is what runs on a CPU unasked."""
    return Run(*args, **{"half": False, "device": "cpu", **kwargs})


# Model, Run, and the moment of the peak
CELLS = {
    "full": (dict(NARROW, vocab_size=4096), cpu_run(128, 2), "backward, LM head"),
    "full-accumulated": (dict(NARROW, vocab_size=4096), cpu_run(128, 1, accumulation=2), "backward, LM head"),
    "full-unchecked": (
        dict(NARROW, vocab_size=512),
        cpu_run(256, 2, checkpointing=False, precomputed=True),
        "backward, LM head",
    ),
    "full-wide": (dict(WIDE, vocab_size=512), cpu_run(64, 2, precomputed=True), "backward, first layer"),
    "full-wide-tied": (
        dict(WIDE, vocab_size=8192, tie_word_embeddings=True),
        cpu_run(32, 2, precomputed=True),
        "backward, first layer",
    ),
    "full-large": (dict(NARROW, vocab_size=32768), cpu_run(8, 1, precomputed=True), "backward, embedding"),
    "full-autocast": (
        dict(WIDE, vocab_size=512),
        cpu_run(64, 2, half=True, precomputed=True),
        "backward, first layer",
    ),
    "full-bfloat16": (
        dict(NARROW, vocab_size=512),
        cpu_run(128, 2, half=True, dtype="bfloat16", checkpointing=False, precomputed=True),
        "backward, LM head",
    ),
    "unpaired": (dict(NARROW, vocab_size=4096), cpu_run(128, 4, paired=False, losses=("rdro",)), "backward, LM head"),
    "kldpo": (
        dict(NARROW, vocab_size=2048),
        cpu_run(128, 2, losses=("kldpo",), accumulation=2),
        "backward, LM head",
    ),
    "wdpo": (
        dict(NARROW, vocab_size=512),
        cpu_run(128, 2, losses=("wdpo",), precomputed=True),
        "backward, LM head",
    ),
    "wdpo-one-sided": (
        dict(NARROW, vocab_size=512),
        cpu_run(128, 2, losses=("wdpo",), wdpo_one_sided=True, precomputed=True),
        "backward, LM head",
    ),
    # Two pairs of rows of 128 and 65 tokens, of which 31 are shared
    "full-wide-packed": (
        dict(WIDE, vocab_size=512),
        cpu_run(128, 2, packed_tokens=324, precomputed=True),
        "backward, first layer",
    ),
    "wdpo-lora-wide": (
        dict(WIDE, intermediate_size=16384, vocab_size=512),
        cpu_run(64, 1, losses=("wdpo",), lora=True, half=True),
        "backward, first layer",
    ),
    "lora": (dict(NARROW, vocab_size=2048), cpu_run(128, 2, lora=True, checkpointing=False), "backward, LM head"),
    "lora-wide": (
        dict(WIDE, vocab_size=512),
        cpu_run(128, 2, lora=True, half=True, dtype="bfloat16"),
        "backward, first layer",
    ),
    "lora-autocast-wide": (
        dict(WIDE, num_hidden_layers=3, vocab_size=512),
        cpu_run(64, 2, lora=True, half=True, checkpointing=False),
        "backward, last layer",
    ),
    "qlora-wide": (
        dict(WIDE, vocab_size=512),
        cpu_run(128, 2, lora=True, bits=4, nested=True, half=True, dtype="bfloat16"),
        "backward, first layer",
    ),
    "qlora-wide-rdro": (
        dict(WIDE, vocab_size=512),
        cpu_run(128, 2, losses=("rdro",), lora=True, bits=4, nested=True, half=True, dtype="bfloat16"),
        "backward, first layer",
    ),
}
LORA_R = 8


def rows(run: Run) -> Dataset:
    """Rows of exactly `run.length` tokens at most, and some shorter ones, so that there is padding."""
    prompt, completion = "#" * (run.length // 4), "#" * run.length  # one token each; TRL cuts what is too long
    n = 2 * run.batch * run.accumulation
    if run.paired:
        return Dataset.from_list([{"prompt": prompt, "chosen": completion, "rejected": prompt}] * n)
    return Dataset.from_list(
        [
            {"prompt": prompt, "completion": completion[: run.length // (1 + i % 2)], "label": i % 2 == 0}
            for i in range(n)
        ]
    )


def train(model: dict, run: Run, directory: str) -> None:
    settings = cpu_args(
        output_dir=directory,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        max_steps=2,
        loss_type=run.losses[0],
        max_length=run.length,
        precompute_ref_log_probs=run.precomputed,
        optim=run.optim,
    )
    settings |= {"activation_checkpointing": run.checkpointing, "bf16": run.half}
    settings |= {"padding_free": run.packed_tokens is not None}
    if run.wdpo_one_sided:
        settings |= {"wdpo_difference": "one_sided"}
    args = (DPOConfig if run.paired else KTOConfig)(**settings)
    kwargs = {}
    if run.lora:
        from peft import LoraConfig

        kwargs["peft_config"] = LoraConfig(r=LORA_R, target_modules="all-linear", task_type="CAUSAL_LM")
    model = {"initializer_range": 0.02, "num_attention_heads": 8, "num_key_value_heads": 4, **model}
    if run.bits == 4:
        from transformers import BitsAndBytesConfig

        policy = save_tiny(directory, **model)
        args.model_init_kwargs = {"dtype": run.dtype}
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=run.nested,
            bnb_4bit_compute_dtype=run.dtype,
        )
    else:
        policy = tiny_qwen2(dtype=getattr(torch, run.dtype), **model)
        if not run.lora and not run.precomputed:
            kwargs["ref_model"] = tiny_qwen2(dtype=getattr(torch, run.dtype), **model)
    trainer = (DPOTrainer if run.paired else KTOTrainer)(
        policy, args=args, train_dataset=rows(run), processing_class=tiny_tokenizer(), **kwargs
    )
    with record_function("training"):
        trainer.train()


def peak_bytes(action) -> int:
    """The most bytes of tensors alive at once in training, beyond those that were there before `action`.

    It builds the trainer first. On a CPU that can take more, as bitsandbytes quantises with plain torch there.
    """
    gc.collect()  # what an earlier trainer has left would be freed, and subtracted, in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    return profiled_peak(profiler)


def shape_of(model: dict, run: Run):
    config = tiny_qwen2(num_attention_heads=8, num_key_value_heads=4, **model).config
    return read_shape(config, "all-linear", LORA_R if run.lora else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_estimate_is_what_training_allocates(name, tmp_path, record_property):
    model, run, moment = CELLS[name]
    if run.bits == 4:
        pytest.importorskip("bitsandbytes")
    result = estimate(shape_of(model, run), run)
    measured = peak_bytes(lambda: train(model, run, str(tmp_path)))
    record_property("measured", measured)
    print(f"ESTIMATE {name} {measured / 2**20:.1f} {result.total / 2**20:.1f} {result.total / measured - 1:+.1%}")
    assert result.peak == moment
    assert result.total == pytest.approx(measured, rel=TOLERANCE)


# Counting


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-0.5B-Instruct", 0.494),
        ("Qwen2.5-7B-Instruct", 7.616),
        ("Qwen2.5-72B-Instruct", 72.706),
        ("Llama-3.2-1B-Instruct", 1.236),
        ("Llama-3.1-8B-Instruct", 8.030),
        ("Llama-3.1-70B-Instruct", 70.554),
    ],
)
def test_parameters_are_those_of_the_published_models(name, billions):
    shape = read_shape(AutoConfig.from_pretrained(CONFIGS / name))
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=6e-4)


def test_adapters_are_counted_as_peft_makes_them():
    from peft import LoraConfig, get_peft_model

    for targets in ("all-linear", None, ["q_proj", "down_proj"], r".*\.q_proj", r".*\.1\.mlp\.\w+_proj"):
        model = tiny_qwen2()
        shape = read_shape(model.config, targets, 4)
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        assert shape.adapter == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)


# What sharding and the knobs do


@pytest.fixture(scope="module")
def shape_8b():
    return read_shape(AutoConfig.from_pretrained(CONFIGS / "Llama-3.1-8B-Instruct"))


def test_zero_shares_what_it_says(shape_8b):
    """The sixteen bytes a parameter of mixed-precision Adam: 2 weights, 2 gradients, 12 optimiser."""
    n = shape_8b.parameters
    for stage, (weights, gradients, states) in {
        1: (2, 2, 12 / 8),
        2: (2, 2 / 8, 12 / 8),
        3: (2 / 8,) * 2 + (12 / 8,),
    }.items():
        run = Run(1024, 1, engine="deepspeed", stage=stage, gpus=8, precomputed=True)
        parts = estimate(shape_8b, run).parts
        assert parts["weights"] == pytest.approx(weights * n)
        assert parts["gradients"] == pytest.approx(gradients * n)
        assert parts["optimiser"] == pytest.approx(states * n)
        with_reference = estimate(shape_8b, replace(run, precomputed=False)).parts["reference"]
        assert with_reference == pytest.approx(weights * n)
        offloaded = estimate(shape_8b, replace(run, offload_optimizer=True)).parts["optimiser"]
        assert offloaded == 0


def test_knobs_save_and_are_sorted(shape_8b):
    run = Run(2048, 4, gpus=8, engine="ddp", checkpointing=False)
    saved = savings(shape_8b, run)
    assert {"activation_checkpointing: true", "--accelerate_config zero3"} <= {name for name, _ in saved}
    assert [size for _, size in saved] == sorted((size for _, size in saved), reverse=True)
    for _, changed in knobs(run):
        assert estimate(shape_8b, changed).total <= estimate(shape_8b, run).total


def test_wdpo_doubles_the_batch(shape_8b):
    run = Run(1024, 2, losses=("wdpo",), precomputed=True)
    dpo = replace(run, losses=("sigmoid",))
    assert run.rows == 2 * dpo.rows == 8
    assert estimate(shape_8b, run).total >= estimate(shape_8b, replace(dpo, batch=4)).total
    assert estimate(shape_8b, replace(run, wdpo_penalised=False)).total == estimate(shape_8b, dpo).total


def test_packed_rows_are_smaller_and_one_sided_steps_hold_one_batch(shape_8b):
    padded = Run(1024, 4, losses=("wdpo",), precomputed=True)
    packed = replace(padded, packed_tokens=5000)
    assert estimate(shape_8b, packed).total < estimate(shape_8b, padded).total
    assert (packed.rows, packed.row_length) == (2, 5000)
    one_sided = replace(padded, wdpo_one_sided=True)
    assert 2 * one_sided.rows == padded.rows == 16
    assert dict(knobs(padded))["wdpo_difference: one_sided"] == one_sided
    assert "wdpo_difference: one_sided" not in dict(knobs(one_sided))
    halved = next(changed for _, changed in knobs(packed) if changed.batch == 2)
    assert halved.packed_tokens == 2500


# The command


def run_command(capsys, *argv: str) -> str:
    assert main(["estimate", *argv]) == 0
    return capsys.readouterr().out


def test_command_reads_the_header_and_takes_options(capsys):
    argv = ["--config", str(RECIPES / "llama-3.1-8b" / "rdro_full.yaml")]
    argv += ["--model_name_or_path", str(CONFIGS / "Llama-3.1-8B-Instruct")]
    printed = run_command(capsys, *argv)
    assert "8 GPUs, ZeRO-3" in printed and "micro-batch of 4 completions" in printed and "optimiser" in printed
    as_json = json.loads(run_command(capsys, *argv, "--json"))
    assert as_json["fits"] == [card for card in (24, 40, 80, 141) if f"{card} GB yes" in printed]
    assert as_json["parameters"] == 8030261248
    more = json.loads(run_command(capsys, *argv, "--json", "--gpus", "16", "--per_device_train_batch_size", "2"))
    assert more["total_gib"] < as_json["total_gib"]
    packed = [*argv, "--json", "--padding_free", "true"]
    bound, known = (json.loads(run_command(capsys, *packed, *more)) for more in ([], ["--packed_tokens", "900"]))
    assert known["total_gib"] < bound["total_gib"] <= as_json["total_gib"] and "900 tokens" in known["run"]
    ddp = run_command(capsys, *argv, "--accelerate_config", "multi_gpu")
    assert "data parallel" in ddp


def test_command_refuses_in_a_sentence(capsys):
    config = str(RECIPES / "llama-3.1-8b" / "rdro_full.yaml")
    for argv, word in [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", config, "--gpus", "none"], "--gpus"),
        (["--config", config, "--gpus", "0"], "at least 1"),
        (["--config", config, "--accelerate_config", "zero9"], "zero9"),
        (["--config", config, "--model_name_or_path", "/nowhere"], "/nowhere"),
        (["--config", config, "--max_lenght", "3"], "max_length"),
        (["--config", config, "--packed_tokens", "0"], "at least 1"),
        (["--config", config, "--packed_tokens", "900"], "add --padding_free true"),
    ]:
        assert main(["estimate", *argv]) == 2
        assert word in capsys.readouterr().err


def test_figures_are_plausible(shape_8b):
    """Against what people know: full fine-tuning of 8B takes more than one 80 GB card, QLoRA fits a 24 GB one."""
    alone = Run(1024, 1, dtype="float32", precomputed=True)
    assert estimate(shape_8b, alone).total > 100 * GIB
    lora = read_shape(AutoConfig.from_pretrained(CONFIGS / "Llama-3.1-8B-Instruct"), "all-linear", 16)
    assert 24 in estimate(lora, Run(1024, 1, lora=True, bits=4, dtype="bfloat16")).cards()


# What a user can get wrong


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory):
    """Write a recipe for a tiny model, with a header before it."""
    directory = tmp_path_factory.mktemp("recipe")
    model = save_tiny(directory)

    def write(header: str = "") -> str:
        path = directory / "mine.yaml"
        path.write_text(f"{header}model_name_or_path: {model}\ndataset_name: any\nmax_length: 64\nbf16: false\n")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("# gpus: many\n", "gpus many: it must be a whole number >= 1"),
        ("# gpus: 0\n", "gpus 0"),
        ("# gpus: 1.5\n", "gpus 1.5"),
        ("# method: grpo\n", "method grpo: it must be dpo, kto or iterate"),
        ("# method: iterate\n", "a recipe of trl-rdro iterate"),
        ("# accelerate: zero9\n", "no accelerate config zero9"),
    ],
)
def test_bad_header(tiny_recipe, capsys, header, words):
    assert main(["estimate", "--config", tiny_recipe("# A recipe\n" + header)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora_target_modules", "no_proj"], "no linear layer is called no_proj"),
        (["--lora_target_modules", "q_proj", "no_proj"], "no linear layer is called no_proj"),
        (["--lora_target_modules", "q_proj"], r"write '.*\.q_proj'"),
        (["--lora_target_modules", "("], "no regular expression"),
        (["--lora_r", "0"], "lora_r"),
        (["--num_processes", "8"], "give --gpus"),
        (["--max_length", "none"], "max_length is not set"),
    ],
)
def test_bad_options(tiny_recipe, capsys, argv, words):
    assert main(["estimate", "--config", tiny_recipe(), "--use_peft", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"[1]", b"{}", b'{"model_type": "vit"}', b'{"model_type": "qwen2", "hidden_size": "x"}'],
    ids=["binary", "a list", "nothing", "no language model", "text for a number"],
)
def test_bad_model_config(tiny_recipe, tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    assert main(["estimate", "--config", tiny_recipe(), "--model_name_or_path", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "many"}}, "zero_stage 'many'"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "x.json"}}, "JSON file"),
        ({"distributed_type": "FSDP", "fsdp_config": [1]}, "fsdp_config"),
        ({"distributed_type": "NOPE"}, "NOPE"),
    ],
)
def test_bad_engine(settings, words):
    with pytest.raises(ValueError, match=words):
        engine_of(settings, 2)
    for number in ("two", 0, [2], True):
        with pytest.raises(ValueError, match="num_processes"):
            processes_of({"num_processes": number})
