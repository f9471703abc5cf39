"""The quickstart data as packaged."""

from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from trl_rdro.quickstart import QUICKSTART_DIR, load_quickstart


COLUMNS = {
    "prompt": "string",
    "chosen": "string",
    "rejected": "string",
    "domain": "string",
    "chosen_mean": "float64",
    "rejected_mean": "float64",
    "chosen_sd": "float64",
    "rejected_sd": "float64",
    "rater_disagreement": "float64",
}


@pytest.fixture(scope="module", params=["train", "test"])
def split(request):
    return load_quickstart(request.param)


def test_columns_are_flat_and_typed(split):
    assert {name: feature.dtype for name, feature in split.features.items()} == COLUMNS


def test_no_text_occurs_twice_in_all_the_data():
    texts = Counter()
    for name in ("train", "test"):
        dataset = load_quickstart(name)
        texts.update(dataset["chosen"])
        texts.update(dataset["rejected"])
    assert texts.most_common(1)[0][1] == 1


def test_sizes():
    assert len(load_quickstart("train")) >= 1000
    assert Counter(load_quickstart("test")["domain"]) == {"tweet": 64, "film": 64, "product": 64, "editorial": 64}
    assert set(load_quickstart("train")["domain"]) == {"tweet", "film", "product", "editorial"}
    assert sum(file.stat().st_size for file in Path(QUICKSTART_DIR).iterdir()) < 1_000_000


def test_each_domain_has_one_prompt(split):
    assert len(set(zip(split["domain"], split["prompt"], strict=True))) == 4


def test_people_rated_chosen_above_rejected(split):
    for row in split:
        assert row["chosen_mean"] >= 1.25
        assert row["rejected_mean"] <= -1.25
        assert 0 <= row["rater_disagreement"] < 0.5


def test_length_does_not_give_the_preference_away(split):
    for row in split:
        assert len(row["chosen"].split()) == len(row["rejected"].split())


def test_first_rows_mix_the_domains():
    counts = Counter(load_quickstart("test")[:64]["domain"])
    assert min(counts.values()) >= 6


def test_load_dataset_finds_the_splits(tmp_path):
    dataset = load_dataset(QUICKSTART_DIR, cache_dir=str(tmp_path))
    assert set(dataset) == {"train", "test"}
    assert dataset["test"].to_list() == load_quickstart("test").to_list()


def test_carries_its_licence():
    notice = (Path(QUICKSTART_DIR) / "LICENSE").read_text()
    assert "MIT" in notice and "C.J. Hutto" in notice and "shall be included" in notice


def test_unpaired_is_the_pairs_taken_apart(split):
    name = "train" if len(split) == len(load_quickstart("train")) else "test"
    unpaired = load_quickstart(name, unpaired=True)
    assert unpaired.features["label"].dtype == "bool"
    expected = []
    for row in split:
        expected.append((row["prompt"], row["chosen"], True, row["chosen_mean"]))
        expected.append((row["prompt"], row["rejected"], False, row["rejected_mean"]))
    columns = (unpaired[name] for name in ("prompt", "completion", "label", "mean"))
    assert list(zip(*columns, strict=True)) == expected


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_quickstart("validation")
