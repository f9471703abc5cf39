"""The figures of speed in the log."""

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from trl_rdro import DPOTrainer, KTOTrainer
from trl_rdro.trainers import throughput

from ..tiny import tiny_preferences
from ..training import labelled, make_trainer


class Slow(TrainerCallback):
    """A clock that stands still but for a tenth of a second for a step, and five seconds for an evaluation."""

    now = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 0.1

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += 5


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("packed", [False, True])
def test_counts_and_times(qwen2, tmp_path, monkeypatch, kind, packed):
    slow = Slow()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: slow.now))
    trainer_class, data = (DPOTrainer, tiny_preferences(8)) if kind == "DPO" else (KTOTrainer, labelled(4, 4))
    trainer = make_trainer(
        qwen2, tmp_path, trainer_class, {"train_dataset": data, "eval_dataset": data}, loss_type="rdro",
        per_device_train_batch_size=4, logging_steps=2, eval_strategy="steps", eval_steps=1, padding_free=packed,
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
