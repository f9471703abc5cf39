"""`trl-rdro score` on what a run has saved gives the numbers that the run's own trainer logs at its end."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.errors import UserError
from trl_rdro.tools import scoring

from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_tokenizer


PAIRS = tiny_preferences(12)
LABELLED = Dataset.from_list(
    [
        {"prompt": row["prompt"], "completion": row[column], "label": column == "chosen"}
        for row in PAIRS
        for column in ("chosen", "rejected")
    ]
)
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
ROOMY = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 24}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tied"), tie=True)


@pytest.fixture(scope="module")
def sft(tmp_path_factory, base) -> str:
    """An adapter with weights that matter."""
    path = str(tmp_path_factory.mktemp("sft"))
    torch.manual_seed(1)
    get_peft_model(load(base), LoraConfig(**LORA, init_lora_weights=False)).save_pretrained(path)
    return path


def load(name: str):
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def train(model, folder, rows=PAIRS, peft_config=None, **options) -> dict[str, float]:
    """Train, save to `folder`, and return what the trainer then logs of the same rows."""
    paired = "chosen" in rows.column_names
    config, trainer_class = (DPOConfig, DPOTrainer) if paired else (KTOConfig, KTOTrainer)
    args = config(**cpu_args(output_dir=str(folder), loss_type="rdro", **ROOMY, **options))
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    logged = trainer.evaluate()
    trainer.save_model(str(folder))
    return logged


def assert_same(result: dict, logged: dict[str, float], beta: float = 0.1) -> None:
    overall = result["overall"]
    sides = ("chosen", "rejected") if "margin" in overall else ("preferred", "non_preferred")
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        assert overall[side]["mean"] == pytest.approx(logged[f"eval_logratios/{name}"], abs=1e-4)
    assert abs(overall[sides[0]]["mean"] - overall[sides[1]]["mean"]) > 0.01  # the run has moved it
    if "margin" in overall:
        assert overall["accuracy"]["mean"] == pytest.approx(logged["eval_rewards/accuracies"], abs=1e-6)
        assert beta * overall["margin"]["mean"] == pytest.approx(logged["eval_rewards/margins"], abs=1e-4)


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labelled"])
def test_full(base, tmp_path, rows):
    logged = train(base, tmp_path, rows)
    assert_same(scoring.score(rows, str(tmp_path), base), logged)


HEADS = {
    "plain": {},
    "head": {"modules_to_save": ["lm_head"]},
    "head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"trainable_token_indices": [5, 7]},
}


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labelled"])
@pytest.mark.parametrize(
    ("model", "head"),
    # TRL's fused head has no way to train new tokens of tied embeddings
    [("base", head) for head in HEADS] + [("tied", head) for head in HEADS if head != "new tokens"],
)
def test_new_adapter(request, tmp_path, model, head, rows):
    name = request.getfixturevalue(model)
    logged = train(name, tmp_path, rows, LoraConfig(**LORA, **HEADS[head]))
    result = scoring.score(rows, str(tmp_path))
    assert_same(result, logged)
    assert result["reference"] == f"{name} (adapter off)"


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labelled"])
def test_given_adapter_is_compared_with_the_copy_that_training_kept(base, sft, tmp_path, rows):
    logged = train(PeftModel.from_pretrained(load(base), sft, is_trainable=True), tmp_path, rows)
    result = scoring.score(rows, str(tmp_path))
    assert_same(result, logged)
    assert result["reference"] == f"{base} with the adapter that training started from"
    # The same by naming it, and something else with the adapter off
    assert_same(scoring.score(rows, str(tmp_path), sft), logged)
    off = scoring.score(rows, str(tmp_path), base)["overall"]
    side = "chosen" if rows is PAIRS else "preferred"
    assert abs(off[side]["mean"] - result["overall"][side]["mean"]) > 0.1


def test_given_adapter_with_a_trained_head(base, tmp_path):
    torch.manual_seed(2)
    given = get_peft_model(load(base), LoraConfig(**LORA, init_lora_weights=False, modules_to_save=["lm_head"]))
    with torch.no_grad():
        given.get_output_embeddings().weight.mul_(1.5)
    given.save_pretrained(tmp_path / "sft")
    model = PeftModel.from_pretrained(load(base), tmp_path / "sft", is_trainable=True)
    logged = train(model, tmp_path / "run")
    assert_same(scoring.score(PAIRS, str(tmp_path / "run")), logged)


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labelled"])
def test_precomputed_columns_are_the_reference(base, sft, tmp_path, rows):
    """Those of a model that is neither the base nor in any folder of the run."""
    lengths = range(len(rows))
    for name in ("ref_chosen_logps", "ref_rejected_logps") if rows is PAIRS else ("ref_logps",):
        rows = rows.add_column(name, [-20.0 - (length % 5) - len(name) / 7 for length in lengths])
    logged = train(base, tmp_path, rows, LoraConfig(**LORA), precompute_ref_log_probs=True)
    result = scoring.score(rows, str(tmp_path))
    assert_same(result, logged)
    assert result["reference"].startswith("the data set's own, ref_")
    named = scoring.score(rows, str(tmp_path), base)  # a reference by name comes first
    assert named["reference"] == base and named["overall"] != result["overall"]
    spoiled = rows.remove_columns(name).add_column(name, ["much"] * len(rows))
    with pytest.raises(UserError, match=f"{name} must hold numbers"):
        scoring.score(spoiled, str(tmp_path))


def rewritten(folder, source: str, change) -> str:
    """A copy of an adapter whose tensors' names are `change`d (None: left out)."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(f"{source}/adapter_model.safetensors")
    folder.mkdir()
    kept = {change(name): tensor for name, tensor in tensors.items() if change(name) is not None}
    save_file(kept, folder / "adapter_model.safetensors")
    shutil.copy(f"{source}/adapter_config.json", folder)
    return str(folder)


@pytest.mark.parametrize(
    ("change", "fitting"),
    [
        (lambda name: name.replace(".layers.", ".blocks."), "0 of its 28 tensors fit"),
        (lambda name: name.replace(".layers.1.", ".layers.7."), "14 of its 28 tensors fit"),
        (lambda name: None if ".layers.1." in name else name, "14 of its 14 tensors fit"),
        (lambda name: None if name.endswith("layers.0.mlp.up_proj.lora_B.weight") else name, "27 of its 27 tensors"),
    ],
    ids=["other names", "a deeper model's", "half of it", "all but one"],
)
def test_adapter_that_does_not_fit_is_refused(sft, tmp_path, change, fitting):
    with pytest.raises(UserError, match="belongs to another model") as error:
        scoring.score(PAIRS, rewritten(tmp_path / "adapter", sft, change))
    assert fitting in str(error.value) and "\n" not in str(error.value)


def test_adapter_of_another_width_is_refused_in_a_sentence(sft, tmp_path):
    wide = save_tiny(tmp_path / "wide", hidden_size=64)
    adapter = rewritten(tmp_path / "adapter", sft, lambda name: name)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": wide}))
    with pytest.raises(UserError, match="cannot load the adapter .*size mismatch"):
        scoring.score(PAIRS, adapter)
