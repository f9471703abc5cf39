"""
`KTOTrainer` in real runs of tiny models: TRL's own losses come out of it unchanged, to the last bit, ours forward no
more than they need, and what cannot be trained on is refused before the model is loaded.
"""

import pytest
import torch
import trl
from datasets import Dataset

from trl_rdro import KTOConfig, KTOTrainer
from trl_rdro.losses.types import of_family

from ..tiny import cpu_args
from ..training import (
    kto_config,
    labelled,
    lora,
    measured,
    parameters,
)


EACH_LOSS = pytest.mark.parametrize("loss_type", of_family("density_ratio"))


def count_forwards(*models) -> list[int]:
    """Counters, one per model, of the forwards made from now on."""
    counts = [0] * len(models)

    def counter(i):
        def hook(*_):
            counts[i] += 1

        return hook

    for i, model in enumerate(models):
        model.register_forward_pre_hook(counter(i))
    return counts


# TRL's own losses


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize(
    ("settings", "use_lora"),
    [
        ({}, False),
        ({}, True),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, False),
        ({"precompute_ref_log_probs": True}, False),
        ({"precompute_ref_log_probs": True, "desirable_weight": 1.5}, True),
    ],
    ids=["full", "lora", "accumulation", "precompute", "precompute-lora"],
)
def test_trl_losses_are_trls_to_the_last_bit(tmp_path, qwen2, loss_type, settings, use_lora):
    def run(trainer_class, config_class):
        args = kto_config(
            tmp_path, loss_type, config_class, max_steps=4, eval_strategy="steps", eval_steps=2, **settings
        )
        trainer = trainer_class(
            qwen2,
            args=args,
            train_dataset=labelled(8, 5),
            eval_dataset=labelled(3, 4, seed=1),
            peft_config=lora() if use_lora else None,
        )
        trainer.train()
        return measured(trainer), parameters(trainer), trainer

    theirs, their_parameters, _ = run(trl.KTOTrainer, trl.KTOConfig)
    for config_class in (KTOConfig, trl.KTOConfig):
        ours, our_parameters, trainer = run(KTOTrainer, config_class)
        assert ours == theirs
        assert all(torch.equal(our_parameters[name], value) for name, value in their_parameters.items())
        assert trainer.preferred_fraction is None
        assert trainer._paper["id"] == "2402.01306"


# What is computed


@EACH_LOSS
def test_no_kl_and_random_order_by_default(tmp_path, qwen2, loss_type):
    trainer = KTOTrainer(qwen2, args=kto_config(tmp_path, loss_type), train_dataset=labelled(4, 4))
    assert trainer.calculate_KL is False
    assert not [name for name in trainer.train_dataset.column_names if "KL" in name]
    assert not [name for name in next(iter(trainer.get_train_dataloader())) if "KL" in name]
    assert trainer.args.loss_type == trainer.loss_type == loss_type
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)

    args = kto_config(tmp_path, loss_type, train_sampling_strategy="sequential", per_device_train_batch_size=1)
    trainer = KTOTrainer(qwen2, args=args, train_dataset=labelled(4, 4))
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.SequentialSampler)


def test_order_stays_sequential_for_losses_with_a_kl_estimate(tmp_path):
    assert kto_config(tmp_path, "kto").train_sampling_strategy == "sequential"
    assert kto_config(tmp_path, "apo_zero_unpaired").train_sampling_strategy == "sequential"


@EACH_LOSS
@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_forward_of_each_model(tmp_path, qwen2, loss_type, accumulation):
    args = kto_config(
        tmp_path, loss_type, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_steps=2
    )
    trainer = KTOTrainer(qwen2, args=args, train_dataset=labelled(8, 4))
    counts = count_forwards(trainer.model, trainer.ref_model)
    trainer.train()
    assert counts == [2 * accumulation, 2 * accumulation]


def test_no_reference_forward_when_precomputed(tmp_path, qwen2):
    args = kto_config(tmp_path, precompute_ref_log_probs=True)
    trainer = KTOTrainer(qwen2, args=args, train_dataset=labelled(8, 8))
    assert trainer.ref_model is None
    counts = count_forwards(trainer.model)
    trainer.train()
    assert counts == [2]


def test_the_adapter_is_switched_off_for_the_reference_forward(tmp_path, qwen2):
    trainer = KTOTrainer(qwen2, args=kto_config(tmp_path), train_dataset=labelled(8, 8), peft_config=lora())
    assert trainer.ref_model is None
    counts = count_forwards(trainer.model)
    trainer.train()
    assert counts == [4]


# Refusals


@pytest.mark.parametrize("loss_type", ["rdro", "ddro", "kto"])
@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"label": ["yes", "no"]}, r"`train_dataset`, row 0 .*`label` must be True .*got 'yes' \(str\)"),
        ({"label": [1, 0]}, r"`train_dataset`, row 0 .*`label` must be True .*got 1 \(int\)"),
        ({"label": [None, True]}, r"`train_dataset`, row 0 .*`label` must be True .*got null"),
        ({"label": [True, None]}, r"`train_dataset`, row 1 .*`label` must be True .*got null"),
        ({}, "`train_dataset` lacks the column label"),
    ],
    ids=["strings", "ints", "none", "none-later", "missing"],
)
def test_labels_of_another_kind_are_refused_before_the_model_is_loaded(tmp_path, loss_type, columns, sentence):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": [" c", " d"], **columns})
    with pytest.raises(ValueError, match=sentence) as error:
        KTOTrainer("no/such-model", args=kto_config(tmp_path, loss_type), train_dataset=rows)
    assert "\n" not in str(error.value)


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        KTOTrainer("no/such-model", args=kto_config(tmp_path), train_dataset=labelled(1, 1).select([]))


@EACH_LOSS
def test_a_plain_trl_config_is_refused(tmp_path, loss_type):
    args = trl.KTOConfig(**cpu_args(output_dir=str(tmp_path)))
    args.loss_type = loss_type
    with pytest.raises(TypeError, match="needs `trl_rdro.KTOConfig`"):
        KTOTrainer("no/such-model", args=args, train_dataset=labelled(1, 1))


@EACH_LOSS
@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_refused(tmp_path, loss_type, column):
    rows = labelled(1, 1).add_column(column, ["picture", "picture"])
    with pytest.raises(ValueError, match="not implemented for unpaired image data"):
        KTOTrainer("no/such-model", args=kto_config(tmp_path, loss_type), train_dataset=rows)
