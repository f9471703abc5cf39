"""Under dropout and NEFTune every forward that is compared with another sees the same noise."""

import pytest
import torch
from peft import LoraConfig
from transformers.integrations.neftune import activate_neftune

from trl_rdro import DPOTrainer
from trl_rdro.trainers import input_gradient_penalty
from trl_rdro.trainers.noise import NoiseState
from trl_rdro.trainers.step import Step

from ..tiny import tiny_preferences, tiny_qwen2, tiny_tokenizer
from ..training import SGD, make_trainer


LORA = LoraConfig(
    r=4, lora_alpha=1, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
)
# What makes a forward random: settings of the model's config and of ours, and an adapter
NOISES = {
    "attention": ({"attention_dropout": 0.2}, {}, None),
    "neftune": ({}, {"neftune_noise_alpha": 5.0}, None),
    "lora": ({}, {"disable_dropout": False}, LORA),
}


def make(tmp_path, noise, rows=4, **settings) -> DPOTrainer:
    model_settings, own, adapter = NOISES[noise]
    model = tiny_qwen2(seed=1, attn_implementation="eager", **model_settings)
    given = {"train_dataset": tiny_preferences(8), "processing_class": tiny_tokenizer(), "peft_config": adapter}
    given["ref_model"] = None if adapter else tiny_qwen2(seed=0)
    step = {**SGD, "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1, "per_device_train_batch_size": rows}
    return make_trainer(model, tmp_path, trainer_kwargs=given, **{**step, **own, **settings})


def gradient(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


def start_noise(trainer):
    """What `Trainer.train` does at its start."""
    if trainer.neftune_noise_alpha is not None:
        activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)


def penalty_by_double_backward(trainer, batch, rho) -> torch.Tensor:
    """The gradient of base loss plus penalty under the masks that the present state of the generator gives, from the
    logits and with a graph of the gradient."""
    ref_logps = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
    embedding = trainer.model.get_input_embeddings()
    captured = []
    handle = embedding.register_forward_hook(
        lambda _module, _args, output: captured.append(output.requires_grad_()) or output
    )
    torch.manual_seed(7)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    chosen, rejected = ((log_probs * mask).sum(dim=1) - ref_logps).chunk(2)
    pair_losses = -torch.nn.functional.logsigmoid(trainer.beta * (chosen - rejected))
    (g,) = torch.autograd.grad(pair_losses.sum(), captured[0], create_graph=True)
    penalty = rho * g.square().flatten(1).sum(dim=1).view(2, -1).sum(dim=0)
    (pair_losses + penalty).mean().backward()
    return gradient(trainer)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("noise", NOISES)
def test_wdpo_under_noise_is_exact_for_its_masks(tmp_path, noise, checkpointing):
    rho = 2.0
    settings = {"loss_type": "wdpo", "wdpo_rho": rho, "beta": 0.5}
    if checkpointing is not None:
        settings |= {
            "activation_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    trainer = make(tmp_path, noise, **settings)
    trainer.model.train()
    start_noise(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(7)
    trainer.compute_loss(trainer.model, batch).backward()
    ours, gap = gradient(trainer), trainer._metrics["train"]["wdpo/gap"][-1]
    assert gap < 0.01
    trainer.model.zero_grad()
    trainer.model.gradient_checkpointing_disable()
    exact = penalty_by_double_backward(trainer, batch, rho)
    assert (ours - exact).norm() < 0.01 * exact.norm()
    # Other masks give another gradient: the comparison can fail
    trainer.model.zero_grad()
    torch.manual_seed(8)
    trainer.compute_loss(trainer.model, batch).backward()
    assert (gradient(trainer) - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("noise", NOISES)
def test_a_one_sided_difference_is_taken_under_the_same_noise(tmp_path, noise, monkeypatch):
    """Its mean over both sides is exact for the masks of its first pass, which are those of the second too."""
    rho = 2.0
    settings = {"loss_type": "wdpo", "wdpo_difference": "one_sided", "wdpo_rho": rho, "beta": 0.5}
    trainer = make(tmp_path, noise, **settings)
    trainer.model.train()
    start_noise(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch)  # finds k
    found, share = [], trainer._finite_difference_step.share
    for side in (1, -1):
        monkeypatch.setattr(input_gradient_penalty, "signs", lambda ids, *_, side=side: torch.full((4,), side))
        trainer._finite_difference_step.share = share
        trainer.model.zero_grad()
        torch.manual_seed(7)
        trainer.compute_loss(trainer.model, batch).backward()
        found.append(gradient(trainer))
    trainer.model.zero_grad()
    exact = penalty_by_double_backward(trainer, batch, rho)
    assert ((found[0] + found[1]) / 2 - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("before", [False, True], ids=["one pass", "weighed before"])
@pytest.mark.parametrize("noise", NOISES)
def test_kldpo_weights_belong_to_the_losses_they_multiply(tmp_path, noise, before, monkeypatch):
    """With micro-batches of one the mean of the step's weighted losses is tau log mean exp(l / tau) only if the losses
    of the pass that is trained on are those of the pass before it."""
    tau = 0.02
    if before:
        monkeypatch.setattr(DPOTrainer, "_reason_to_weigh_before", lambda self: "a test")
    trainer = make(tmp_path, noise, rows=1, loss_type="kldpo", kldpo_tau=tau, gradient_accumulation_steps=8, beta=0.5)
    seen, prepare = [], trainer._prepare_step
    trainer._prepare_step = lambda batch_samples: (prepare(batch_samples), seen.extend(batch_samples))[0]
    trainer.train()
    step = next(value for value in seen[0].values() if isinstance(value, Step))
    losses = (step if before else step.weights).all_pair_losses
    expected = tau * (torch.logsumexp(losses.double() / tau, 0) - torch.tensor(8.0).double().log())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_state_sees_draws_and_repeats_them():
    noise = NoiseState(torch.device("cpu"))
    assert not noise.was_drawn_from()
    first = torch.rand(3)
    assert noise.was_drawn_from()
    noise.restore()
    assert torch.equal(torch.rand(3), first)
