"""mrpo's second reference: the same numbers from a model, an adapter and columns, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_rdro import DPOConfig, DPOTrainer, losses

from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer


LORA = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of the policy's start and of a second model."""
    directory = tmp_path_factory.mktemp("models")
    return [save_tiny(directory / str(seed), seed=seed) for seed in (0, 2)]


def build(model, output_dir, dataset=None, **settings):
    settings = {"loss_type": "mrpo", "beta": 1.0, "per_device_train_batch_size": 8, "max_steps": 1, **settings}
    return DPOTrainer(
        model,
        args=DPOConfig(**cpu_args(output_dir=str(output_dir), logging_steps=1, **settings)),
        train_dataset=tiny_preferences(8) if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
    )


def first_batch(trainer):
    return trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])


def logps(model, output_dir):
    """Of the chosen and rejected completions of the data, `(2, n)`."""
    trainer = build(model, output_dir, loss_type="sigmoid")
    return torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, first_batch(trainer)))


def test_loss_is_dpo_with_the_harmonic_reference(models, tmp_path):
    own, second = (logps(model, tmp_path) for model in models)
    trainer = build(models[0], tmp_path, mrpo_reference=models[1])
    expected = losses.mrpo_loss(torch.zeros(8), torch.zeros(8), own, second, 1.0).mean()
    assert trainer.compute_loss(trainer.model, first_batch(trainer)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() != pytest.approx(0.6931, abs=1e-3)


def test_the_same_model_twice_is_dpo(models, tmp_path):
    trainer = build(models[0], tmp_path, mrpo_reference=models[0])
    assert trainer.compute_loss(trainer.model, first_batch(trainer)).item() == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "kldpo", "inner_loss_type": "mrpo"}], ids=["mrpo", "kldpo"])
def test_columns_and_a_model_train_alike_however_a_step_is_split(models, tmp_path, settings):
    second = logps(models[1], tmp_path)
    dataset = tiny_preferences(8)
    for name, values in zip(("chosen", "rejected"), second, strict=True):
        dataset = dataset.add_column(f"second_ref_{name}_logps", values.tolist())
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **settings}
    runs = [
        build(models[0], tmp_path, mrpo_reference=models[1], **settings),
        build(models[0], tmp_path, dataset, **settings),
        build(
            models[0],
            tmp_path,
            mrpo_reference=models[1],
            **{**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        ),
    ]
    start = torch.cat([p.detach().flatten().clone() for p in runs[0].model.parameters()])
    updates = []
    for trainer in runs:
        trainer.train()
        updates.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - start)
    for update in updates[1:]:
        assert (update - updates[0]).norm() < 1e-4 * updates[0].norm()


def adapter(path, seed):
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_an_adapter_by_path_and_by_name(models, tmp_path):
    adapter(models[0], seed=1).save_pretrained(tmp_path / "second")
    by_path = build(models[0], tmp_path, mrpo_reference=str(tmp_path / "second"))
    expected = by_path.compute_loss(by_path.model, first_batch(by_path)).item()
    assert expected != pytest.approx(0.6931, abs=1e-3)

    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(models[0]), LoraConfig(**LORA))
    policy.load_adapter(str(tmp_path / "second"), "second")
    by_name = build(policy, tmp_path, mrpo_reference="second")
    assert by_name.compute_loss(by_name.model, first_batch(by_name)).item() == pytest.approx(expected, rel=1e-5)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if ".second." in name}
    by_name.train()
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters() if name in before)


def test_what_is_refused(models, tmp_path):
    with pytest.raises(
        ValueError, match="`train_dataset` lacks the columns second_ref_chosen_logps, second_ref_rejected_logps"
    ):
        build("no/such/model", tmp_path)
    tiny_qwen2(vocab_size=500).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has a vocabulary of 500"):
        build(models[0], tmp_path, mrpo_reference=str(tmp_path / "other"))
