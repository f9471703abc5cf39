"""
Unpaired density-ratio losses with what people train with: adapters, quantisation, precomputed reference
log-probabilities, evaluation, resuming and reloading.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import trl_rdro
from trl_rdro import KTOTrainer
from trl_rdro.losses.types import of_family

from ..loss_cases import LOSS_CASES
from ..tiny import save_tiny, tiny_tokenizer
from ..training import (
    SGD,
    kto_config,
    labelled,
    largest_difference,
    lora,
    measured,
    parameters,
    trained_parameters,
    two_models,
)


EACH_LOSS = pytest.mark.parametrize("loss_type", of_family("density_ratio"))


@EACH_LOSS
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_precomputed_reference_gives_the_same_run(tmp_path, qwen2, loss_type, use_lora):
    runs = []
    for precompute in (False, True):
        args = kto_config(
            tmp_path,
            loss_type,
            precompute_ref_log_probs=precompute,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=4,
            **{**SGD, "learning_rate": 0.03},
        )
        trainer = KTOTrainer(
            qwen2,
            args=args,
            train_dataset=labelled(7, 11),
            eval_dataset=labelled(3, 3, seed=1),
            peft_config=lora(init_lora_weights="gaussian") if use_lora else None,
        )
        before = parameters(trainer)
        runs.append((trained_parameters(trainer), measured(trainer)))
        assert ("ref_logps" in trainer.train_dataset.column_names) is precompute
    scale = largest_difference(before, runs[0][0])
    assert scale > 1e-3
    assert largest_difference(runs[0][0], runs[1][0]) < 1e-4 * scale
    for left, right in zip(runs[0][1], runs[1][1], strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


@EACH_LOSS
def test_qlora(tmp_path, loss_type):
    pytest.importorskip("bitsandbytes")
    qwen2 = save_tiny(tmp_path, hidden_size=64, intermediate_size=128)  # whole blocks of 64 weights
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    trainer = KTOTrainer(
        qwen2,
        args=kto_config(tmp_path, loss_type, max_steps=6, learning_rate=1e-2, eval_strategy="steps", eval_steps=6),
        train_dataset=labelled(3, 5),
        eval_dataset=labelled(4, 4, seed=1),
        peft_config=lora(),
        quantization_config=quantization,
    )
    assert trainer.model.is_loaded_in_4bit
    before = parameters(trainer)
    after = trained_parameters(trainer)
    adapter = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert adapter == {name for name in after if "lora_" in name}  # evaluation repacks the others on a CPU
    assert all(not torch.equal(before[name], after[name]) for name in adapter)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(LOSS_CASES[loss_type].constant, rel=1e-4)
    assert losses[-1] < losses[0]


@EACH_LOSS
def test_resuming_gives_the_uninterrupted_run(tmp_path, qwen2, loss_type):
    def build(name):
        args = kto_config(
            tmp_path / name,
            loss_type,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        return KTOTrainer(qwen2, args=args, train_dataset=labelled(4, 6))

    whole = trained_parameters(build("whole"))
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert largest_difference(whole, parameters(resumed)) == 0
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["loss"] == resumed.state.log_history[3]["loss"]


@EACH_LOSS
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_saved_and_reloaded(tmp_path, qwen2, loss_type, use_lora):
    trainer = KTOTrainer(
        qwen2,
        args=kto_config(tmp_path / "run", loss_type, learning_rate=1e-2),
        train_dataset=labelled(4, 4),
        peft_config=lora() if use_lora else None,
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids = torch.tensor([tiny_tokenizer()("the film was good")["input_ids"]])
    with torch.no_grad():
        logits = [
            model.eval()(input_ids=ids).logits
            for model in (
                trainer.model,
                AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
                AutoModelForCausalLM.from_pretrained(qwen2),
            )
        ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


@pytest.mark.parametrize(
    ("loss_type", "paper", "title"),
    [
        ("rdro", "2604.04410", "Relative Density Ratio Optimization for Stable"),
        ("ddro", "2505.07558", "Direct Density Ratio Optimization: A Statistically"),
    ],
)
def test_model_card_names_the_method(tmp_path, qwen2, loss_type, paper, title):
    trainer = KTOTrainer(qwen2, args=kto_config(tmp_path, loss_type), train_dataset=labelled(1, 1))
    trainer.create_model_card(model_name="tiny")
    card = Path(tmp_path, "README.md").read_text(encoding="utf-8")
    assert title in card and f"https://huggingface.co/papers/{paper}" in card
    assert f"trained with {loss_type.upper()}" in card
    assert f"\n- trl_rdro: {trl_rdro.__version__}\n- TRL: " in card
    for tag in ("trl", loss_type, "trl-rdro"):
        assert f"\n- {tag}\n" in card
    assert {loss_type, "trl-rdro"} <= set(trainer.model.model_tags)


@EACH_LOSS
def test_learns_what_distinguishes_the_classes(tmp_path, qwen2, loss_type):
    args = kto_config(tmp_path, loss_type, per_device_train_batch_size=16, max_steps=30, learning_rate=3e-3)
    trainer = KTOTrainer(qwen2, args=args, train_dataset=labelled(16, 48), eval_dataset=labelled(16, 16, seed=1))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_logratios/chosen"] > after["eval_logratios/rejected"] + 0.5
    assert not any("kl" in name for entry in trainer.state.log_history for name in entry)  # nothing estimates it
    assert before["eval_logratios/chosen"] == before["eval_logratios/rejected"] == 0


@EACH_LOSS
@pytest.mark.filterwarnings("ignore:.*return_outputs=True:FutureWarning")
def test_compute_metrics_gets_the_logits(tmp_path, loss_type):
    trainer = KTOTrainer(
        args=kto_config(tmp_path, loss_type),
        train_dataset=labelled(4, 4),
        eval_dataset=labelled(3, 3, seed=1),
        compute_metrics=lambda prediction: {"shape": list(prediction.predictions.shape)},
        **two_models(),
    )
    metrics = trainer.evaluate()
    trainer.compute_metrics = None
    without = trainer.evaluate()
    assert metrics["eval_shape"][0] == 6 and metrics["eval_shape"][2] == len(tiny_tokenizer())
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"], rel=1e-6)
