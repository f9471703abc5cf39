"""kldpo and drdpo in one pass over an accumulated step equal the weights that are known before it."""

import pytest
import torch
from transformers import TrainerCallback

from trl_rdro import DPOTrainer
from trl_rdro.trainers.step_weights import StepWeights

from ..tiny import tiny_preferences
from ..training import SGD, make_trainer, measured, parameters, same_parameters, two_models


KLDPO = {"loss_type": "kldpo", "kldpo_tau": 0.05}
SETTINGS = {
    "kldpo": KLDPO,
    "drdpo": {"loss_type": "drdpo", "drdpo_beta": 0.05},
    "one pair decides, and m moves": {**KLDPO, "kldpo_tau": 1e-4},
    "one pair decides, the best": {"loss_type": "drdpo", "drdpo_beta": 1e-4},
    "inner ipo": {**KLDPO, "inner_loss_type": "ipo"},
    "half the loss": {**KLDPO, "loss_weights": [0.5]},
    "clipped": {**KLDPO, "max_grad_norm": 1e-2},
    "packed and dealt": {**KLDPO, "padding_free": True},
}


class Gradients(TrainerCallback):
    """Those with which each optimiser step is made."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]))


def run(output_dir, weights=None, **settings):
    """11 pairs, two at a time and four a step: the last step is of three."""
    pairs, models = tiny_preferences(11), two_models()
    if weights is not None:
        pairs = pairs.add_column("weight", weights)
    settings = {**SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, **settings}
    kwargs = {"train_dataset": pairs, **models}
    trainer = make_trainer(kwargs.pop("model"), output_dir, trainer_kwargs=kwargs, **settings)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps, measured(trainer)


def compare(output_dir, monkeypatch, **settings):
    found, log = run(output_dir, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "_reason_to_weigh_before", lambda self: "a test")
        expected, expected_log = run(output_dir, **settings)
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() > 0
    for one, other in zip(log, expected_log, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_weights_known_before(tmp_path, monkeypatch, name):
    """Gradients, the last step of two unequal micro-batches included, and all that is logged."""
    compare(tmp_path, monkeypatch, **SETTINGS[name])


def test_equals_weights_known_before_with_weighted_rows(tmp_path, monkeypatch):
    compare(tmp_path, monkeypatch, weights=[(1.0, 0.5, 2.0, 0.0)[i % 4] for i in range(11)], **KLDPO)


@pytest.mark.parametrize("tau", [1.0, 0.01, 1e-4, -1.0, -0.01, -1e-4])
def test_gradients_by_hand(tau):
    """Losses that grow and fall by thousands of tau: the accumulated gradient is multiplied where m moves."""
    generator = torch.Generator().manual_seed(0)
    pair_losses = torch.rand(12, generator=generator)
    gradients = torch.randn(12, 5, generator=generator)
    weights, accumulated, moved = StepWeights(tau), torch.zeros(5), 0
    for part in range(0, 12, 2):
        here = slice(part, part + 2)
        factor = weights.take(pair_losses[here])
        moved += factor != 1
        accumulated = factor * accumulated + (weights.of(pair_losses[here]).unsqueeze(1) * gradients[here]).sum(0) / 12
    expected = torch.softmax(pair_losses.double() / tau, 0) @ gradients.double()
    assert accumulated.isfinite().all()
    assert (accumulated / weights.mean - expected).norm() < 1e-4 * expected.norm()
    value = tau * (torch.logsumexp(pair_losses.double() / tau, 0) - torch.tensor(12.0).log())
    assert weights.objective.item() == pytest.approx(value.item(), rel=1e-5)
    assert (moved > 0) == (abs(tau) < 0.01)


def test_resumed_run_is_the_same(tmp_path):
    """To the last bit: nothing is carried from step to step."""

    def make():
        models = two_models()
        kwargs = {"train_dataset": tiny_preferences(24), **models}
        return make_trainer(
            kwargs.pop("model"), tmp_path, trainer_kwargs=kwargs, per_device_train_batch_size=2, max_steps=4,
            gradient_accumulation_steps=3, save_strategy="steps", save_steps=2, **KLDPO,
        )  # fmt: skip

    whole, again = make(), make()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_parameters(parameters(whole), parameters(again))


def test_a_loss_that_is_not_finite_is_met_in_its_micro_batch(tmp_path):
    models = two_models()
    kwargs = {"train_dataset": tiny_preferences(8), **models}
    trainer = make_trainer(
        kwargs.pop("model"), tmp_path, trainer_kwargs=kwargs, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, **KLDPO,
    )  # fmt: skip
    compute, calls = trainer.compute_ref_log_probs, []

    def once_infinite(model, inputs):
        calls.append(None)
        chosen, rejected = compute(model, inputs)
        return chosen, rejected * (torch.inf if len(calls) == 2 else 1)

    trainer.compute_ref_log_probs = once_infinite
    with pytest.raises(FloatingPointError, match="`kldpo` at step 1: .*logratios/rejected not finite"):
        trainer.train()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (KLDPO, "`kldpo`: the pairs of a step are weighed in one pass over it."),
        (
            {**KLDPO, "loss_type": ["kldpo", "sigmoid"]},
            "`kldpo`: the pairs of a step are weighed by one more forward of each before it: another loss stands",
        ),
        ({**KLDPO, "gradient_accumulation_steps": 1}, None),
        ({"loss_type": "sigmoid"}, None),
    ],
)
def test_one_line_says_which(tmp_path, messages, settings, said):
    models = two_models()
    settings = {"gradient_accumulation_steps": 2, **settings}
    make_trainer(models.pop("model"), tmp_path, trainer_kwargs=models, **settings)
    lines = [message for message in messages() if "are weighed" in message]
    assert len(lines) == (said is not None) and all(said in line for line in lines)
