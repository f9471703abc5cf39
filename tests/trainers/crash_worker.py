"""A training run of 9 steps, with a checkpoint every 3, that can be made to die by SIGKILL at a given point.

    python -m tests.trainers.crash_worker MODEL OUTPUT_DIR LOSS "step 4" | "writing 6" | ""
    torchrun --nproc_per_node 2 -m tests.trainers.crash_worker ...

Two processes train with ZeRO-3, and the first of them dies.
"""

import os
import signal
import sys

from .. import conftest  # noqa: F401  (before torch: threads, no hub)


# isort: split
import torch
from transformers import TrainerCallback

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from ..tiny import cpu_args, tiny_preferences


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


def main():
    model, output_dir, loss, die_at = sys.argv[1:]
    unpaired = loss == "unpaired"
    config_class, trainer_class = (KTOConfig, KTOTrainer) if unpaired else (DPOConfig, DPOTrainer)
    args = config_class(
        **cpu_args(
            output_dir=output_dir,
            loss_type="ddro" if unpaired else loss,
            max_steps=9,
            learning_rate=1e-3,
            per_device_train_batch_size=4 // WORLD_SIZE,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=3,
            deepspeed=ZERO3 if WORLD_SIZE > 1 else None,
        )
    )
    if WORLD_SIZE > 1:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute of compiling otherwise
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    trainer = trainer_class(model, args=args, train_dataset=tiny_preferences(40))
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


if __name__ == "__main__":
    main()
