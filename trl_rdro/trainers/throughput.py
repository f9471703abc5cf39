"""How fast a run is, in its log."""

import time

import torch
from transformers import TrainerCallback

from ..compat import trl as trl_compat
from .hosts import Host


class Clock(TrainerCallback):
    """Seconds of training: without logging, evaluation and saving."""

    seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def _go_on(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    on_log = on_evaluate = on_save = _go_on


class Throughput(Host):
    """
    Mixin of the trainers, before TRL's class. Logs, since the last log, `throughput/samples_per_second` (pairs, or
    completions in `KTOTrainer`; of all devices), `throughput/tokens_per_second` (per device), and, where the peak of
    the device is known, `throughput/mfu` in percent.

    Tokens are counted as TRL counts `num_tokens`: the tokens of both rows, prompt included, without padding. So a run
    with packed rows and one without can be compared. MFU is TRL's too: three forwards of the policy for each token,
    whatever else is computed.
    """

    def _set_up_throughput(self) -> None:
        self._clock = Clock()
        self._samples, self._counted = 0, (0.0, 0, 0)
        self.add_callback(self._clock)

    def training_step(self, model, inputs, *args, **kwargs):
        self._samples += len(inputs["completion_mask"]) // len(self._completion_columns)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if self.model.training and "loss" in logs:
            logs |= self._throughput()
        super().log(logs, *args, **kwargs)

    def _throughput(self) -> dict[str, float]:
        counts = self._clock.seconds, self._samples, trl_compat.trained_tokens(self)
        seconds, samples, tokens = (now - before for now, before in zip(counts, self._counted, strict=True))
        self._counted = counts
        if not seconds or not samples:
            return {}
        devices = self.accelerator.num_processes
        rate = tokens / seconds / devices
        found = {"throughput/samples_per_second": samples * devices / seconds, "throughput/tokens_per_second": rate}
        rows = samples * devices * len(self._completion_columns)
        half = self.accelerator.mixed_precision != "no" or self.model.dtype != torch.float32
        mfu = trl_compat.model_flops_utilisation(self, rate, round(tokens / rows)) if half else None
        return found if mfu is None else {**found, "throughput/mfu": mfu}
