"""A training run of 9 steps, with a checkpoint every 3, that can be made to die by SIGKILL at a given point.

python -m tests.crash_worker MODEL OUTPUT_DIR LOSS "step 4" | "writing 6" | "" RESUME
"""

import os
import signal
import sys

from . import conftest  # noqa: F401  (before torch: threads, no hub)


# isort: split
import torch
from transformers import TrainerCallback

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from .tiny import cpu_args, tiny_preferences


class Die(TrainerCallback):
    """Kills the process after a step, or while a checkpoint is being written: its model is there, the rest is not."""

    def __init__(self, trainer, when: str):
        self.moment, _, step = when.partition(" ")
        self.step = int(step or 0)
        save_optimizer = trainer._save_optimizer_and_scheduler

        def die_or_save(output_dir):
            if self.moment == "writing" and trainer.state.global_step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            save_optimizer(output_dir)

        trainer._save_optimizer_and_scheduler = die_or_save

    def on_step_end(self, args, state, control, **kwargs):
        if self.moment == "step" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    model, output_dir, loss, die_at, resume = sys.argv[1:]
    unpaired = loss == "unpaired"
    config_class, trainer_class = (KTOConfig, KTOTrainer) if unpaired else (DPOConfig, DPOTrainer)
    args = config_class(
        **cpu_args(
            output_dir=output_dir,
            loss_type="ddro" if unpaired else loss,
            max_steps=9,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=3,
        )
    )
    trainer = trainer_class(model, args=args, train_dataset=tiny_preferences(40))
    trainer.add_callback(Die(trainer, die_at))
    trainer.train(resume_from_checkpoint=bool(int(resume)))
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, f"{output_dir}/final.pt")


if __name__ == "__main__":
    main()
