"""The figures of speed in the log."""

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from trl_rdro.trainers import throughput

from .test_packed_rows import labelled, make, pairs, reference


class Slow(TrainerCallback):
    """A clock that stands still but for a tenth of a second for a step, and five seconds for an evaluation."""

    now = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 0.1

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += 5


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("packed", [False, True])
def test_counts_and_times(tmp_path, monkeypatch, kind, packed):
    slow = Slow()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: slow.now))
    data = pairs() if kind == "DPO" else labelled()
    trainer = make(
        kind, tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1, loss_type="rdro",
        padding_free=packed, trainer_kwargs={**reference()["trainer_kwargs"], "eval_dataset": data},
    )  # fmt: skip
    # Before the trainer's own clock, which looks at the time when an evaluation is over
    trainer.callback_handler.callbacks.insert(0, slow)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    tokens = [0] + [log["num_tokens"] for log in logs]
    assert len(logs) == 2
    for i, log in enumerate(logs):
        assert log["throughput/samples_per_second"] == pytest.approx(4 / 0.1)
        assert log["throughput/tokens_per_second"] == pytest.approx((tokens[i + 1] - tokens[i]) / 0.2)
        assert "throughput/mfu" not in log  # of a CPU no peak is known
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations and not any("throughput" in key for log in evaluations for key in log)
