"""A run that trains nothing, starts elsewhere than at its reference, or whose numbers are not finite says so."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.tools.plotting import plot_run
from trl_rdro.trainers.start import distance_from_reference, share_that_cannot_move

from ..tiny import tiny_preferences, tiny_qwen2, tiny_tokenizer
from ..training import labelled, make_trainer


LOSSES = ["sigmoid", "rdro", "kldpo", "wdpo", "kto"]


def make(model, output_dir, loss_type, data=None, ref_model=None, trainer=None, peft_config=None, **settings):
    """A trainer of four steps with any of our losses or TRL's, `kto` on the pairs taken apart."""
    unpaired = loss_type in ("kto", "apo_zero_unpaired")
    given = {"train_dataset": data or tiny_preferences(16), "processing_class": tiny_tokenizer()}
    return make_trainer(
        model,
        output_dir,
        trainer or (KTOTrainer if unpaired else DPOTrainer),
        {**given, "ref_model": ref_model, "peft_config": peft_config},
        KTOConfig if unpaired else DPOConfig,
        **{"loss_type": loss_type, "per_device_train_batch_size": 4, **settings},
    )


def warnings_of(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


# Nothing is trained


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_frozen_adapter_is_refused(qwen2, tmp_path, loss_type):
    get_peft_model(tiny_qwen2(), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient.*is_trainable=True"):
        make(model, tmp_path, loss_type)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_reference_pass_leaves_frozen_adapter_weights_frozen(qwen2, tmp_path, loss_type):
    model = get_peft_model(
        tiny_qwen2(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    frozen = [name for name, p in model.named_parameters() if p.requires_grad and "layers.0." in name]
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    trainer = make(model, tmp_path, loss_type)
    trainer.train()
    assert frozen
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert not parameter.requires_grad and parameter.grad is None, name


# The start


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_model_changed_in_memory_does_not_start_at_its_reference(qwen2, tmp_path, loss_type, caplog):
    for changed in (False, True):
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(qwen2, dtype="float32")
        if changed:
            with torch.no_grad():
                model.lm_head.weight.add_(0.2 * torch.randn_like(model.lm_head.weight))
        make(model, tmp_path, loss_type).train()
        assert ("does not start at its reference" in warnings_of(caplog)) == changed
    assert "changed in memory" in warnings_of(caplog)


@pytest.mark.parametrize(
    ("trainer", "config", "data", "columns"),
    [
        (DPOTrainer, DPOConfig, tiny_preferences(16), ("ref_chosen_logps", "ref_rejected_logps")),
        (KTOTrainer, KTOConfig, labelled(8, 8), ("ref_logps",)),
    ],
)
def test_wrong_reference_columns_are_named(qwen2, tmp_path, caplog, trainer, config, data, columns):
    given = {"train_dataset": data.map(lambda row: dict.fromkeys(columns, -3.0))}
    settings = {"loss_type": "rdro", "precompute_ref_log_probs": True}
    make_trainer(qwen2, tmp_path, trainer, given, config, **settings).train()
    assert "does not start at its reference" in warnings_of(caplog) and "in the data set" in warnings_of(caplog)


def test_a_given_reference_and_noise_are_not_complained_about(qwen2, tmp_path, caplog):
    make(tiny_qwen2(seed=1), tmp_path, "sigmoid", ref_model=tiny_qwen2(seed=0)).train()
    adapter = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    make(qwen2, tmp_path, "sigmoid", peft_config=adapter, disable_dropout=False).train()
    assert "does not start at its reference" not in warnings_of(caplog)


@pytest.mark.parametrize("loss_type, column", [("rdro", "ref_chosen_logps"), ("apo_zero_unpaired", "ref_logps")])
def test_precomputed_log_probabilities_are_not_taken_from_other_settings(qwen2, tmp_path, loss_type, column):
    """TRL's cache does not know max_length, by which completions are cut."""
    data = tiny_preferences(16).map(lambda row: {"chosen": 4 * row["chosen"]})
    data.to_json(tmp_path / "data.jsonl")
    data = Dataset.from_json(str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path / "cache"))
    first = [
        make(qwen2, tmp_path, loss_type, data, precompute_ref_log_probs=True, max_length=length).train_dataset[0]
        for length in (256, 28)
    ]
    assert first[0][column] != first[1][column]


def test_distance_by_hand():
    metrics = {"rewards/chosen": 0.1, "rewards/rejected": 0.0, "logps/chosen": -300.0}
    assert distance_from_reference(metrics, 0.1, torch.float32) == "+1 nats for chosen completions"
    assert distance_from_reference(metrics, 0.1, torch.bfloat16) is None  # rounding of 300 nats
    assert distance_from_reference({"rewards/chosen": 0.001}, 0.1, torch.float32) is None


def test_parameters_that_cannot_move_are_counted():
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 1e-3], [0.5, 0.0]])
    assert share_that_cannot_move(linear, 1e-6) == 0
    linear.bfloat16()
    # The last digits are 2^-7, 2^-17, 2^-8: an update of 1e-5 reaches half of the second, and moves the zero
    assert share_that_cannot_move(linear, 1e-5) == 0.5


@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro", "kto"])
@pytest.mark.parametrize("start", ["at the reference", "elsewhere", "with noise"])
def test_a_rate_that_moves_nothing_is_said_wherever_a_run_starts(qwen2, tmp_path, caplog, loss_type, start):
    ref_model = tiny_qwen2(seed=1, dtype=torch.bfloat16) if start == "elsewhere" else None
    noise = {"neftune_noise_alpha": 5.0} if start == "with noise" else {}
    for rate, stuck in ((5e-7, True), (1e-1, False)):
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(qwen2, dtype="bfloat16")
        make(model, tmp_path, loss_type, ref_model=ref_model, learning_rate=rate, **noise).train()
        assert warnings_of(caplog).count("cannot move") == stuck


# Finite


def poisoned():
    model = tiny_qwen2()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    return model


@pytest.mark.parametrize("loss_type", [*LOSSES, "ipo", "apo_zero_unpaired"])
def test_parameters_that_are_not_finite_end_the_run_by_name(qwen2, tmp_path, loss_type):
    with pytest.raises(
        FloatingPointError, match=r"1 of the model's parameters .*layers\.1\.mlp\.up_proj.*as it was loaded"
    ):
        make(poisoned(), tmp_path, loss_type, ref_model=tiny_qwen2()).train()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_so_do_those_of_the_reference(tmp_path, loss_type):
    with pytest.raises(FloatingPointError, match=r"1 of the reference model's parameters .*layers\.1\.mlp\.up_proj"):
        make(tiny_qwen2(), tmp_path, loss_type, ref_model=poisoned()).train()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_of_trls_beside_ours_that_is_not_finite_ends_the_run(tmp_path, scaled):
    """`discopop` is 0 times exp(-beta h) where h is far below 0. With a loss scale the norm of its gradient is not
    looked at."""
    settings = {"loss_weights": [1.0, 1.0], "beta": 100.0, "ref_model": tiny_qwen2(seed=1)}
    trainer = make(tiny_qwen2(seed=0), tmp_path, ["rdro", "discopop"], **settings)
    trainer.args.fp16 = scaled
    found = "loss" if scaled else "gradient norm"
    with pytest.raises(FloatingPointError, match=rf"The {found} at step \d is not finite"):
        trainer.train()


@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro"])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_applied(qwen2, tmp_path, loss_type, clipping):
    trainer = make(qwen2, tmp_path, loss_type, max_grad_norm=clipping)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="gradient norm at step 1 is not finite.*parameters are finite"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


# Other


@pytest.mark.parametrize(
    ("base", "config", "theirs"), [(DPOTrainer, DPOConfig, "sigmoid"), (KTOTrainer, KTOConfig, "apo_zero_unpaired")]
)
def test_an_override_that_is_never_called_is_said(qwen2, tmp_path, caplog, base, config, theirs):
    class Mine(base):
        def _compute_loss(self, *args, **kwargs):
            return super()._compute_loss(*args, **kwargs)

    given = {"train_dataset": tiny_preferences(16)}
    make_trainer(qwen2, tmp_path, Mine, given, config, loss_type="rdro")
    assert "`Mine._compute_loss` is not called with rdro" in warnings_of(caplog)
    caplog.clear()
    make_trainer(qwen2, tmp_path, Mine, given, config, loss_type=theirs)
    make_trainer(qwen2, tmp_path, base, given, config, loss_type="rdro")
    assert "is not called" not in warnings_of(caplog)


@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro", "kto"])
def test_metrics_of_several_evaluation_sets_carry_their_names(qwen2, tmp_path, loss_type, figures):
    trainer = make(qwen2, tmp_path, loss_type)
    sets = {"easy": tiny_preferences(8, seed=1), "hard": tiny_preferences(8, seed=2)}
    trainer.eval_dataset = {
        name: trainer._prepare_dataset(data, trainer.processing_class, trainer.args, name)
        for name, data in sets.items()
    }
    trainer.args.eval_strategy = "steps"
    trainer.evaluate()
    logged = {key for entry in trainer.state.log_history for key in entry}
    for name in sets:
        assert {f"eval_{name}_loss", f"eval_{name}_rewards/chosen"} <= logged
    assert "eval_rewards/chosen" not in logged
    plot_run(trainer.state.log_history, tmp_path / "curves.png")
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["held-out (easy)", "held-out (hard)"]


@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro", "kldpo"])
def test_a_compiled_model_trains(qwen2, tmp_path, loss_type, monkeypatch):
    """`torch.compile` gives a module whose truth value is an error for containers."""
    trainer = make(qwen2, tmp_path, loss_type, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
