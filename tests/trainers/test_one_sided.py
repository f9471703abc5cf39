"""WDPO's one-sided difference, against exact double backward and the central difference."""

import pytest
import torch

from trl_rdro import DPOConfig
from trl_rdro.trainers import input_gradient_penalty
from trl_rdro.trainers.one_sided import kept_from_1, signs

from ..packing.models import ARCHITECTURES
from ..tiny import cpu_args, save_tiny, tiny_preferences
from ..training import SGD, make_trainer, parameters, same_parameters, steps, two_models
from .test_input_gradient import compare, exact_gradients, flat, moved_trainer, trained_gradients


ONE_SIDED = {"loss_type": "wdpo", "wdpo_difference": "one_sided"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2", tie=True)


@pytest.fixture
def side(monkeypatch):
    """Lets a test choose the side of all pairs."""

    def choose(sign: int) -> None:
        monkeypatch.setattr(
            input_gradient_penalty, "signs", lambda ids, mask, seed: torch.full((len(ids) // 2,), sign)
        )

    return choose


def both_sides(trainer, batch, side):
    """The loss, and the gradients with steps to either side. The first of all micro-batches finds k."""
    trained_gradients(trainer, batch)
    share, found = trainer._finite_difference_step.share, []
    for sign in (1, -1):
        side(sign)
        trainer._finite_difference_step.share = share
        loss, gradient = trained_gradients(trainer, batch)
        found.append(gradient)
    return loss, found, {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}


@pytest.mark.parametrize("penalty", ["squared", "rms"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointing", "reentrant"])
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_against_double_backward(model, tmp_path, side, use_lora, checkpointing, penalty):
    rho = 3.0  # large, so that the penalty makes up most of the gradient
    settings = {"wdpo_rho": rho, "wdpo_penalty": penalty, **ONE_SIDED}
    if checkpointing is not None:
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = moved_trainer(model, tmp_path, use_lora, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, single, mean = both_sides(trainer, batch, side)
    exact_loss, exact, norms = exact_gradients(trainer, model, batch, use_lora, rho, penalty)
    cosine, error = compare(mean, exact)
    assert cosine > 0.9999 and error < 5e-3
    for gradient in single:
        cosine, alone = compare(gradient, exact)
        assert cosine > 0.999 and error < alone < 5e-2
    assert loss == pytest.approx(exact_loss, rel=1e-4)
    metrics = trainer._metrics["train"]
    assert metrics["wdpo/grad_norm"][-1] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert metrics["wdpo/gap"][-1] < 0.05
    assert metrics["wdpo/eps"][-1] == pytest.approx(1e-3, rel=0.5)


def test_the_mean_of_both_sides_is_the_central_difference(model, tmp_path, side):
    trainer = moved_trainer(model, tmp_path, wdpo_rho=3.0, wdpo_eps=1e-2, **ONE_SIDED)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    _, single, mean = both_sides(trainer, batch, side)
    eps = trainer._metrics["train"]["wdpo/eps"][-1]
    assert eps == pytest.approx(1e-2, rel=1e-3)
    # Between points so near that the base loss, which the central difference reads from them, is the same
    central = moved_trainer(model, tmp_path, wdpo_rho=3.0, wdpo_eps=eps, loss_type="wdpo")
    base = moved_trainer(model, tmp_path, wdpo_rho=0.0, loss_type="wdpo")
    found, expected, plain = (
        flat(gradient) for gradient in (mean, trained_gradients(central, batch)[1], trained_gradients(base, batch)[1])
    )
    assert (found - expected).norm() < 1e-2 * (expected - plain).norm()
    assert (flat(single[0]) - expected).norm() > 10 * (found - expected).norm()


def test_pairs_add_up(model, tmp_path):
    """With k given: a batch is the mean of its pairs, whose sides are theirs wherever they stand; weights count."""
    trainer = moved_trainer(model, tmp_path, wdpo_rho=1.0, **ONE_SIDED)
    rows = [{**trainer.train_dataset[i], "weight": 1.0 + i % 2} for i in range(4)]
    rows[3] = {**rows[3], "prompt_ids": rows[3]["prompt_ids"] * 6}
    state = trainer._finite_difference_step

    def gradient(rows):
        state.share = 0.25
        return flat(trained_gradients(trainer, trainer.data_collator(rows))[1])

    alone = [gradient([row]) for row in rows]
    together = gradient(rows)
    assert (together - sum(alone) / 4).norm() < 1e-4 * together.norm()
    unweighted = gradient([{key: value for key, value in rows[1].items() if key != "weight"}])
    assert (alone[1] - 2 * unweighted).norm() < 1e-5 * alone[1].norm()


def test_two_passes(model, tmp_path):
    trainer = moved_trainer(model, tmp_path, **ONE_SIDED)
    rows = []
    trainer.model.register_forward_hook(
        lambda _m, _a, kwargs, _o: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trained_gradients(trainer, batch)
    assert rows == [8, 8, 8]  # the first of the run measures
    trained_gradients(trainer, batch)
    assert rows == [8] * 5
    with torch.no_grad():
        trainer.compute_loss(trainer.model.eval(), batch)
    assert rows == [8] * 6


def test_a_run_takes_steps_of_the_wanted_length_and_logs_the_loss(model, tmp_path):
    logs = {}
    for difference in ("central", "one_sided"):
        models = two_models()
        trainer = make_trainer(
            models.pop("model"), tmp_path, trainer_kwargs=models, loss_type="wdpo", wdpo_difference=difference,
            wdpo_rho=0.1, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, **SGD,
        )  # fmt: skip
        trainer.train()
        logs[difference] = steps(trainer)
    for one_sided, central in zip(logs["one_sided"], logs["central"], strict=True):
        assert one_sided.keys() == central.keys()
        for key in ("loss", "grad_norm", "wdpo/grad_norm", "wdpo/penalty"):
            assert one_sided[key] == pytest.approx(central[key], rel=1e-2), key
        assert 2e-4 < one_sided["wdpo/eps"] < 5e-3  # the first step takes three quarters of the norms
        assert one_sided["wdpo/gap"] < 0.02


@pytest.mark.parametrize("first_rows", [0, 14])
def test_pairs_that_have_no_gradient_leave_the_steps_of_the_others_alone(model, tmp_path, first_rows):
    """A weight of 0 for the whole of a micro-batch, also of the first one, and for half of another."""
    rows = tiny_preferences(16)
    weights = [0.0 if i < 5 or first_rows <= i < first_rows + 2 or i % 4 == 3 else 1.0 for i in range(16)]
    logs = {}
    for difference in ("central", "one_sided"):
        models = two_models()
        trainer = make_trainer(
            models.pop("model"), tmp_path,
            trainer_kwargs={**models, "train_dataset": rows.add_column("weight", weights)},
            loss_type="wdpo", wdpo_difference=difference, wdpo_rho=0.1, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_steps=8, train_sampling_strategy="sequential", **SGD,
        )  # fmt: skip
        trainer.train()
        logs[difference] = steps(trainer)
    for one_sided, central in zip(logs["one_sided"], logs["central"], strict=True):
        assert one_sided["loss"] == pytest.approx(central["loss"], rel=2e-2)
        assert one_sided["wdpo/eps"] < 5e-3 and one_sided["wdpo/gap"] < 0.02


def test_resumed_run_is_the_same(tmp_path):
    """To the last bit: k is kept, and sides are drawn by tokens and step."""

    def make():
        models = two_models()
        return make_trainer(
            models.pop("model"), tmp_path, trainer_kwargs=models, per_device_train_batch_size=2, max_steps=4,
            gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, wdpo_rho=0.1, **ONE_SIDED,
        )  # fmt: skip

    whole, again = make(), make()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_parameters(parameters(whole), parameters(again))
    assert again._finite_difference_step.share == whole._finite_difference_step.share


def test_sides():
    """As many of each, the same wherever a pair stands and whatever stands beside it, and others in another step."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 384, (2000, 20), generator=generator)
    mask = torch.ones_like(ids)
    found = signs(ids, mask, 7)
    assert set(found.tolist()) == {1, -1}
    assert abs(found.float().mean()) < 0.1
    alone = torch.cat([signs(ids[[i, i + 1000]], mask[:2], 7) for i in range(50)])
    assert alone.equal(found[:50])
    wider = torch.nn.functional.pad(ids, (0, 9), value=3), torch.nn.functional.pad(mask, (0, 9))
    assert signs(*wider, 7).equal(found)
    assert 0.4 < (signs(ids, mask, 8) != found).float().mean() < 0.6


def test_the_first_pass_keeps_a_gradient():
    for share in (0.0, 1e-3, 0.5, 0.9, 1.0, 1.5, 2.0, 50.0):
        kept = kept_from_1(share)
        assert abs(1 - kept) >= 0.5 and kept > 0 and (kept == share or 0.5 <= kept <= 2 or share == 0)


def test_refused(tmp_path):
    settings = cpu_args(output_dir=str(tmp_path), wdpo_difference="one_sided")
    with pytest.raises(ValueError, match="`wdpo_difference='one_sided'` cannot be combined with other losses"):
        DPOConfig(loss_type=["wdpo", "rdro"], **settings)
    with pytest.raises(ValueError, match="`wdpo_difference` has no value 'forward'"):
        DPOConfig(loss_type="wdpo", **{**settings, "wdpo_difference": "forward"})
    mixture = ARCHITECTURES["mixtral"](router_aux_loss_coef=0.1)
    kwargs = {**two_models(), "train_dataset": tiny_preferences(4), "ref_model": ARCHITECTURES["mixtral"](seed=3)}
    with pytest.raises(ValueError, match="cannot be used here: the auxiliary loss of a mixture of experts"):
        make_trainer(mixture, tmp_path, trainer_kwargs={k: v for k, v in kwargs.items() if k != "model"}, **ONE_SIDED)
