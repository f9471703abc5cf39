"""The data preparation scripts, on small files with the columns of the sets they are for."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import prepare_best_vs_worst
import prepare_ratings
import pytest
import quickstart_groups
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

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


def test_soft_labels_are_the_logistic_function_of_the_gap(tmp_path):
    source = write(tmp_path / "hs.jsonl", helpsteer2(10))
    arguments = ["--score_column", "helpfulness", "--soft_labels", "2"]
    prepare_best_vs_worst.main([source, str(tmp_path / "out.jsonl"), *arguments])
    found = [row["preference_probability"] for row in read(tmp_path / "out.jsonl")]
    assert len(found) == 8 and found == pytest.approx([1 / (1 + math.exp(-(4 - 1) / 2))] * 8)
    with pytest.raises(SystemExit):
        prepare_best_vs_worst.main([source, str(tmp_path / "x.jsonl"), *arguments[:3], "0"])


def test_quickstart_pairs_with_groups(tmp_path):
    quickstart_groups.main([str(tmp_path / "groups")])
    rows = load_dataset(str(tmp_path / "groups"))
    assert {split: len(rows[split]) for split in rows} == {"train": 1422, "test": 256}
    assert set(rows["test"]["group"]) == {"film", "product", "tweet", "editorial"}
    assert rows["train"].column_names == ["prompt", "chosen", "rejected", "group"]


def test_lists_of_responses(tmp_path):
    rows = [
        {"prompt": "q", "response": ["a", "b", "c"], "score": [2, 3, 1]},
        {"prompt": "p", "response": ["a"], "score": [1]},
    ]
    arguments = [write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl"), "--score_column", "score"]
    prepare_best_vs_worst.main(arguments)
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("b", "c")


def test_conversations_in_one_text_become_turns(tmp_path):
    import prepare_best_vs_worst
    import prepare_ratings

    def turns(*texts: str) -> list[dict]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    marker = "<extra_id_1>"
    texts = {
        "plain": turns("plain"),
        f"hi\n{marker}Assistant\nhello\n\nyou\n{marker}User\nbye": turns("hi", "hello\n\nyou", "bye"),
        f"{marker}User\nhi\n{marker}Assistant\noh\n{marker}User\nbye\n{marker}Assistant\n": turns("hi", "oh", "bye"),
        f"what is {marker}User in this data?": turns(f"what is {marker}User in this data?"),
    }  # fmt: skip
    rows = [{"prompt": text, "response": f"answer {j}", "helpfulness": j} for text in texts for j in range(2)]
    source = write(tmp_path / "in.jsonl", rows)
    prepare_best_vs_worst.main([source, str(tmp_path / "pairs.jsonl"), "--score_column", "helpfulness"])
    prepare_ratings.main([source, str(tmp_path / "rated.jsonl"), "--score_column", "helpfulness", "--threshold", "1"])
    assert [row["prompt"] for row in read(tmp_path / "pairs.jsonl")] == list(texts.values())
    assert [row["prompt"] for row in read(tmp_path / "rated.jsonl")][::2] == list(texts.values())

    wrong = [{**row, "prompt": f"hi\n{marker}Assistant\nhello"} for row in rows]
    with pytest.raises(SystemExit, match="turns from user to user, got user assistant in 'hi"):
        prepare_ratings.main(
            [write(tmp_path / "x.jsonl", wrong), str(tmp_path / "y"), "--score_column", "helpfulness"]
        )


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


def test_reward_model_without_a_padding_token_reads_the_last_token(tmp_path, reward_model):
    """The text ends in the end-of-text token, by which a batch would be padded."""
    import prepare_best_vs_worst

    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<|im_end|>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    source = write(tmp_path / "in.jsonl", helpsteer2(6))
    arguments = [source, str(tmp_path / "out.jsonl"), "--reward_model", str(tmp_path / "model"), "--device", "cpu"]
    prepare_best_vs_worst.main(arguments)
    for row in read(tmp_path / "out.jsonl"):
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"][0]["content"] + row[side][0]["content"] + "<|im_end|>").input_ids
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                assert row[f"score_{side}"] == pytest.approx(model.score(hidden).item(), abs=1e-5)


def without_head(path: Path) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("score")}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return "it has no score.weight, which would be random"


def with_code(path: Path) -> str:
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling.Gated"}
    (path / "config.json").write_text(json.dumps(config))
    return "brings code of its own"


def with_two_outputs(path: Path) -> str:
    Qwen2ForSequenceClassification(Qwen2Config.from_pretrained(path, num_labels=2)).save_pretrained(path)
    return "has 2 outputs"


def without_template(path: Path) -> str:
    (path / "chat_template.jinja").unlink()
    return "has no chat template"


def nothing(path: Path) -> str:
    (path / "config.json").unlink()
    return "cannot load the reward model"


@pytest.mark.parametrize("spoil", [without_head, with_code, with_two_outputs, without_template, nothing])
def test_what_is_no_reward_model_is_refused(tmp_path, reward_model, spoil):
    import prepare_best_vs_worst

    model = Path(shutil.copytree(reward_model, tmp_path / "model"))
    words = spoil(model)
    source = write(tmp_path / "in.jsonl", helpsteer2(2))
    with pytest.raises(SystemExit) as stop:
        prepare_best_vs_worst.main([source, str(tmp_path / "out.jsonl"), "--reward_model", str(model)])
    assert words in str(stop.value)


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


def test_killed_before_its_first_step_a_script_goes_on(tmp_path, capsys):
    from resumable import Output

    path, settings = tmp_path / "train.jsonl", {"a": 1}
    for _ in range(3):  # killed as soon as it has begun, again and again
        Output(path, settings)._file.close()
    with pytest.raises(SystemExit, match="was begun with other settings"):
        Output(path, {"a": 2})
    path.unlink()  # killed between the state and the output
    output = Output(path, settings)
    output.step(3, [{"prompt": "a"}, {"prompt": "b"}])
    output._file.write(b'{"prompt": "half')
    output._file.close()
    output = Output(path, settings)
    assert (output.rows_read, output.rows_written) == (3, 2)
    output.step(1, [{"prompt": "c"}])
    output.finish()
    assert read(path) == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    # The folder is a data set
    assert load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path.parent / "cache"))["prompt"][:] == [
        "a",
        "b",
        "c",
    ]
    path.write_text("")
    (tmp_path / ".train.jsonl.state.json").write_text(
        (tmp_path / ".train.jsonl.state.json").read_text().replace('"done": true', '"done": false')
    )
    with pytest.raises(SystemExit, match="is shorter than"):
        Output(path, settings)
    (tmp_path / ".train.jsonl.state.json").unlink()
    with pytest.raises(SystemExit, match="was not begun by this script"):
        Output(path, settings)
