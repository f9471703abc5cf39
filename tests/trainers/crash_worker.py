"""A training run of 9 steps, with a checkpoint every 3, that can be made to die by SIGKILL at a given point.

Two processes train with ZeRO-3, and the first of them dies.
"""

import os
import signal
import sys

import torch
from transformers import TrainerCallback

from trl_rdro import DPOTrainer, KTOTrainer

from ..loss_cases import LOSS_CASES
from ..tiny import tiny_preferences
from ..training import make_trainer


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ZERO3 = {
    # Tiny models are below the thresholds from which on ZeRO-3 shards
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0},
    **dict.fromkeys(SIZES, "auto"),
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


class Die(TrainerCallback):
    """Kills the process after a step, or while a checkpoint is being written: its model is there, the rest is not."""

    def __init__(self, trainer, when: str):
        self.moment, _, step = when.partition(" ")
        self.step = int(step or 0)
        save_optimizer = trainer._save_optimizer_and_scheduler

        def die_or_save(output_dir):
            if self.moment == "writing" and trainer.state.global_step == self.step and RANK == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            save_optimizer(output_dir)

        trainer._save_optimizer_and_scheduler = die_or_save

    def on_step_end(self, args, state, control, **kwargs):
        if self.moment == "step" and state.global_step == self.step and RANK == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main(model: str, output_dir: str, loss: str, unpaired: bool, packed: bool, die_at: str) -> None:
    """Train on pairs or single completions; `die_at` is "step 4", say, or "writing 6", or nothing."""
    if WORLD_SIZE > 1:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute of compiling otherwise
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    trainer = make_trainer(
        model,
        output_dir,
        KTOTrainer if unpaired else DPOTrainer,
        {"train_dataset": tiny_preferences(40)},
        loss_type=loss,
        max_steps=9,
        per_device_train_batch_size=4 // WORLD_SIZE,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        padding_free=packed,
        deepspeed=ZERO3 if WORLD_SIZE > 1 else None,
        **LOSS_CASES[loss].settings,
    )
    trainer.add_callback(Die(trainer, die_at))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.accelerator.num_processes == WORLD_SIZE
    parameters = dict(trainer.model.named_parameters())
    if WORLD_SIZE > 1:
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
    if RANK == 0:
        torch.save({name: parameter.detach() for name, parameter in parameters.items()}, f"{output_dir}/final.pt")
    sys.stderr.flush()
    os._exit(0)  # gloo now and then aborts while it is taken down
