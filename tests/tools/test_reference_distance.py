"""How far a reference is from the data's mixture: about 0 for a model that was fitted to such data, positive else."""

import pytest
import torch
from datasets import Dataset

from trl_rdro.errors import UserError
from trl_rdro.tools.reference_distance import is_near, measure, report_lines
from trl_rdro.tools.scoring import load_policy, prepare

from ..tiny import save_tiny, tiny_preferences, tiny_tokenizer
from ..training import flatten, train


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> str:
    """A tiny model that has learnt the completions of both classes."""
    folder = tmp_path_factory.mktemp("fitted")
    rows = [{**row, "rejected": row["chosen"], "chosen": row["rejected"]} for row in tiny_preferences(400, seed=1)]
    data = Dataset.from_list([*tiny_preferences(400, seed=1), *rows])
    settings = {"loss_type": "sft", "max_steps": 150, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
    trainer = train(
        save_tiny(folder), folder / "run", trainer_kwargs={"train_dataset": data}, logging_steps=1000, **settings
    )
    trainer.save_model(str(folder / "model"))
    tiny_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def distance_of(model: str, dataset: Dataset):
    policy = load_policy(model)
    return measure(policy, prepare(dataset, policy.tokenizer, 64))


@pytest.mark.slow
@pytest.mark.parametrize("is_paired", [True, False])
def test_near_for_a_model_that_was_fitted_and_far_for_one_that_was_not(qwen2, fitted, is_paired):
    data = tiny_preferences(120, seed=7)
    data = data if is_paired else Dataset.from_list(flatten(data))
    near, far = distance_of(fitted, data), distance_of(qwen2, data)
    difference = near["all"]["difference"]
    assert is_near(near) and abs(difference["mean"]) < max(0.1, 3 * difference["standard_error"])
    for name in ("all", "preferred", "others"):
        assert far[name]["difference"]["mean"] > max(1.0, 5 * far[name]["difference"]["standard_error"])
        assert far[name]["difference"]["mean"] == pytest.approx(far[name]["fitted"] - far[name]["reference"])
    assert far["preferred"]["n"] == far["others"]["n"] or not is_paired
    assert sum(part["n"] for part in far["by_length"]) == far["all"]["n"]
    lines = list(report_lines(far, "data.jsonl"))
    assert "at least" in lines[-1] and f"trl sft --model_name_or_path {qwen2} --dataset_name data.jsonl" in lines[-1]
    assert list(report_lines(near))[-1].startswith("Train as it is")


def test_too_few_rows_are_refused(qwen2):
    with pytest.raises(UserError, match="needs 40 rows, got 8"):
        distance_of(qwen2, tiny_preferences(8))


def test_the_fitted_figure_is_a_lower_bound_of_the_exact_one(qwen2):
    """Of a data set that is one distribution, known exactly: the gain stays below KL(data || reference)."""
    data = Dataset.from_list(
        [{"prompt": "say:", "completion": " good" if i % 2 else " bad", "label": i % 4 < 2} for i in range(160)]
    )
    policy = load_policy(qwen2)
    rows = prepare(data, policy.tokenizer, 64)
    found = measure(policy, rows)
    exact = torch.tensor(0.5).log().item() - found["all"]["reference"]  # entropy of the data is log 2
    assert 0.3 * exact < found["all"]["difference"]["mean"] <= exact + 3 * found["all"]["difference"]["standard_error"]
