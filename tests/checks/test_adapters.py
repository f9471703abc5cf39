"""An adapter against the layers of its model, before the model is loaded."""

import pytest
from peft import IA3Config, LoraConfig, PrefixTuningConfig
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from trl_rdro import DPOTrainer, KTOTrainer
from trl_rdro.checks.adapters import check_adapter_config

from ..tiny import cpu_args, tiny_preferences, tiny_qwen2
from ..training import CONFIGS, make_config, make_trainer


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


WRONG = [
    (lora(target_modules=["nope"]), "'nope'"),
    (lora(target_modules=["q_prj"]), "Did you mean 'q_proj'"),
    (lora(target_modules="q_proj"), r"\.\*\\.q_proj"),
    (lora(target_modules=r".*\.q_prj"), "q_prj"),
    (lora(target_modules="*["), "regular expression"),
    (lora(target_modules=["lm_head"]), "LM head"),
    (lora(target_modules=["q_proj", "lm_head"]), "LM head"),
    (lora(target_modules=".*lm_head"), "LM head"),
    (lora(modules_to_save=["nope"]), "modules_to_save"),
    (lora(modules_to_save=["lm_head", "nope"]), "'nope'"),
    (lora(target_parameters=["nope"]), "target_parameters"),
    (lora(trainable_token_indices=[10**6]), "1000000"),
    (lora(trainable_token_indices=[-1]), "-1"),
    (lora(trainable_token_indices={"lm_head": [1]}), "embed_tokens"),
    (lora(task_type="SEQ_CLS"), "CAUSAL_LM"),
    (IA3Config(task_type="CAUSAL_LM", target_modules=["nope"], feedforward_modules=[]), "'nope'"),
    ({"r": 2}, "peft.LoraConfig"),
    ("lora", "peft.LoraConfig"),
]


@pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer])
@pytest.mark.parametrize(("adapter", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit(trainer_class, adapter, words, qwen2, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    args = CONFIGS[trainer_class](**cpu_args(output_dir="out"))
    with pytest.raises((ValueError, TypeError), match=words) as error:
        trainer_class(qwen2, args=args, train_dataset=tiny_preferences(4), peft_config=adapter)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "adapter", [lora(trainable_token_indices=[1]), lora(trainable_token_indices={"embed_tokens": [1]})]
)
def test_tokens_of_tied_embeddings(adapter, llama, tmp_path):
    with pytest.raises(ValueError, match="tied"):
        make_trainer(llama, tmp_path, trainer_kwargs={"peft_config": adapter})


def test_a_reference_that_moves(qwen2, tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model"):
        make_trainer(qwen2, tmp_path, sync_ref_model=True, trainer_kwargs={"peft_config": lora()})


@pytest.mark.parametrize(
    "adapter",
    [
        lora(target_modules="all-linear"),
        lora(target_modules=None),
        lora(target_modules=r".*\.[qv]_proj"),
        lora(target_modules=["q_proj", "w1"]),  # one list for several architectures
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices=[1, 2]),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
)
def test_what_fits_is_trained(adapter, qwen2, tmp_path):
    make_trainer(qwen2, tmp_path, max_steps=1, save_strategy="no", trainer_kwargs={"peft_config": adapter}).train()


def test_zero3_does_not_take_the_layers_apart(tmp_path):
    """Nor is it forgotten: the model that is trained has to be."""
    pytest.importorskip("deepspeed")
    config, args = tiny_qwen2().config, make_config(tmp_path)
    engine = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        check_adapter_config(lora(), config, args)
        assert is_deepspeed_zero3_enabled()
        with pytest.raises(ValueError, match="'nope'"):
            check_adapter_config(lora(target_modules=["nope"]), config, args)
        assert is_deepspeed_zero3_enabled()
    finally:
        del engine
        unset_hf_deepspeed_config()
