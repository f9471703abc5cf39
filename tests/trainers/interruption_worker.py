"""
A training run of the command line in a forked process, which interrupts itself at a given point.

A server that has imported everything forks the processes: each would spend ten seconds on that.
"""

import multiprocessing
import os
import signal
import sys

from .. import conftest  # noqa: F401  (before torch: threads, no hub)


# isort: split
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


def run(argv: list[str], moment: str | None, log: str) -> None:
    sys.stdout.flush()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    end_on_signals()
    if moment:
        interrupt(moment)
    sys.exit(trl_rdro.cli.train.main(argv[0], argv[1:]))


def run_in_process(argv: list[str], moment: str | None, log: str) -> int:
    """The exit code of the run; what it said is in `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run, args=(argv, moment, log))
    process.start()
    process.join(120)
    return process.exitcode
