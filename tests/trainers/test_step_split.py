"""One optimiser step on the same 8 pairs gives the same parameters however they are cut into micro-batches."""

import pytest
import torch

from ..loss_cases import LOSS_CASES, WEIGHTS
from ..tiny import tiny_preferences
from ..training import SGD, make_trainer, train, two_models


# One that weighs the pairs of a step, for what is only about such
KLDPO = {"loss_type": "kldpo", **LOSS_CASES["kldpo"].settings}
LOSSES = {
    **{name: {"loss_type": name, **case.settings} for name, case in LOSS_CASES.items()},
    "kldpo_ipo": {"loss_type": "kldpo", "kldpo_tau": 0.5, "inner_loss_type": "ipo"},
    "kldpo_target": {"loss_type": "kldpo", "kldpo_target_ess": 0.6},
    "kldpo+sigmoid": {**KLDPO, "loss_type": ["kldpo", "sigmoid"], "loss_weights": [1.0, 0.3]},
    "rdro+sigmoid+ipo": {"loss_type": ["rdro", "sigmoid", "ipo"], "loss_weights": [0.5, 1.0, 0.3]},
    "wdpo+hinge": {"loss_type": ["wdpo", "hinge"], "wdpo_rho": 0.5},
    "kldpo_dpop": {"loss_type": "kldpo", "kldpo_tau": 0.5, "inner_loss_type": "dpop"},
    "wdpo, strong": {"loss_type": "wdpo", "wdpo_rho": 0.5},
}


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_step(output_dir, micro_batch, accumulation, **settings):
    """The update of one SGD step from a policy that is not the reference, so that the pairs' losses differ."""
    models = two_models()
    trainer = make_trainer(
        models.pop("model"),
        output_dir,
        trainer_kwargs={"train_dataset": tiny_preferences(8), **models},
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **{**SGD, "learning_rate": 1.0, "max_grad_norm": 0.0},
        **settings,
    )
    start = flat(trainer.model)
    trainer.train()
    return flat(trainer.model) - start, trainer.state.log_history[0]


@pytest.mark.parametrize("name", LOSSES)
def test_split_invariance(tmp_path, name):
    whole, whole_log = one_step(tmp_path, 8, 1, **LOSSES[name])
    # The last splits 8 pairs into 3 + 3 + 2, where TRL's mean of means would let the last two count for more
    for micro_batch, accumulation in ((4, 2), (2, 4), (1, 8), (3, 3)):
        split, log = one_step(tmp_path, micro_batch, accumulation, **LOSSES[name])
        assert (split - whole).norm() < 1e-5 * whole.norm(), (micro_batch, accumulation)
        assert log["loss"] == pytest.approx(whole_log["loss"], rel=1e-5)
        for key in [key for key in whole_log if key.rpartition("/")[2] in WEIGHTS]:
            assert log[key] == pytest.approx(whole_log[key], rel=1e-4)


def test_the_effective_sample_size_of_a_step_is_the_one_asked_for(tmp_path):
    for micro_batch, accumulation in ((8, 1), (1, 8)):
        _, log = one_step(tmp_path, micro_batch, accumulation, **LOSSES["kldpo_target"])
        assert log["kldpo/effective_sample_size"] == pytest.approx(0.6, abs=1e-5) and log["kldpo/tau"] > 0


def test_kldpo_at_micro_batch_one_is_not_dpo(tmp_path):
    """A softmax over each micro-batch would be DPO here."""
    kldpo, _ = one_step(tmp_path, 1, 8, **KLDPO)
    dpo, _ = one_step(tmp_path, 1, 8, loss_type="sigmoid")
    assert (kldpo - dpo).norm() > 0.1 * dpo.norm()


@pytest.mark.parametrize(("name", "tau"), [("kldpo", 0.05), ("drdpo", -0.05)])
def test_a_step_against_weights_by_hand(tmp_path, name, tau):
    """The update is minus the softmax-weighted sum of the pairs' DPO gradients, taken one pair at a time."""
    update, log = one_step(tmp_path, 2, 4, **LOSSES[name])
    models = two_models()
    policy = models.pop("model")
    kwargs = {"train_dataset": tiny_preferences(8), **models}
    trainer = make_trainer(policy, tmp_path, trainer_kwargs=kwargs, per_device_train_batch_size=1)
    losses, gradients = [], []
    for batch in trainer.get_train_dataloader():
        policy.zero_grad()
        loss = trainer.compute_loss(policy, batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    losses = torch.stack(losses)
    weights = torch.softmax(losses / tau, dim=0)
    expected = -(weights.unsqueeze(1) * torch.stack(gradients)).sum(dim=0)
    assert (update - expected).norm() < 1e-5 * expected.norm()
    assert log["loss"] == pytest.approx(
        tau * (torch.logsumexp(losses / tau, 0) - torch.tensor(8.0).log()).item(), 1e-5
    )
    assert log[f"{name}/effective_sample_size"] == pytest.approx(1 / (8 * weights.square().sum()).item(), rel=1e-4)
    assert log[f"{name}/max_weight"] == pytest.approx(weights.max().item(), rel=1e-4)


def test_kldpo_refuses_a_micro_batch_without_its_step(qwen2, tmp_path):
    trainer = train(qwen2, tmp_path, loss_type="kldpo", gradient_accumulation_steps=2, max_steps=1)
    with pytest.raises(RuntimeError, match="without the weights of the step"):
        trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))


def test_kldpo_costs_no_more_forwards_than_dpo(qwen2, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make_trainer(qwen2, tmp_path, loss_type="kldpo", **settings)
    assert forwards(trainer) == {"policy": 4, "reference": 4}


def test_weights_known_before_cost_one_policy_forward_per_micro_batch(qwen2, tmp_path):
    """And none for the reference, whose log-probabilities are reused."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make_trainer(qwen2, tmp_path, loss_type=["kldpo", "sigmoid"], **settings)
    assert forwards(trainer) == {"policy": 8, "reference": 4}


def forwards(trainer) -> dict[str, int]:
    counts = {"policy": 0, "reference": 0}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    trainer.train()
    return counts
