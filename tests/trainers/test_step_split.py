"""One optimiser step on the same 8 pairs gives the same parameters however they are cut into micro-batches."""

import pytest
import torch

from trl_rdro import DPOConfig, DPOTrainer

from ..loss_cases import LOSS_CASES, WEIGHTS
from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer, with_columns


LOSSES = {
    **{name: {"loss_type": name, **case.settings} for name, case in LOSS_CASES.items()},
    "kldpo_ipo": {"loss_type": "kldpo", "kldpo_tau": 0.5, "inner_loss_type": "ipo"},
    "kldpo+sigmoid": {"loss_type": ["kldpo", "sigmoid"], "loss_weights": [1.0, 0.3], "kldpo_tau": 0.05},
    "kldpo_dpop": {"loss_type": "kldpo", "kldpo_tau": 0.5, "inner_loss_type": "dpop"},
    "dpo": {"loss_type": "sigmoid"},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("reference"))


def away_from_reference(policy, args):
    """A trainer of a policy that is not its reference, on the 8 pairs."""
    return DPOTrainer(
        policy,
        ref_model=tiny_qwen2(seed=0),
        args=args,
        train_dataset=with_columns(tiny_preferences(8), args.loss_type),
        processing_class=tiny_tokenizer(),
    )


def one_step(reference, output_dir, micro_batch, accumulation, **settings):
    """The update of one SGD step from a policy that is not the reference, so that the pairs' losses differ."""
    policy = tiny_qwen2(seed=1)
    start = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    args = DPOConfig(
        **cpu_args(
            output_dir=str(output_dir),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            **settings,
        )
    )
    trainer = away_from_reference(policy, args)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in policy.parameters()]) - start, trainer.state.log_history[0]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dpo"])
def test_split_invariance(reference, tmp_path, name):
    whole, whole_log = one_step(reference, tmp_path, 8, 1, **LOSSES[name])
    # The last splits 8 pairs into 3 + 3 + 2, where TRL's mean of means would let the last two count for more
    splits = [(4, 2), (2, 4), (1, 8)] + ([] if "+" in name else [(3, 3)])
    for micro_batch, accumulation in splits:
        split, log = one_step(reference, tmp_path, micro_batch, accumulation, **LOSSES[name])
        assert (split - whole).norm() < 1e-5 * whole.norm(), (
            micro_batch,
            accumulation,
        )
        assert log["loss"] == pytest.approx(whole_log["loss"], rel=1e-5)
        for key in whole_log.keys() & {f"{loss}/{metric}" for loss in ("kldpo", "drdpo") for metric in WEIGHTS}:
            assert log[key] == pytest.approx(whole_log[key], rel=1e-4)


def test_kldpo_at_micro_batch_one_is_not_dpo(reference, tmp_path):
    """A softmax over each micro-batch would be DPO here."""
    kldpo, _ = one_step(reference, tmp_path, 1, 8, **LOSSES["kldpo"])
    dpo, _ = one_step(reference, tmp_path, 1, 8, **LOSSES["dpo"])
    assert (kldpo - dpo).norm() > 0.1 * dpo.norm()


@pytest.mark.parametrize(("name", "tau"), [("kldpo", 0.05), ("drdpo", -0.05)])
def test_a_step_against_weights_by_hand(reference, tmp_path, name, tau):
    """The update is minus the softmax-weighted sum of the pairs' DPO gradients, taken one pair at a time."""
    update, log = one_step(reference, tmp_path, 2, 4, **LOSSES[name])
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), per_device_train_batch_size=1))
    policy = tiny_qwen2(seed=1)
    trainer = away_from_reference(policy, args)
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


def test_kldpo_refuses_a_micro_batch_without_its_step(reference, tmp_path):
    args = DPOConfig(
        **cpu_args(output_dir=str(tmp_path), loss_type="kldpo", gradient_accumulation_steps=2, max_steps=1)
    )
    trainer = DPOTrainer(reference, args=args, train_dataset=tiny_preferences(16))
    trainer.train()
    with pytest.raises(RuntimeError, match="without the weights of the step"):
        trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))


def test_kldpo_extra_cost_is_one_policy_forward_per_micro_batch(reference, tmp_path):
    """And none for the reference, whose log-probabilities are reused."""
    counts = {"policy": 0, "reference": 0}
    args = DPOConfig(
        **cpu_args(
            output_dir=str(tmp_path),
            loss_type="kldpo",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=1,
        )
    )
    trainer = DPOTrainer(reference, args=args, train_dataset=tiny_preferences(8))
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    trainer.train()
    assert counts == {"policy": 8, "reference": 4}
