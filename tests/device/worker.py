"""Runs the cases on the fake device or on the CPU, in a process of its own: a device is of the whole process."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trl_rdro.iterate.sampling import Generation, completion_logps, draw
from trl_rdro.tools.loading import load_model
from trl_rdro.trainers.noise import NoiseState

from ..tiny import save_tiny
from ..training import lora, make_trainer, measured
from .cases import CASES, Case
from .fake_device import NAME, install
from .watch import faults, waits, watched


STEPS = 2


class FirstStep(TrainerCallback):
    """Notes what was counted in the first step, where a run looks at itself once."""

    def __init__(self, events: Counter):
        self.events, self.counted = events, Counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.counted = self.events.copy()


def build(case: Case, folder: Path, device: str) -> Any:
    model = save_tiny(folder, tie=False, attention_dropout=case.model.get("attention_dropout", 0.0))
    settings = {
        "use_cpu": device == "cpu",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "dataloader_pin_memory": False,
        "model_init_kwargs": {"attn_implementation": "eager", "dtype": "float32"},
        **case.settings,
    }
    if case.settings["loss_type"] == "mrpo":
        settings["mrpo_reference"] = save_tiny(folder / "second", seed=2)
    given = {"train_dataset": case.data, "eval_dataset": case.data if case.evaluates else None}
    given["peft_config"] = lora() if case.lora else None
    return make_trainer(model, folder / "out", case.trainer, given, **settings)


def carry_out(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """What it logged, the faults, and the host's waits for each micro-batch."""
    trainer = build(case, folder, device)
    assert trainer.accelerator.device.type == device
    with watched() if device == NAME else contextlib.nullcontext() as watch:
        events = watch.events if watch else Counter()
        first = FirstStep(events)
        trainer.add_callback(first)
        if case.evaluates:
            trainer.evaluate()
            batches = len(trainer.get_eval_dataloader())
        else:
            trainer.train()
            batches = (STEPS - 1) * case.micro_batches
    per_batch = {function: n / batches for function, n in waits(events - first.counted).items()}
    return {"log": measured(trainer), "faults": faults(events), "waits": per_batch}


def look_at_sampling(folder: Path, device: str) -> dict[str, Any]:
    """Drawing completions and scoring them, as `trl-rdro iterate` does."""
    model = load_model(save_tiny(folder))
    prompts = [[5, 6, 7], [8, 9]]
    with watched() as watch, torch.no_grad():
        model.to(device)
        pairs = list(zip(prompts, draw(model, prompts, Generation(4), {2}, 0, seed=1), strict=True))
        scores = completion_logps(model, pairs, 0)
    with torch.no_grad():
        on_cpu = completion_logps(model.to("cpu"), pairs, 0)
    return {"faults": faults(watch.events), "scores": scores, "on_cpu": on_cpu}


def look_at_watch(device: str) -> dict[str, list[str]]:
    """What is noted of mistakes that are made on purpose."""
    x = torch.arange(4.0, device=device)
    mistakes = {
        "two devices": lambda: x + torch.ones(4),
        "no CUDA kernel": lambda: torch.histogram(x, 4),
        "float64": lambda: x.double(),
        "value read": lambda: x.sum().item(),
        "boolean index": lambda: x[x > 1],
        "size by values": lambda: x.nonzero(),
        "copy to host": lambda: x.cpu(),
        "copy from host": lambda: torch.tensor([1.0], device=device),
    }
    found = {}
    for name, mistake in mistakes.items():
        with watched() as watch, contextlib.suppress(RuntimeError):
            mistake()
        found[name] = [event.kind for event in watch.events]
    return found


def look_at_noise(device: str) -> dict[str, bool]:
    x = torch.ones(64, device=device)
    with watched():
        state = NoiseState(x.device)
        torch.rand(3)  # on the CPU
        torch.nn.functional.dropout(x).cpu()
        state.restore()
        first, fresh = torch.nn.functional.dropout(x).cpu(), state.was_drawn_from()
        state.restore()
        untouched = not state.was_drawn_from()
        again = torch.nn.functional.dropout(x).cpu()
    return {"drawn": fresh, "restored": untouched, "same": torch.equal(first, again)}


def main(device: str, output: str) -> None:
    folder = Path(output)
    PrinterCallback.on_log = lambda *args, **kwargs: None
    if device == NAME:
        install()
    results: dict[str, Any] = {"cases": {}}
    for name, case in CASES.items():
        if device == NAME or case.as_on_cpu:
            results["cases"][name] = carry_out(case, folder / name.replace(" ", "_"), device)
    if device == NAME:
        results |= {"sampling": look_at_sampling(folder, device), "watch": look_at_watch(device)}
        results |= {"noise": look_at_noise(device)}
    (folder / "results.json").write_text(json.dumps(results))
