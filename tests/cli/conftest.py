"""A model, a data set and a YAML file that name both."""

import pytest
import yaml

from ..tiny import cpu_args, tiny_preferences


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    tiny_preferences(16).to_json(path)
    return str(path)


@pytest.fixture
def config(tmp_path, model, data):
    """Write a YAML file for a run of two steps; keyword arguments override or (None) remove keys."""

    def write(**changes) -> str:
        settings = cpu_args(
            model_name_or_path=model,
            dataset_name=data,
            output_dir=str(tmp_path / "out"),
            loss_type="rdro",
            rdro_alpha=0.4,
            max_steps=2,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
        )
        settings = {key: value for key, value in {**settings, **changes}.items() if value is not None}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write
