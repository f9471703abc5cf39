"""The optimiser and the schedule are built for one number before a model is loaded."""

import pytest

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.checks.optimisation import check_optimisation

from ..tiny import cpu_args, tiny_preferences


def config(config_class=DPOConfig, **options):
    return config_class(**cpu_args(output_dir="out", **options))


WRONG = [
    ({"optim": "sgd", "optim_args": "momentum=x"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args"),
    ({"optim": "rmsprop", "optim_args": "alpha=-1"}, "optim_args"),
    ({"optim": "adagrad", "optim_args": "lr_decay=y"}, "optim_args"),
    ({"adam_beta1": 0}, "optim"),  # a whole number beside one that is not
    ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_scheduler"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": float("nan")}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler"),
]
RIGHT = [
    {},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
    {"optim": "adafactor"},
    {"optim": "adamw_torch_fused"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}, "max_steps": 100},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "lr_scheduler_kwargs": {"factor": 0.5}},
    {"max_steps": 1},
    {"learning_rate": 0.0},
]


@pytest.mark.parametrize(("options", "named"), WRONG, ids=str)
def test_what_cannot_be_built(options, named):
    with pytest.raises(ValueError, match=named) as error:
        check_optimisation(config(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", RIGHT, ids=str)
def test_what_can(options):
    check_optimisation(config(**options))


@pytest.mark.parametrize(
    ("optim", "given", "named"),
    [
        ("sgd", "momentun=0.9", "momentun=0.9"),
        ("sgd", "momentum=0.9,dampning=0.5", "dampning=0.5"),
        ("adamw_torch", "beta1=0.5", "beta1=0.5"),
        ("sgd", "momentum=0.9", None),
    ],
)
def test_names_that_an_optimiser_does_not_read(optim, given, named, caplog):
    args = config(optim=optim, optim_args=given)
    check_optimisation(args)
    said = [record.getMessage() for record in caplog.records if "makes no difference" in record.getMessage()]
    assert [named in sentence for sentence in said] == ([True] if named else [])
    assert args.optim_args == given


@pytest.mark.parametrize(("trainer", "config_class"), [(DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)])
def test_before_a_model_is_loaded(trainer, config_class, qwen2, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    args = config(config_class, lr_scheduler_kwargs={"x": 1})
    with pytest.raises(ValueError, match="lr_scheduler_kwargs"):
        trainer(qwen2, args=args, train_dataset=tiny_preferences(4))
