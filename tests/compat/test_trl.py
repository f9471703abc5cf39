"""Each undocumented name of TRL and transformers that `trl_rdro.compat.trl` and the trainers rely on.

When a release moves one, the test that names it fails here and says where it was last seen.
"""

import inspect
import re

import pytest
import torch
import transformers
import trl
import trl.models.utils
import trl.trainer.utils
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from trl_rdro.compat import checkpointing
from trl_rdro.compat import trl as trl_compat
from trl_rdro.compat.trl_trainer import TrlTrainer
from trl_rdro.configs.loss_names import TRL_DPO_LOSSES, TRL_KTO_LOSSES

from ..tiny import cpu_args, save_tiny, tiny_preferences


LAST_SEEN = "last seen in TRL 1.16; mend trl_rdro/compat"


@pytest.mark.parametrize("trainer", [trl.DPOTrainer, trl.KTOTrainer])
def test_methods_keep_their_signatures(trainer):
    expected = {
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(trainer, name)).parameters) == parameters, f"{name}: {LAST_SEEN}"
    first = list(inspect.signature(trainer.__init__).parameters)[:6]
    assert first == ["self", "model", "ref_model", "args", "data_collator", "train_dataset"], LAST_SEEN


def test_the_trainers_and_batches_hold_what_is_read(tmp_path):
    attributes = [*TrlTrainer.__annotations__, "_precompute_ref_logps", "compute_ref_log_probs"]
    model = save_tiny(tmp_path)
    dpo = trl.DPOTrainer(
        model, args=trl.DPOConfig(**cpu_args(output_dir=str(tmp_path))), train_dataset=tiny_preferences(4)
    )
    for name in [*attributes, "loss_types", "loss_weights", "ld_alpha", "label_smoothing"]:
        assert hasattr(dpo, name), f"{name}: {LAST_SEEN}"
    kto_args = trl.KTOConfig(loss_type="apo_zero_unpaired", **cpu_args(output_dir=str(tmp_path)))
    kto = trl.KTOTrainer(model, args=kto_args, train_dataset=tiny_preferences(4))
    for name in [*attributes, "loss_type", "calculate_KL", "desirable_weight", "undesirable_weight"]:
        assert hasattr(kto, name), f"{name}: {LAST_SEEN}"
    assert kto.calculate_KL is False, f"apo_zero_unpaired needs no KL: {LAST_SEEN}"

    pairs, labelled = next(iter(dpo.get_train_dataloader())), next(iter(kto.get_train_dataloader()))
    assert set(pairs) == {"input_ids", "attention_mask", "completion_mask"}, LAST_SEEN
    assert set(labelled) == {"input_ids", "attention_mask", "completion_mask", "label"}, LAST_SEEN
    labels = pairs["input_ids"].masked_fill(pairs["completion_mask"] == 0, -100)
    output = dpo.model(
        input_ids=pairs["input_ids"], attention_mask=pairs["attention_mask"], labels=labels, fused_lm_head=True
    )
    assert output.log_probs.shape == (8, labels.size(1) - 1) and output.log_probs.dtype == torch.float32, LAST_SEEN
    assert output.log_probs[pairs["completion_mask"][:, 1:] == 0].eq(0).all(), LAST_SEEN


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_rows_are_prepared_without_a_trainer_as_with_one(method, tmp_path):
    rows = tiny_preferences(6).to_list()
    rows[2]["prompt"] *= 10  # longer than max_length
    dataset = Dataset.from_list(rows)
    common = cpu_args(output_dir=str(tmp_path), max_length=60)
    if method == "dpo":
        args, trainer_class = trl.DPOConfig(**common), trl.DPOTrainer
    else:
        args, trainer_class = trl.KTOConfig(loss_type="apo_zero_unpaired", **common), trl.KTOTrainer
    trainer = trainer_class(save_tiny(tmp_path), args=args, train_dataset=dataset)
    prepared, collator = trl_compat.prepare_dataset(method, dataset, trainer.processing_class, args)
    assert prepared.to_list() == trainer.train_dataset.to_list(), LAST_SEEN
    assert len(prepared) == (5 if method == "dpo" else 10), LAST_SEEN
    assert vars(collator) == vars(trainer.data_collator) and type(collator) is type(trainer.data_collator), LAST_SEEN


def test_loss_names_are_the_ones_the_trainers_know():
    in_code = re.findall(r'loss_type == "(\w+)"', inspect.getsource(trl.DPOTrainer._compute_loss))
    assert sorted(TRL_DPO_LOSSES) == sorted(in_code), LAST_SEEN
    in_code = re.findall(r'self\.loss_type == "(\w+)"', inspect.getsource(trl.KTOTrainer._compute_loss))
    assert set(TRL_KTO_LOSSES) == set(in_code), LAST_SEEN


def test_what_multiplies_the_losses_of_rows_still_does():
    """WPO's weights, the unpaired losses' weights, and the columns that batches may have."""
    paired, unpaired = (inspect.getsource(cls._compute_loss) for cls in (trl.DPOTrainer, trl.KTOTrainer))
    assert "aligned_logps = (per_token_logps - outputs.log_sum_sq_probs" in paired, LAST_SEEN
    assert "per_sequence_loss *= chosen_weights * rejected_weights" in paired, LAST_SEEN
    assert "(self.desirable_weight * chosen_losses, self.undesirable_weight * rejected_losses)" in unpaired, LAST_SEEN
    for cls in (trl.DPOTrainer, trl.KTOTrainer):
        assert "self._signature_columns = [" in inspect.getsource(cls._set_signature_columns_if_needed), LAST_SEEN


def test_helpers_and_hooks_exist():
    assert {"_get_fsdp_state"} <= set(dir(FSDPModule)) and callable(FSDPState._lazy_init), "last seen in torch 2.13"
    for module in checkpointing.TRL_MODULES:
        assert module.disable_gradient_checkpointing is trl.models.utils.disable_gradient_checkpointing, LAST_SEEN
    for name in ("get_config_model_id", "create_model_from_path", "disable_dropout_in_model", "use_adapter"):
        assert callable(getattr(trl.trainer.utils, name)), LAST_SEEN
    assert callable(trl.models.prepare_deepspeed) and callable(trl.models.prepare_fsdp), LAST_SEEN
    # Set from the micro-batches of the step right after `get_batch_samples` returned them
    assert "self.current_gradient_accumulation_steps = len(batch_samples)" in inspect.getsource(
        transformers.Trainer._run_epoch
    ), "last seen in transformers 5.23"


def test_the_trainer_state_is_the_last_that_a_checkpoint_gets():
    """It marks a checkpoint as complete, and `_save_rng_state`, after which all ranks wait, comes right before it."""
    source = inspect.getsource(transformers.Trainer._save_checkpoint)
    positions = [
        source.index(call)
        for call in (
            "self.save_model(",
            "self._save_optimizer_and_scheduler(",
            "self._save_rng_state(",
            "self.state.save_to_json(",
            "rotate_checkpoints(",
        )
    ]
    assert positions == sorted(positions), "last seen in transformers 5.23; mend trl_rdro/trainers/checkpoints.py"
    assert list(inspect.signature(transformers.Trainer._get_output_dir).parameters) == ["self", "trial"]
