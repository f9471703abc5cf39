"""A loop of two rounds with a tiny model, which can be made to die by SIGKILL at a given point."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer
from trl import ModelConfig

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.judges import RewardFunctions
from trl_rdro.iterate.rounds import Loop
from trl_rdro.run.signals import end_on_signals

from ..tiny import cpu_args, tiny_preferences


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(output: Path, folder: str = "final") -> bytes:
    return (output / folder / "adapter_model.safetensors").read_bytes()


def vowels(prompts, completions, **kwargs):
    """A reward that random text has more or less of."""
    return [sum(text.count(vowel) for vowel in "aeiou") - 0.1 * len(text) for text in completions]


def make_loop(
    model: str, output_dir: str | Path, judge=None, rows=None, peft: bool = True, load_in_4bit: bool = False, **changes
) -> Loop:
    """`changes` are fields of the loop's, the model's or the trainer's configuration."""
    loop = {
        "rounds": 2,
        "sampling_mix": 0.5,
        "reward_funcs": ["tests.iterate.worker.vowels"],
        "max_completion_length": 8,
        "prompts_per_chunk": 4,
        "monitor_prompts": 6,
        "monitor_samples": 2,
    }
    training = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "beta": 1.0,
        "logging_steps": 1,
    }
    of_model = {key: changes.pop(key) for key in changes.keys() & ModelConfig.__dataclass_fields__.keys()}
    fields = IterateConfig.__dataclass_fields__
    config = IterateConfig(**loop | {key: value for key, value in changes.items() if key in fields})
    config_class = KTOConfig if config.method == "kto" else DPOConfig
    args = config_class(**cpu_args(**training | {key: value for key, value in changes.items() if key not in fields}))
    config.validate_with(args)
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]} if peft else {}
    rows = list(tiny_preferences(10)) if rows is None else rows
    model_args = ModelConfig(model_name_or_path=model, load_in_4bit=load_in_4bit, **lora | of_model)
    return Loop(config, args, model_args, judge or RewardFunctions([vowels], None), rows, rows)


def act_at(moment: str, act: Callable[[], None]) -> None:
    """Call `act` before a file that ends in `moment` is in place, or at "step N" of the second round."""
    if moment.startswith("step"):
        training_step = Trainer.training_step

        def step_after_act(trainer, *args, **kwargs):
            if "round_001" in trainer.args.output_dir and trainer.state.global_step == int(moment.split()[1]):
                act()
            return training_step(trainer, *args, **kwargs)

        Trainer.training_step = step_after_act
    for name in ("replace", "rename"):
        move = getattr(os, name)

        def move_after_act(source, target, move=move, **kwargs):
            if str(target).endswith(moment):
                act()
            return move(source, target, **kwargs)

        setattr(os, name, move_after_act)


def run(model: str, output_dir: str, moment: str | None = None, signum: int = signal.SIGKILL) -> None:
    """The whole loop, with a checkpoint every two steps."""
    end_on_signals()
    if moment:
        act_at(moment, lambda: os.kill(os.getpid(), signum))
    make_loop(model, output_dir, save_strategy="steps", save_steps=2).run()


def run_and_wait(model: str, output_dir: str, reached: str, release: str) -> None:
    """The loop, which in its second round makes the file `reached` and goes on when there is a file `release`."""

    def wait():
        Path(reached).touch()
        while not Path(release).exists():
            time.sleep(0.05)

    act_at("round_001/judged.jsonl", wait)
    make_loop(model, output_dir, save_strategy="steps", save_steps=2).run()


def run_in_a_world(model: str, output_dir: str) -> None:
    """The same as one of several processes."""
    loop = make_loop(model, output_dir, per_device_train_batch_size=2)
    loop.run()
    if loop.state.is_main_process:
        Path(output_dir, "world_size").write_text(str(loop.state.num_processes))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo now and then aborts while it is taken down
