"""WDPO's parameter gradients, made of first derivatives only, against exact double backward.

The exact ones come from a float64 copy of the policy with eager attention and plain logits, the one setting in which
autograd can differentiate twice.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import TrainerState
from trl.kernels import ChunkedLogProbFunction

from trl_rdro.trainers.input_gradient import FiniteDifferenceStep

from ..tiny import save_tiny, tiny_preferences
from ..training import lora, make_trainer


BETA = 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        (kind, tie): save_tiny(tmp_path_factory.mktemp("model"), kind, tie=tie)
        for kind in ("qwen2", "llama")
        for tie in (True, False)
    }


def moved_trainer(path, output_dir, use_lora=False, **settings):
    kwargs = {"train_dataset": tiny_preferences(4), "peft_config": lora() if use_lora else None}
    settings = {"loss_type": "wdpo", "beta": BETA, "per_device_train_batch_size": 4, **settings}
    trainer = make_trainer(path, output_dir, trainer_kwargs=kwargs, **settings)
    # Away from the reference, where the pairs' losses and gradients differ
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer


def gradients(model):
    return {name: p.grad.detach().double() for name, p in model.named_parameters() if p.grad is not None}


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def trained_gradients(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    with_checkpointing = trainer.args.gradient_checkpointing
    if with_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def exact_gradients(trainer, path, batch, use_lora, rho, penalty):
    """Loss and gradients of mean(l) + penalty by double backward in float64."""
    policy = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    if use_lora:
        policy = get_peft_model(policy, lora())
    policy.load_state_dict(trainer.model.state_dict())
    policy = policy.double().train()
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double()

    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]

    def logps(model, embeddings):
        logits = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (tokens * mask).sum(1)

    embeddings = policy.get_input_embeddings()(ids)
    if not embeddings.requires_grad:
        embeddings.requires_grad_()
    with torch.no_grad():
        reference_logps = logps(reference, reference.get_input_embeddings()(ids))
    chosen, rejected = (logps(policy, embeddings) - reference_logps).chunk(2)
    pair_losses = -F.logsigmoid(BETA * (chosen - rejected))
    (gradient,) = torch.autograd.grad(pair_losses.sum(), embeddings, create_graph=True)
    squares = sum(gradient.flatten(1).square().sum(1).chunk(2))
    term = rho * (squares.mean() if penalty == "squared" else squares.mean().sqrt())
    (pair_losses.mean() + term).backward()
    return (pair_losses.mean() + term).item(), gradients(policy), squares.detach().sqrt()


def compare(approximate, exact):
    assert approximate.keys() == exact.keys()
    a, b = flat(approximate), flat(exact)
    return F.cosine_similarity(a, b, dim=0).item(), ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("penalty", ["squared", "rms"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointing", "reentrant"])
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind, tie", [("qwen2", True), ("qwen2", False), ("llama", False)])
def test_against_double_backward(models, tmp_path, kind, tie, use_lora, checkpointing, penalty):
    path, rho = models[kind, tie], 3.0  # large, so that the penalty makes up most of the gradient
    settings = {"wdpo_rho": rho, "wdpo_penalty": penalty}
    if checkpointing is not None:
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = moved_trainer(path, tmp_path, use_lora, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, ours = trained_gradients(trainer, batch)
    exact_loss, exact, norms = exact_gradients(trainer, path, batch, use_lora, rho, penalty)
    cosine, error = compare(ours, exact)
    assert cosine > 0.9999 and error < 5e-3
    assert loss == pytest.approx(exact_loss, rel=1e-4)
    metrics = trainer._metrics["train"]
    assert metrics["wdpo/grad_norm"][0] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert metrics["wdpo/gap"][0] < 0.01

    # The penalty's own gradient, without the loss's
    plain = moved_trainer(path, tmp_path, use_lora, **{**settings, "wdpo_rho": 0.0})
    _, base = trained_gradients(plain, batch)
    _, exact_base, _ = exact_gradients(trainer, path, batch, use_lora, 0.0, penalty)
    difference = {name: ours[name] - base[name] for name in ours}
    exact_difference = {name: exact[name] - exact_base[name] for name in exact}
    cosine, _ = compare(difference, exact_difference)
    assert cosine > 0.9999


@pytest.mark.parametrize("inner", ["ipo", "hinge"])
def test_evaluation_needs_no_graph_and_gives_the_exact_penalty(models, tmp_path, inner):
    """Without gradients, as in evaluation, the loss is the same as in training."""
    trainer = moved_trainer(models["qwen2", False], tmp_path, wdpo_rho=1.0, inner_loss_type=inner)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, _ = trained_gradients(trainer, batch)
    trainer.model.eval()
    with torch.no_grad():
        evaluated = trainer.compute_loss(trainer.model, batch)
    assert not evaluated.requires_grad
    assert evaluated.item() == pytest.approx(loss, rel=1e-5)
    assert trainer._metrics["eval"]["wdpo/penalty"][0] > 0 and "wdpo/gap" not in trainer._metrics["eval"]


def test_padding_does_not_count(models, tmp_path):
    """A pair's gradient and step are the same alone and beside a longer one."""
    trainer = moved_trainer(models["qwen2", False], tmp_path, wdpo_rho=1.0)
    rows = [trainer.train_dataset[i] for i in range(4)]
    rows[3] = {**rows[3], "prompt_ids": rows[3]["prompt_ids"] * 6}
    together, alone = trainer.data_collator(rows), [trainer.data_collator([row]) for row in rows]
    loss, gradient = trained_gradients(trainer, together)
    parts = [trained_gradients(trainer, batch) for batch in alone]
    assert loss == pytest.approx(sum(part for part, _ in parts) / 4, rel=1e-5)
    mean = {name: sum(part[name] for _, part in parts) / 4 for name in gradient}
    assert compare(gradient, mean)[1] < 1e-3


def test_two_forwards_a_training_step_one_in_evaluation(models, tmp_path):
    """One for the input gradient, one for both perturbed batches together."""
    trainer = moved_trainer(models["qwen2", False], tmp_path)
    rows = []
    trainer.model.register_forward_hook(
        lambda _m, _a, kwargs, _o: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trained_gradients(trainer, batch)
    assert rows == [8, 16]
    with torch.no_grad():
        trainer.compute_loss(trainer.model.eval(), batch)
    assert rows == [8, 16, 8]


@pytest.mark.parametrize("tie", [True, False])
def test_the_pass_to_the_embeddings_computes_no_weight_gradient_of_the_head(models, tmp_path, monkeypatch, tie):
    """TRL's head would compute it although nothing asks for it."""
    trainer = moved_trainer(models["qwen2", tie], tmp_path)
    asked, backward = [], ChunkedLogProbFunction.backward

    def recording(ctx, *gradients):
        asked.append(ctx.needs_input_grad[1])
        return backward(ctx, *gradients)

    monkeypatch.setattr(ChunkedLogProbFunction, "backward", staticmethod(recording))
    _, found = trained_gradients(trainer, next(iter(trainer.get_train_dataloader())))
    assert asked == [False, True]
    assert len(found) == len(list(trainer.model.parameters()))


def test_bfloat16(models, tmp_path):
    """In half precision the default step is five times as large, and the direction still right."""
    trainer = moved_trainer(models["qwen2", False], tmp_path, wdpo_rho=3.0)
    batch = next(iter(trainer.get_train_dataloader()))
    _, exact, _ = exact_gradients(trainer, models["qwen2", False], batch, False, 3.0, "squared")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, ours = trained_gradients(trainer, batch)
    assert trainer._metrics["train"]["wdpo/eps"] == [pytest.approx(5e-3)]
    assert compare(ours, exact)[0] > 0.98


# The lazy penalty


def lazy(path, output_dir, interval, accumulation=1, steps=4):
    """The log and the parameters after a few steps."""
    trainer = moved_trainer(
        path,
        output_dir,
        wdpo_interval=interval,
        wdpo_rho=0.1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        logging_steps=1,
        num_train_epochs=8,
    )
    rows = []
    trainer.model.register_forward_hook(
        lambda _m, _a, kwargs, _o: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    return trainer, rows


def test_an_interval_of_one_is_the_plain_penalty(models, tmp_path):
    trainer, rows = lazy(models["qwen2", False], tmp_path, interval=1)
    plain = moved_trainer(
        models["qwen2", False],
        tmp_path,
        wdpo_rho=0.1,
        per_device_train_batch_size=1,
        max_steps=4,
        logging_steps=1,
        num_train_epochs=8,
    )
    plain.train()
    assert rows == [2, 4] * 4
    for lazy_parameter, parameter in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(lazy_parameter, parameter)


@pytest.mark.parametrize("accumulation, steps", [(1, 4), (2, 2)])
def test_every_other_micro_batch_is_penalised_twice_as_much(models, tmp_path, accumulation, steps):
    trainer, rows = lazy(models["qwen2", False], tmp_path, interval=2, accumulation=accumulation, steps=steps)
    assert rows == [2, 4, 2] * 2  # micro-batches 0 and 2
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["wdpo/penalty" in entry for entry in log] == ([True, False] * 2 if accumulation == 1 else [True] * 2)

    batch = next(iter(trainer.get_train_dataloader()))
    trainer.state.global_step = 0
    penalised, _ = trained_gradients(trainer, batch)
    penalty = trainer._metrics["train"]["wdpo/penalty"][-1]
    trainer.args.wdpo_rho = 0.0
    base, _ = trained_gradients(trainer, batch)
    assert penalised - base == pytest.approx(2 * penalty, rel=1e-4)


# The step of the central difference


def test_a_given_step_is_kept(models, tmp_path):
    trainer = moved_trainer(models["qwen2", False], tmp_path, wdpo_eps=0.3)
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(3):
        trained_gradients(trainer, batch)
    assert trainer._metrics["train"]["wdpo/eps"] == [pytest.approx(0.3)] * 3


def test_too_large_a_step_is_adapted_until_the_gap_is_small(models, tmp_path, monkeypatch):
    monkeypatch.setattr(FiniteDifferenceStep, "LARGEST_STEP", 1.0)
    trainer = moved_trainer(models["qwen2", False], tmp_path)
    trainer._finite_difference_step.scale = 2.0**9
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(12):
        trained_gradients(trainer, batch)
    gaps = trainer._metrics["train"]["wdpo/gap"]
    assert gaps[0] > 0.1 and gaps[-1] < FiniteDifferenceStep.GOOD_GAP


def test_the_step_is_never_so_large_that_the_base_losss_gradient_is_off():
    step = FiniteDifferenceStep()
    for scale in (1.0, 2.0**3, 2.0**9):
        step.scale = scale
        for dtype, default in ((torch.float32, 1e-3), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)):
            assert step.relative_step(dtype) == min(scale * default, 2e-2)


@pytest.mark.parametrize("shift", [-100.0, -135.0, -1000.0])
@pytest.mark.parametrize("other", ["rdro", "sft"])
def test_a_pair_with_a_large_margin_has_a_direction(models, tmp_path, other, shift):
    """In float32 the squares of its gradient vanish, then its gradient. Beside another loss its direction must still
    be a unit vector, or 0 where nothing is left."""
    trainer = moved_trainer(models["qwen2", False], tmp_path, loss_type=["wdpo", other], beta=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_ref_log_probs = lambda _model, inputs: tuple(
        torch.full((len(inputs["input_ids"]) // 2,), value) for value in (shift, -30.0)
    )
    _, found = trained_gradients(trainer, batch)
    metrics = trainer._metrics["train"]
    norm, gap = metrics["wdpo/grad_norm"][-1], metrics["wdpo/gap"][-1]
    assert norm < 1e-25 and gap < 0.05
    assert (norm > 0) == (shift > -1000)  # beta h is about 70, 105 and 970
    trainer.args.wdpo_rho = 0.0
    _, without = trained_gradients(trainer, batch)
    assert compare(found, without)[1] < 1e-2


def test_step_turns_round_when_the_gap_grows():
    step = FiniteDifferenceStep()
    for gap, scale in [(0.01, 1.0), (0.2, 0.5), (0.3, 1.0), (0.2, 2.0), (0.01, 2.0), (0.5, 1.0)]:
        step.adapt(gap)
        assert step.scale == scale
    for gap in range(1, 100):
        step.adapt(float(gap))
        assert step.SMALLEST <= step.scale <= step.LARGEST


def test_step_is_saved_with_the_checkpoint(models, tmp_path, monkeypatch):
    """It is part of the state that a resumed run needs to give the same weights."""
    monkeypatch.setattr(FiniteDifferenceStep, "GOOD_GAP", 0.0)  # adapted at every step
    trainer = moved_trainer(
        models["qwen2", False], tmp_path, max_steps=2, save_strategy="steps", save_steps=1, logging_steps=1
    )
    trainer._finite_difference_step.scale = 2.0**3
    trainer.train()
    scale = trainer._finite_difference_step.scale
    assert scale != 2.0**3
    saved = TrainerState.load_from_json(str(tmp_path / "checkpoint-2" / "trainer_state.json"))
    assert saved.stateful_callbacks["FiniteDifferenceStep"]["attributes"]["scale"] == scale

    for restore in (False, True):  # the Trainer's own way of restoring callbacks replaces them
        resumed = moved_trainer(
            models["qwen2", False],
            tmp_path,
            max_steps=3,
            restore_callback_states_from_checkpoint=restore,
            resume_with_changes=True,
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        first = resumed._finite_difference_step.scale
        assert first in (scale / 2, scale, scale * 2)
