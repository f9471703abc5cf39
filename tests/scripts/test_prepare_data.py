"""The data preparation scripts, on small files with the columns of the sets they are for."""

import json
import subprocess
import sys
from pathlib import Path

import prepare_best_vs_worst
import prepare_ratings
import pytest
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from ..tiny import tiny_tokenizer
from .conftest import SCRIPTS


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ultrafeedback(n: int) -> list[dict]:
    def completion(rating: str) -> dict:
        return {"response": f"rated {rating}", "annotations": {"helpfulness": {"Rating": rating, "Rationale": ""}}}

    ratings = ["5", "3", "N/A", "4"]
    return [
        {
            "source": "x",
            "instruction": f"question {i}",
            "models": ["gpt-3.5-turbo", "bard"] if i % 5 else ["bard", "gpt-4"],
            "completions": [completion(ratings[i % 4]), completion("1")],
        }
        for i in range(n)
    ]


def helpsteer2(n: int) -> list[dict]:
    """Two rows a prompt; every fifth prompt is a tie."""
    rows = []
    for i in range(n):
        for j in range(2):
            helpfulness = 2 if i % 5 == 0 else 1 + 3 * (j == i % 2)
            rows.append({"prompt": f"question {i}", "response": f"answer {i} {j}", "helpfulness": helpfulness})
    return rows


def test_ratings_become_labels(tmp_path):
    source = write(tmp_path / "uf.jsonl", ultrafeedback(40))
    assert prepare_ratings.main([source, str(tmp_path / "out.jsonl")]) == 0
    rows = read(tmp_path / "out.jsonl")
    expected = [(i, i % 4 == 0) for i in range(40) if i % 5 and i % 4 != 2]
    assert [(row["prompt"][0]["content"], row["label"]) for row in rows] == [(f"question {i}", b) for i, b in expected]
    assert set(rows[0]) == {"prompt", "completion", "label"}
    # Another threshold and all models
    prepare_ratings.main([source, str(tmp_path / "all.jsonl"), "--threshold", "4", "--model", "all", "--limit", "4"])
    assert [row["label"] for row in read(tmp_path / "all.jsonl")] == [True, False, False, False, False, True, False]


def test_ratings_in_columns(tmp_path):
    source = write(tmp_path / "hs.jsonl", helpsteer2(3))
    arguments = ["--score_column", "helpfulness", "--threshold", "4"]
    prepare_ratings.main([source, str(tmp_path / "out.jsonl"), *arguments])
    assert [row["label"] for row in read(tmp_path / "out.jsonl")] == [False, False, False, True, True, False]
    with pytest.raises(SystemExit, match="a row has no 'prompt', only a"):
        prepare_ratings.main([write(tmp_path / "x.jsonl", [{"a": 1}]), str(tmp_path / "y.jsonl"), *arguments])


def test_best_versus_worst_by_score(tmp_path):
    source = write(tmp_path / "hs.jsonl", helpsteer2(10))
    prepare_best_vs_worst.main([source, str(tmp_path / "out.jsonl"), "--score_column", "helpfulness"])
    rows = read(tmp_path / "out.jsonl")
    assert [row["chosen"][0]["content"] for row in rows] == [f"answer {i} {i % 2}" for i in range(10) if i % 5]
    assert {(row["score_chosen"], row["score_rejected"]) for row in rows} == {(4.0, 1.0)}


def test_lists_of_responses(tmp_path):
    rows = [
        {"prompt": "q", "response": ["a", "b", "c"], "score": [2, 3, 1]},
        {"prompt": "p", "response": ["a"], "score": [1]},
    ]
    arguments = [write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl"), "--score_column", "score"]
    prepare_best_vs_worst.main(arguments)
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("b", "c")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_best_versus_worst_by_reward_model(tmp_path, reward_model):
    source = write(tmp_path / "hs.jsonl", helpsteer2(9))
    outputs = []
    for batch_size in ("1", "4"):
        path = tmp_path / f"out{batch_size}.jsonl"
        arguments = ["--reward_model", reward_model, "--batch_size", batch_size, "--device", "cpu"]
        prepare_best_vs_worst.main([source, str(path), *arguments])
        outputs.append(read(path))
    assert len(outputs[0]) == 9
    for one, four in zip(*outputs, strict=True):
        assert one["score_chosen"] > one["score_rejected"]
        assert one["chosen"] == four["chosen"]  # padding changes nothing
        assert one["score_chosen"] == pytest.approx(four["score_chosen"], abs=1e-5)


@pytest.mark.parametrize("script", ["prepare_ratings", "prepare_best_vs_worst"])
def test_interrupted_run_continues(tmp_path, monkeypatch, script, capsys):
    module = __import__(script)
    source = write(tmp_path / "in.jsonl", helpsteer2(300))
    arguments = [source, "--score_column", "helpfulness"]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    module.main([arguments[0], str(whole), *arguments[1:]])

    # Killed in the second step, after some of its lines were written
    step = module.Output.step

    def killed(output, rows_read, rows):
        if output.rows_read:
            output._file.write(b'{"half a line')
            output._file.flush()
            raise KeyboardInterrupt
        step(output, rows_read, rows)

    monkeypatch.setattr(module.Output, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        module.main([arguments[0], str(broken), *arguments[1:]])
    monkeypatch.undo()
    assert b"half a line" in broken.read_bytes()
    assert module.main([arguments[0], str(broken), *arguments[1:]]) == 0
    assert broken.read_bytes() == whole.read_bytes()
    # Once more does nothing, other settings are refused, and so is a file of somebody else's
    before = broken.stat().st_mtime_ns
    assert module.main([arguments[0], str(broken), *arguments[1:]]) == 0
    assert broken.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="other settings"):
        module.main([arguments[0], str(broken), *arguments[1:], "--split", "other"])
    with pytest.raises(SystemExit, match="not begun"):
        module.main([arguments[0], source, *arguments[1:]])


@pytest.mark.slow
def test_scripts_run_by_themselves(tmp_path):
    source = write(tmp_path / "in.jsonl", helpsteer2(3))
    command = [sys.executable, str(SCRIPTS / "prepare_best_vs_worst.py"), source, str(tmp_path / "out.jsonl")]
    result = subprocess.run([*command, "--score_column", "helpfulness"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 rows from 6" in result.stderr
