"""`trl_rdro.DPOTrainer`: TRL's own numbers with TRL's losses, and a working trainer with ours."""

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from trl_rdro import DPOConfig, DPOTrainer
from trl_rdro.configs.loss_names import TRL_DPO_LOSSES

from ..loss_cases import KINDS, LOSS_CASES
from ..tiny import cpu_args, tiny_preferences, tiny_qwen2, tiny_tokenizer, with_columns
from ..training import lora, make_trainer, measured, parameters, same_parameters, train


TRL_METRICS = """entropy num_tokens logits/chosen logits/rejected mean_token_accuracy rewards/chosen rewards/rejected
    rewards/accuracies rewards/margins logps/chosen logps/rejected""".split()
# Of the central difference, which evaluation does without
TRAINING_ONLY = {"wdpo/gap", "wdpo/eps"}


# TRL's own losses


@pytest.mark.parametrize("loss_type", [*TRL_DPO_LOSSES, ["sigmoid", "sft"]], ids=str)
def test_builtin_losses_equal_trl_bitwise(qwen2, tmp_path, loss_type):
    settings = {"loss_type": loss_type, "label_smoothing": 0.1 if loss_type in ("exo_pair", "robust") else 0.0}
    ours = train(qwen2, tmp_path, **settings)
    theirs = train(qwen2, tmp_path, trl.DPOTrainer, **settings)
    assert measured(ours) == measured(theirs)
    assert same_parameters(parameters(ours), parameters(theirs))


@pytest.mark.parametrize("model_name", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"precompute_ref_log_probs": True},
        {"eval_strategy": "steps", "eval_steps": 2},
        {"lora": True},
        {"lora": True, "gradient_checkpointing": True, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
        {"use_weighting": True, "ld_alpha": 0.5},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_builtin_settings_equal_trl_bitwise(request, tmp_path, model_name, settings):
    model, settings = request.getfixturevalue(model_name), dict(settings)
    kwargs = {"eval_dataset": tiny_preferences(12, seed=1)}
    if settings.pop("lora", False):
        kwargs["peft_config"] = lora()
    ours = train(model, tmp_path / "ours", trainer_kwargs=kwargs, **settings)
    theirs = train(model, tmp_path / "theirs", trl.DPOTrainer, trainer_kwargs=kwargs, **settings)
    assert measured(ours) == measured(theirs)
    assert same_parameters(parameters(ours), parameters(theirs))


@pytest.mark.parametrize("inner, smoothing", [("sigmoid", 0.0), ("ipo", 0.0), ("hinge", 0.0)])
def test_wdpo_without_penalty_is_trls_loss_bitwise(qwen2, tmp_path, inner, smoothing):
    forwards = []
    callback = CountForwards(forwards)
    ours = train(
        qwen2,
        tmp_path,
        loss_type="wdpo",
        wdpo_rho=0.0,
        inner_loss_type=inner,
        trainer_kwargs={"callbacks": [callback]},
    )
    theirs = train(qwen2, tmp_path, trl.DPOTrainer, loss_type=inner)
    assert same_parameters(parameters(ours), parameters(theirs))
    assert sum(forwards) == 4  # one policy forward a step


@pytest.mark.parametrize("inner", ["sigmoid", "ipo", "hinge"])
def test_kldpo_at_a_large_tau_is_trls_loss(qwen2, tmp_path, inner):
    ours = train(qwen2, tmp_path, loss_type="kldpo", kldpo_tau=1e6, inner_loss_type=inner, optim="sgd")
    theirs = train(qwen2, tmp_path, trl.DPOTrainer, loss_type=inner, optim="sgd")
    for name, parameter in parameters(theirs).items():
        torch.testing.assert_close(parameters(ours)[name], parameter, rtol=1e-5, atol=1e-7)


# Ours


class CountForwards(TrainerCallback):
    """Appends the number of policy forwards of the run to a list."""

    def __init__(self, counts):
        self.counts = counts

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.counts.append(0)
        self.handle = model.register_forward_hook(lambda *_: self.counts.append(1))

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


@pytest.mark.parametrize("model_name", ["qwen2", "llama"])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("loss_type", KINDS)
def test_first_loss_is_the_constant_and_all_metrics_are_logged(request, tmp_path, model_name, loss_type, precompute):
    trainer = train(
        request.getfixturevalue(model_name),
        tmp_path,
        loss_type=loss_type,
        precompute_ref_log_probs=precompute,
        eval_strategy="steps",
        eval_steps=4,
        trainer_kwargs={"eval_dataset": tiny_preferences(12, seed=1)},
    )
    first, evaluation = trainer.state.log_history[0], trainer.state.log_history[4]
    penalty = first.get("wdpo/penalty", 0.0)
    constant = LOSS_CASES[loss_type].constant
    assert first["loss"] - penalty == pytest.approx(constant, abs=2e-6)
    assert first["logratios/chosen"] == pytest.approx(0, abs=1e-5)
    own = [f"{loss_type}/{metric}" for metric in LOSS_CASES[loss_type].metrics]
    for name in [*TRL_METRICS, "logratios/chosen", "logratios/rejected", *own]:
        assert math.isfinite(first[name]), name
        assert name in TRAINING_ONLY or math.isfinite(evaluation[f"eval_{name}"]), name
    for own, theirs in (("logratios/chosen", "rewards/chosen"), ("logratios/rejected", "rewards/rejected")):
        assert evaluation[f"eval_{own}"] * trainer.beta == pytest.approx(evaluation[f"eval_{theirs}"], rel=1e-5)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", KINDS)
def test_each_loss_learns(qwen2, tmp_path, loss_type, use_lora):
    """Held-out loss falls from its constant, held-out accuracy rises from chance to nearly all."""
    learning_rate = LOSS_CASES[loss_type].adamw_learning_rate * (5 if use_lora else 1)
    evaluation = tiny_preferences(64, seed=1)
    kwargs = {"eval_dataset": evaluation, "train_dataset": tiny_preferences(256)}
    if use_lora:
        kwargs["peft_config"] = lora()
    trainer = train(
        qwen2,
        tmp_path,
        loss_type=loss_type,
        learning_rate=learning_rate,
        max_steps=40,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=40,
        trainer_kwargs=kwargs,
    )
    before, after = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert after["eval_loss"] < before["eval_loss"] - 0.05
    assert after["eval_rewards/accuracies"] > 0.9
    assert after["eval_logratios/chosen"] > after["eval_logratios/rejected"] + 0.3


def test_mixture_with_trls_losses_adds_up(qwen2, tmp_path):
    """In a weighted list TRL's losses keep their values and gradients."""

    def gradients(**settings):
        trainer = make_trainer(qwen2, tmp_path, trainer_kwargs={"train_dataset": tiny_preferences(8)}, **settings)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    for name in KINDS:
        mixed_loss, mixed = gradients(loss_type=[name, "sft", "sigmoid"], loss_weights=[1.0, 0.25, 0.5])
        parts = [gradients(loss_type=name), gradients(loss_type="sft"), gradients(loss_type="sigmoid")]
        weights = [1.0, 0.25, 0.5]
        assert mixed_loss == pytest.approx(
            sum(w * loss for w, (loss, _) in zip(weights, parts, strict=True)), rel=1e-6
        )
        expected = sum(w * gradient for w, (_, gradient) in zip(weights, parts, strict=True))
        # wdpo takes the gradient of the other losses from the mean of its two perturbed points
        tolerance = 1e-3 if name == "wdpo" else 1e-5
        assert (mixed - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("loss_type", LOSS_CASES)
def test_resume_gives_the_same_weights(qwen2, tmp_path, loss_type):
    settings = {"loss_type": loss_type, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    settings |= {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, **LOSS_CASES[loss_type].settings}
    whole = train(qwen2, tmp_path / "run", **settings)
    resumed = make_trainer(qwen2, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert same_parameters(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("loss_type", KINDS)
def test_saved_model_reloads(qwen2, tmp_path, loss_type):
    trainer = train(qwen2, tmp_path, loss_type=loss_type)
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, parameter in parameters(trainer).items():
        assert torch.equal(dict(reloaded.named_parameters())[name], parameter), name


@pytest.mark.parametrize("loss_type", KINDS)
@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*:UserWarning")
def test_qlora(qwen2, tmp_path, loss_type):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = train(
        qwen2,
        tmp_path,
        loss_type=loss_type,
        gradient_checkpointing=True,
        trainer_kwargs={"quantization_config": quantization, "peft_config": lora()},
    )
    losses = [entry["loss"] for entry in trainer.state.log_history[:4]]
    assert all(map(math.isfinite, losses))
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert trained and all(p.abs().max() > 0 for p in trained)


@pytest.mark.parametrize("loss_type", ["rdro", "sigmoid"])
def test_adapters_of_a_quantised_model_move_at_a_small_rate(qwen2, tmp_path, loss_type):
    """In bfloat16, which TRL makes them, most of an update of 5e-6 is rounded away. With TRL's losses they stay so."""
    trainer = make_trainer(
        qwen2,
        tmp_path,
        loss_type=loss_type,
        learning_rate=5e-6,
        lr_scheduler_type="constant",
        trainer_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "peft_config": lora()},
    )
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    ours = loss_type == "rdro"
    assert {p.dtype for p in adapters.values()} == {torch.float32 if ours else torch.bfloat16}
    before = {name: p.detach().clone() for name, p in adapters.items() if "lora_A" in name}
    trainer.train()
    moved = torch.cat([(adapters[name] != value).flatten() for name, value in before.items()]).float().mean()
    assert moved > 0.99 if ours else moved < 0.5


@pytest.mark.parametrize("loss_type", KINDS)
def test_training_a_given_adapter_starts_at_the_constant(qwen2, tmp_path, loss_type):
    """With a pretrained adapter TRL's reference is a copy of it, not the base model."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(qwen2), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = train(model, tmp_path, loss_type=loss_type, trainer_kwargs={"processing_class": tiny_tokenizer()})
    first = trainer.state.log_history[0]
    constant = LOSS_CASES[loss_type].constant
    assert first["loss"] - first.get("wdpo/penalty", 0.0) == pytest.approx(constant, abs=1e-5)
    assert first["logratios/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss_type, paper", [("ddro", "2505.07558"), ("rdro", "2604.04410"), ("wdpo", "2502.01930")])
def test_model_card_names_the_paper(qwen2, tmp_path, loss_type, paper):
    train(qwen2, tmp_path, loss_type=loss_type, max_steps=1, save_strategy="steps", save_steps=1)
    card = (tmp_path / "README.md").read_text()
    assert paper in card and loss_type.upper() in card and f"- {loss_type}\n" in card


@pytest.mark.parametrize("loss_type", ["rdro", "wdpo"])
def test_compute_metrics_still_gets_logits(qwen2, tmp_path, loss_type):
    shapes = []
    kwargs = {
        "eval_dataset": tiny_preferences(8, seed=1),
        "compute_metrics": lambda prediction: shapes.append(prediction.predictions.shape) or {},
    }
    trainer = make_trainer(qwen2, tmp_path, trainer_kwargs=kwargs, loss_type=loss_type)
    with pytest.warns(FutureWarning, match="return_outputs"):
        assert trainer.evaluate()["eval_loss"] > 0
    assert shapes[0][0] == 16 and shapes[0][2] == trainer.model.config.vocab_size


def test_streaming_and_conversational_data(qwen2, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in tiny_preferences(16)
    ]
    dataset = Dataset.from_list(rows).to_iterable_dataset()
    trainer = train(qwen2, tmp_path, loss_type="rdro", max_steps=2, trainer_kwargs={"train_dataset": dataset})
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)


def test_mixture_of_experts_keeps_its_load_balancing_loss(tmp_path):
    """The auxiliary loss enters once, for one policy forward, with ours as with TRL's losses."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    logs = {}
    for loss_type in ("sigmoid", *KINDS):
        trainer = train(str(tmp_path / "model"), tmp_path, loss_type=loss_type, max_steps=1)
        logs[loss_type] = trainer.state.log_history[0]
    for loss_type in KINDS:
        log = logs[loss_type]
        constant = LOSS_CASES[loss_type].constant
        assert log["aux_loss"] == pytest.approx(logs["sigmoid"]["aux_loss"], rel=1e-3)
        assert log["loss"] == pytest.approx(constant + log.get("wdpo/penalty", 0) + 0.1 * log["aux_loss"], abs=1e-4)


# Refusals, before the model is loaded


def test_our_losses_need_our_config(tmp_path):
    args = trl.DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro"))
    with pytest.raises(TypeError, match=r"`trl_rdro.DPOConfig`, got `trl.*Import `DPOConfig` from trl_rdro"):
        DPOTrainer("no/such/model", args=args, train_dataset=tiny_preferences(4))


def test_wdpo_refuses_images(tmp_path):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="wdpo"))
    dataset = tiny_preferences(4).add_column("images", [[]] * 4)
    with pytest.raises(ValueError, match="not defined for image data"):
        DPOTrainer("no/such/model", args=args, train_dataset=dataset)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TRL's default config asks for bf16 on a GPU")
def test_default_config_is_ours(qwen2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = DPOTrainer(qwen2, train_dataset=tiny_preferences(4))
    assert type(trainer.args) is DPOConfig and trainer.args.output_dir == "qwen2-DPO"


def test_import_is_lazy():
    import subprocess
    import sys

    code = (
        "import sys, trl_rdro, trl_rdro.losses; assert 'trl' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_qwen2_with_given_reference_model(tmp_path):
    """An explicit reference model is used as it is."""
    trainer = train(
        tiny_qwen2(seed=0),
        tmp_path,
        loss_type="rdro",
        max_steps=1,
        trainer_kwargs={"ref_model": tiny_qwen2(seed=1), "processing_class": tiny_tokenizer()},
    )
    assert abs(trainer.state.log_history[0]["logratios/chosen"]) > 0.1


@pytest.mark.parametrize(
    "settings", [{"loss_type": "gdpo"}, {"loss_type": "kldpo", "inner_loss_type": "dpopro"}], ids=str
)
def test_a_missing_column_is_refused_before_the_model_is_loaded(tmp_path, settings):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), **settings))
    with pytest.raises(
        ValueError, match="`train_dataset` lacks the column preference_probability, which the loss reads"
    ):
        DPOTrainer("no/such/model", args=args, train_dataset=tiny_preferences(4))
    train = with_columns(tiny_preferences(4), ["gdpo"])
    with pytest.raises(ValueError, match="`eval_dataset` lacks the column preference_probability"):
        DPOTrainer("no/such/model", args=args, train_dataset=train, eval_dataset=tiny_preferences(4))
