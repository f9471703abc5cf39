"""Whole optimiser steps with packed rows against padded ones, through the trainers.

The bar is what stock TRL differs from itself under another padding width: five times that, in the same test.
"""

import functools
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, TrainerCallback

import trl_rdro
from trl_rdro import DPOConfig
from trl_rdro.configs.loss_names import TRL_DPO_LOSSES
from trl_rdro.losses.types import LOSS_TYPES

from ..packing.models import ARCHITECTURES
from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer, with_columns


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


@functools.cache
def pairs(count: int = 8) -> Dataset:
    """Pairs with prompts and completions of up to 25 sentences: of rows of a few tokens, whatever the padding, the
    operators are computed in the same order."""
    return Dataset.from_list(
        [
            {
                "prompt": " ".join([row["prompt"]] * (1 + 6 * (i % 3))),
                "chosen": row["chosen"] * (1 + 6 * (i % 5)),
                "rejected": row["rejected"] * (1 + 6 * (2 * i % 5)),
            }
            for i, row in enumerate(tiny_preferences(count))
        ]
    )


@functools.cache
def labelled(count: int = 8) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
            for i, row in enumerate(pairs(count))
        ]
    )


class Gradient(TrainerCallback):
    """The gradient with which the first optimiser step is made."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parts = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        self.value = torch.cat(parts).clone() if state.global_step == 0 else self.value


def make(kind: str, folder, model=None, stock: bool = False, data=None, trainer_kwargs=None, **settings) -> Any:
    library = trl if stock else trl_rdro
    args = getattr(library, f"{kind}Config")(
        **cpu_args(
            output_dir=str(folder),
            **{"per_device_train_batch_size": 4, "max_steps": 1, "max_grad_norm": 0.0, "logging_steps": 1, **settings},
        )
    )
    kwargs = {"processing_class": tiny_tokenizer(), **(trainer_kwargs or {})}
    data = data or (pairs() if kind == "DPO" else labelled())
    return getattr(library, f"{kind}Trainer")(
        tiny_qwen2() if model is None else model,
        args=args,
        train_dataset=with_columns(data, args.loss_type),
        **kwargs,
    )


def step(kind: str, folder, **kwargs) -> tuple[torch.Tensor, dict[str, float]]:
    trainer, gradient = make(kind, folder, **kwargs), Gradient()
    trainer.add_callback(gradient)
    trainer.train()
    log = trainer.state.log_history[0]
    return gradient.value, {key: value for key, value in log.items() if not key.startswith("throughput/")}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


BOTH = ({"share_prompt": False}, {"share_prompt": True})


def compare(kind: str, folder, stock: bool, make_model=None, layouts=BOTH, **settings) -> None:
    """Packed, and packed and shared, against padded; losses and metrics too."""

    def run(**more):
        kwargs = dict(settings)
        models = {} if make_model is None else make_model()
        kwargs["trainer_kwargs"] = {**kwargs.get("trainer_kwargs", {}), **models.get("trainer_kwargs", {})}
        return step(kind, folder, **{**kwargs, "model": models.get("model"), **more})

    expected, log = run(stock=stock)
    assert expected.norm() > 0
    noise = max(error(run(stock=stock, pad_to_multiple_of=160)[0], expected), torch.finfo(torch.float32).eps)
    wdpo = "wdpo" in settings.get("loss_type", "")
    bar = max(2 * log["wdpo/gap"], 1e-4) if wdpo else 5 * noise
    for sharing in layouts if kind == "DPO" else ({},):
        found, packed_log = run(padding_free=True, **sharing)
        assert error(found, expected) <= bar, f"{sharing}: {error(found, expected):.1e} against noise {noise:.1e}"
        assert packed_log.keys() == log.keys()
        # Means over the tokens of a micro-batch, so that they follow its composition
        by_composition = ("logits", "entropy", "mean_token") if "gradient_accumulation_steps" in settings else ()
        for name, value in log.items():
            if name != "wdpo/gap" and not name.startswith(by_composition):
                assert packed_log[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


def reference() -> dict[str, Any]:
    """Not the policy's start, so that no loss is at a constant."""
    return {"trainer_kwargs": {"ref_model": tiny_qwen2(seed=3)}}


# Losses see the rows' log-probabilities only: the layout that asks most stands for both


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", TRL_DPO_LOSSES)
def test_every_loss_of_trl(tmp_path, loss_type):
    smoothing = {"label_smoothing": 1e-3} if loss_type == "exo_pair" else {}
    compare("DPO", tmp_path, stock=True, make_model=reference, layouts=BOTH[1:], loss_type=loss_type, **smoothing)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_of_ours(tmp_path, loss_type):
    compare("DPO", tmp_path, stock=False, make_model=reference, layouts=BOTH[1:], loss_type=loss_type)


@pytest.mark.parametrize(
    "settings",
    [
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"max_length": 150},
        {"max_length": 150, "truncation_mode": "keep_end"},
        {"precompute_ref_log_probs": True},
        {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_options_of_trl(tmp_path, settings):
    compare("DPO", tmp_path, stock=True, make_model=reference, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["rdro", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": "kldpo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"loss_type": "rdro", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"loss_type": "wdpo", "wdpo_penalty": "rms"},
        {"loss_type": "wdpo", "wdpo_difference": "one_sided", "max_steps": 1},
        {"loss_type": "wdpo", "activation_checkpointing": True},
        {"loss_type": "wdpo", "precompute_ref_log_probs": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_options_of_ours(tmp_path, settings):
    compare("DPO", tmp_path, stock=False, make_model=reference, **settings)


def test_second_reference(tmp_path):
    """mrpo's own model is packed too."""
    settings = {"loss_type": "mrpo", "mrpo_reference": save_tiny(tmp_path, seed=5)}
    compare("DPO", tmp_path, stock=False, make_model=reference, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(tmp_path, name):
    def models():
        make_model = ARCHITECTURES[name]
        return {"model": make_model(), "trainer_kwargs": {"ref_model": make_model(seed=3)}}

    compare("DPO", tmp_path, stock=True, make_model=models)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        *[("lora", checkpointing) for checkpointing in (None, False, True)],
        *[("ref adapter", None), ("ref adapter", True)],
        *[("qlora", None), ("qlora", False)],
        ("prompted precompute", True),
    ],
)
def test_adapters(tmp_path, kind, checkpointing):
    """The reference is the base model with the adapter off, or a second adapter."""
    settings: dict[str, Any] = {}
    if checkpointing is not None:
        settings = {
            "activation_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    if kind == "prompted precompute":
        settings["precompute_ref_log_probs"] = True

    def models():
        torch.manual_seed(0)  # adapters are drawn
        if kind == "ref adapter":
            return {"model": get_peft_model(tiny_qwen2(), LORA)}
        if kind == "qlora":
            quantized = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
            )
            path = save_tiny(tmp_path / "saved")
            return {"model": path, "trainer_kwargs": {"peft_config": LORA, "quantization_config": quantized}}
        return {"model": tiny_qwen2(), "trainer_kwargs": {"peft_config": LORA}}

    if kind == "qlora":
        compare_bf16_adapters(tmp_path, models, settings)
    else:
        compare("DPO", tmp_path, stock=True, make_model=models, **settings)


def compare_bf16_adapters(folder, models, settings) -> None:
    """TRL makes QLoRA's adapters bf16, whose gradients are rounded to three digits."""
    found = [
        step("DPO", folder, **models(), **settings, **packed)[0]
        for packed in ({}, {"padding_free": True}, {"padding_free": True, "share_prompt": False})
    ]
    for packed in found[1:]:
        assert error(packed, found[0]) < 1e-2


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired", "ddro", "rdro"])
@pytest.mark.parametrize("precomputed", [False, True], ids=["", "precomputed"])
def test_unpaired(tmp_path, loss_type, precomputed):
    compare(
        "KTO",
        tmp_path,
        stock=loss_type not in LOSS_TYPES,
        make_model=reference,
        loss_type=loss_type,
        precompute_ref_log_probs=precomputed,
        # TRL builds its pairs for the KL divergence from the order of the data
        train_sampling_strategy="sequential",
    )


def test_mixture_of_experts_is_packed_and_not_shared(tmp_path, caplog):
    """Its auxiliary loss is a mean over tokens. The coefficient at 0, there is none, and prompts are shared."""

    def models(**kwargs):
        make_model = functools.partial(ARCHITECTURES["mixtral"], router_aux_loss_coef=0.1, **kwargs)
        return {"model": make_model(), "trainer_kwargs": {"ref_model": make_model(seed=3)}}

    compare("DPO", tmp_path, stock=True, make_model=models)
    assert make("DPO", tmp_path, padding_free=True, **models())._layouts.share is False
    trainer = make("DPO", tmp_path, padding_free=True, router_aux_loss_coef=0.0, **models())
    assert trainer._layouts.share is True


def test_bf16(tmp_path):
    def run(**packed):
        model, ref = tiny_qwen2(dtype=torch.bfloat16), tiny_qwen2(seed=3, dtype=torch.bfloat16)
        return step("DPO", tmp_path, model=model, trainer_kwargs={"ref_model": ref}, **packed)

    (expected, log), (found, packed_log) = run(), run(padding_free=True)
    assert packed_log["loss"] == pytest.approx(log["loss"], rel=1e-2)
    other = run(pad_to_multiple_of=64)[0]
    assert error(found, expected) < max(1e-2, 5 * error(other, expected))


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_off_is_trls_own(tmp_path, kind):
    """To the last bit, with our trainer and without."""
    stock, ours = (step(kind, tmp_path, stock=stock, **reference()) for stock in (True, False))
    assert ours[0].equal(stock[0])
    assert {k: v for k, v in ours[1].items() if k in stock[1]} == stock[1]


@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro"])
def test_evaluation_and_prediction(tmp_path, loss_type):
    found = []
    for packed in (False, True):
        trainer = make(
            "DPO", tmp_path, padding_free=packed, loss_type=loss_type, per_device_eval_batch_size=3,
            trainer_kwargs={**reference()["trainer_kwargs"], "eval_dataset": pairs()},
        )  # fmt: skip
        metrics = trainer.evaluate()
        predicted = trainer.predict(trainer.eval_dataset).metrics
        found.append({k: v for k, v in {**metrics, **predicted}.items() if "runtime" not in k and "per_sec" not in k})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_same_steps(tmp_path, balanced):
    """Several steps of several micro-batches, and the order of the samples: dealt or not, the weights come to be the
    same."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "optim": "sgd"}
    weights = []
    for packed in ({}, {"padding_free": True, "balance_tokens": balanced}):
        trainer = make("DPO", tmp_path, data=pairs(24), learning_rate=0.1, **settings, **packed, **reference())
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert error(weights[1], weights[0]) < 1e-6


def test_dealing_evens_out_the_micro_batches(tmp_path):
    largest = {}
    for balanced in (False, True):
        trainer = make(
            "DPO", tmp_path, data=pairs(24), padding_free=True, balance_tokens=balanced,
            per_device_train_batch_size=2, gradient_accumulation_steps=4, **reference(),
        )  # fmt: skip
        largest[balanced] = 0
        for batch in trainer.get_train_dataloader():
            tokens = batch["attention_mask"].sum().item()
            largest[balanced] += tokens**2  # a sum of squares is least where all are alike
    assert largest[True] < largest[False]


def test_resumed_run_is_the_same(tmp_path):
    """In the middle of an epoch of dealt steps."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, "save_steps": 2}
    settings |= {"save_strategy": "steps", "padding_free": True, "data": pairs(24)}
    whole = make("DPO", tmp_path / "whole", **settings, **reference())
    whole.train()
    again = make("DPO", tmp_path / "whole", **settings, **reference())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for first, second in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert first.equal(second)
    assert "trl_rdro" not in (tmp_path / "whole" / "checkpoint-2" / "config.json").read_text()
    loaded = type(whole.model).from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert loaded.config._attn_implementation == "sdpa"


class Generate(TrainerCallback):
    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        self.found = model.generate(**processing_class("tell me", return_tensors="pt"), max_new_tokens=4)


def test_generation_during_training(tmp_path):
    found = []
    for packed in (False, True):
        callback = Generate()
        trainer = make("DPO", tmp_path, padding_free=packed, **reference())
        trainer.add_callback(callback)
        trainer.train()
        found.append(callback.found)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("packed", [False, True])
def test_group_by_length(tmp_path, kind, packed):
    """TRL's own trainers raise for it."""
    trainer = make(
        kind, tmp_path, data=(pairs if kind == "DPO" else labelled)(24), padding_free=packed, balance_tokens=False,
        train_sampling_strategy="group_by_length", per_device_train_batch_size=2, max_steps=3,
        loss_type="rdro", **reference(),
    )  # fmt: skip
    spreads = []
    for batch in trainer.get_train_dataloader():
        lengths = batch["attention_mask"].sum(1)
        lengths = lengths.view(2, -1).sum(0) if kind == "DPO" and packed else lengths.view(-1, 2).max(1).values
        spreads.append((lengths.max() - lengths.min()).item())
    trainer.train()
    everything = [len(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert sum(spreads) / len(spreads) < max(everything) - min(everything)


def test_one_line_says_what_is_done(tmp_path, capfd, caplog):
    def line(**settings):
        caplog.clear()
        with caplog.at_level("INFO"):
            make("DPO", tmp_path, padding_free=True, **settings, **reference())
        lines = [record.getMessage() for record in caplog.records if "acked rows" in record.getMessage()]
        assert len(lines) == 1 and "temporarily unavailable" not in caplog.text
        return lines[0]

    import logging

    logging.getLogger("trl_rdro").propagate = True
    two = {"gradient_accumulation_steps": 2}
    assert "the prompt of a pair is forwarded once; steps are dealt by tokens; attention by" in line(**two)
    assert "prompts are not shared: `share_prompt=False`" in line(share_prompt=False)
    assert "prompts are not shared: `wdpo`" in line(loss_type="wdpo")
    assert "samples are not dealt by tokens: `aot`" in line(loss_type="aot", **two)
    assert "samples are not dealt by tokens: `balance_tokens=False`" in line(balance_tokens=False, **two)


def test_trl_packs_itself(tmp_path, monkeypatch):
    """A TRL that keeps `padding_free` is left to it."""
    initialise = trl.DPOTrainer.__init__

    @functools.wraps(initialise)
    def packs(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.padding_free = True

    monkeypatch.setattr(trl.DPOTrainer, "__init__", packs)
    trainer = make("DPO", tmp_path, padding_free=True, **reference())
    model = object()
    assert trainer.stand_in(model) is model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_free": "yes"}, "`padding_free` must be True or False, got 'yes'"),
        ({"padding_free": True, "share_prompt": 1}, "`share_prompt` must be True or False, got 1"),
        ({"padding_free": True, "use_liger_kernel": True}, "cannot be used with `use_liger_kernel=True`"),
    ],
)
def test_refused_by_options(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr("trl_rdro.configs.run_config.is_liger_kernel_available", lambda: True)
    with pytest.raises(ValueError, match=message):
        DPOConfig(**cpu_args(output_dir=str(tmp_path), **settings))


def test_refused_before_loading(tmp_path, monkeypatch):
    path = save_tiny(tmp_path, attention_dropout=0.1)
    monkeypatch.delattr("trl.trainer.dpo_trainer.create_model_from_path")  # what is refused is not loaded
    with pytest.raises(ValueError, match="cannot be used with `attention_dropout=0.1`"):
        make("DPO", tmp_path, model=path, padding_free=True)


def test_refused_adapters(tmp_path):
    from peft import PromptTuningConfig

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="cannot be used with .*PROMPT_TUNING adapters"):
        make("DPO", tmp_path, padding_free=True, trainer_kwargs={"peft_config": prompts})
    model = get_peft_model(tiny_qwen2(), prompts)
    assert isinstance(model, PeftModel)
    with pytest.raises(ValueError, match="cannot be used with .*PROMPT_TUNING adapters"):
        make("DPO", tmp_path, model=model, padding_free=True, trainer_kwargs={"ref_model": tiny_qwen2()})


def test_self_check_in_training(tmp_path):
    from ..packing.test_checks import RunningMean

    model = tiny_qwen2()
    model.model.layers[0].mlp = RunningMean(model.model.layers[0].mlp)
    trainer = make("DPO", tmp_path, model=model, padding_free=True, **reference())
    with pytest.raises(ValueError, match="`padding_free=True` changes what Qwen2ForCausalLM computes"):
        trainer.train()
