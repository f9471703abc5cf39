"""A YAML file for the command."""

import pytest
import yaml

from ..tiny import cpu_args, tiny_preferences


@pytest.fixture
def config(tmp_path, model):
    """Write a YAML file for a round of two steps; keyword arguments override or (None) remove keys."""
    data = tmp_path / "prompts.jsonl"
    tiny_preferences(6).select_columns("prompt").to_json(data)

    def write(**changes) -> str:
        settings = cpu_args(
            model_name_or_path=model,
            dataset_name=str(data),
            output_dir=str(tmp_path / "out"),
            reward_funcs=["tests.iterate.worker.vowels"],
            rounds=1,
            max_completion_length=6,
            monitor_samples=2,
            max_steps=2,
            per_device_train_batch_size=4,
            use_peft=True,
            lora_target_modules="all-linear",
        )
        settings = {key: value for key, value in {**settings, **changes}.items() if value is not None}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write
