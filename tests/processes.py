"""
Processes that begin with everything imported.

Importing torch, TRL and DeepSpeed takes longer than a tiny training. So a server imports them once and forks each
process from there. It belongs to the process that runs the tests and ends with it.
"""

import importlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from .helpers import free_port


# What cannot be imported (DeepSpeed is an extra) is left out. `conftest` comes last, because it hides all objects
# that are there by then from the garbage collector.
PRELOADED = [
    "trl_rdro.trainers.dpo_trainer",
    "trl_rdro.trainers.kto_trainer",
    "trl_rdro.iterate.rounds",
    "peft",
    "deepspeed",
    "tests.conftest",
]
TIMEOUT = 600


def _enter(module: str, name: str, args: tuple, environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    getattr(importlib.import_module(module), name)(*args)  # imported here, so that it sees the environment


def run(function: Callable[..., None], *args: Any, log: Path, processes: int = 1) -> list[int]:
    """
    Run `function(*args)` in processes of their own, several as the ranks of one world.

    As under torchrun, the others are killed when one has failed.

    Args:
        log: the file that what they print is added to.

    Returns:
        The exit code of each; the negative number of a signal that ended it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        target = (function.__module__, function.__name__, args, environment, str(log))
        started.append(context.Process(target=_enter, args=target))
        started[-1].start()
    running = {process.sentinel: process for process in started}
    try:
        while running:
            ended = wait(running, TIMEOUT)
            if not ended or any(running.pop(sentinel).exitcode for sentinel in ended):
                break
    finally:
        for process in started:
            process.kill()
            process.join()
    return [process.exitcode for process in started]
