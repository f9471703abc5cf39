"""A training run of the command line, which interrupts itself at a given point."""

import os
import signal
import sys

import torch
from transformers import TrainerCallback

import trl_rdro.cli.train
from trl_rdro import DPOTrainer, KTOTrainer
from trl_rdro.run.signals import end_on_signals


def interrupt(moment: str) -> None:
    """Send this process a signal: `SIGTERM step 4`, or `SIGKILL writing 6` while a checkpoint is being written."""
    name, place, step = moment.split()

    def strike(trainer):
        if trainer.state.global_step == int(step):
            os.kill(os.getpid(), getattr(signal, name))

    class AtStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            strike(trainer_of[0])

    trainer_of = []
    for trainer_class in (DPOTrainer, KTOTrainer):

        def train(trainer, *args, train=trainer_class.train, **kwargs):
            trainer_of.append(trainer)
            if place == "step":
                trainer.add_callback(AtStep)
            return train(trainer, *args, **kwargs)

        def save(trainer, path, save=trainer_class._save_optimizer_and_scheduler):
            if place == "writing":
                strike(trainer)
            save(trainer, path)

        trainer_class.train, trainer_class._save_optimizer_and_scheduler = train, save


def run(argv: list[str], moment: str | None) -> None:
    torch.set_num_threads(1)
    end_on_signals()
    if moment:
        interrupt(moment)
    sys.exit(trl_rdro.cli.train.main(argv[0], argv[1:]))
