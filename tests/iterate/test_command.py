"""`trl-rdro iterate`: a YAML file runs the loop, and a mistake ends in one sentence."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from trl_rdro.cli import iterate, main, train
from trl_rdro.iterate.rewards import positivity

from ..helpers import ROOT, run_process
from ..tiny import cpu_args
from .worker import rows_of, weights


@pytest.mark.slow
@pytest.mark.parametrize("way", ["command", "script"])
def test_yaml_file_runs_the_loop(way, config, tmp_path):
    script = ["-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "scripts" / "iterate.py")]
    command = [sys.executable, *(["-m", "trl_rdro.cli", "iterate"] if way == "command" else script)]
    argv = ["--config", config(beta=None), "--seed", "3", *(["--num_processes", "1"] if way == "command" else [])]
    result = run_process([*command, *argv])
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"model of round 1 in {tmp_path / 'out'}/final" in result.stdout
    assert weights(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["seed"] == 3 and settings["beta"] == 1.0  # not TRL's 0.1
    assert settings["loss_type"] == ["cdpo"] and settings["label_smoothing"] == 0.1


def test_recipe_is_strictly_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["--config", "recipes/iterate.yaml", "--model_name_or_path", "any", "--use_cpu", "true", "--bf16", "false"]
    (config, script_args, args, _), judge, *flags = iterate.parse(argv)
    assert flags == [[], []] and judge.functions == [positivity]
    assert config.guaranteed_margin(args) > 0  # although its judge can be certain
    train, test = iterate.load_prompts(script_args)
    assert (len(train), len(test)) == (32, 24)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_method_decides_the_options(config, tmp_path):
    assert iterate.run(["--config", config(method="kto", loss_type="rdro")]) == 0
    assert "label" in rows_of(tmp_path / "out" / "round_000" / "train.jsonl")[0]
    assert iterate.find_method(["--config", config(method="kto"), "--method", "dpo"]) == "dpo"
    assert iterate.find_method([]) == "dpo"


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_round_of_on_policy_rdro_is_two_commands(method, config, tmp_path, capsys):
    """Sampling writes what training takes: tokens, and the log-probabilities under the model that drew them."""
    settings = {"method": method, "loss_type": "rdro", "sample_only": True, "samples_per_prompt": 4}
    assert iterate.run(["--config", config(**settings, max_steps=None, per_device_train_batch_size=None)]) == 0
    data = tmp_path / "out" / "data"
    assert f"--dataset_name {data} --precompute_ref_log_probs true" in capsys.readouterr().out
    rows = rows_of(data / "train.jsonl")
    assert len(rows) == 6 * (2 if method == "dpo" else 4) and not (tmp_path / "out" / "final").exists()
    trained = tmp_path / "trained"
    options = {**cpu_args(), "output_dir": str(trained), "loss_type": "rdro", "max_steps": 2, "logging_steps": 1}
    options |= {"dataset_name": str(data), "precompute_ref_log_probs": True, "per_device_train_batch_size": 12}
    options |= {"model_name_or_path": yaml.safe_load(Path(config()).read_text())["model_name_or_path"]}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(options))
    assert train.main(method, ["--config", str(path)]) == 0
    first, *_ = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    # The columns are those of the model that is trained: the policy starts at its reference
    assert first["logratios/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["reference/log_normalisation"] == pytest.approx(0, abs=1e-4)


def test_pairs_that_are_no_sample_of_what_was_drawn_are_warned_of(config, caplog):
    for changes, said in (
        ({"loss_type": "rdro", "pair_selection": "best_vs_worst"}, True),
        ({"loss_type": "rdro", "pair_selection": "threshold", "samples_per_prompt": 2}, True),
        ({"loss_type": "rdro", "pair_selection": "best_vs_worst", "samples_per_prompt": 2}, False),
        ({"loss_type": "rdro"}, False),
        ({"loss_type": "sigmoid", "pair_selection": "best_vs_worst"}, False),
    ):
        caplog.clear()
        (loop, _, args, _), *_ = iterate.parse(["--config", config(**changes)])
        assert ("are no sample of what was drawn" in caplog.text) == said, changes
    assert loop.selection(args) == "best_vs_worst"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_name_or_path": None}, "no model given"),
        ({"dataset_name": None}, "no prompts given"),
        ({"sampling_mx": 0.5}, "unknown option --sampling_mx, did you mean --sampling_mix?"),
        ({"sampling_mix": 2.0}, "`sampling_mix` must be a number in [0, 1], got 2.0"),
        ({"reward_funcs": ["tests.nowhere.f"]}, "Cannot import the function 'tests.nowhere.f'"),
        ({"loss_type": "rdro", "reference_mix": 0.5}, "`reference_mix=0.5` cannot be combined with rdro"),
        ({"reward_funcs": None}, "Set one of `reward_funcs`, `preference_func` and `labelled_file`"),
        ({"method": "reinforce"}, "`method` has no value 'reinforce'"),
    ],
)
def test_mistake_ends_in_one_sentence_before_anything_is_launched(changes, sentence, config, capsys, monkeypatch):
    monkeypatch.setattr(iterate, "launch_module", lambda *args: pytest.fail("launched"))
    assert main(["iterate", "--config", config(**changes)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset_train_split": "training"}, "the dataset has no split training"),
        ({"model_name_or_path": "/no/model"}, "cannot load the model /no/model"),
        ({"max_length": 7}, "No prompt fits: `max_length=7` leaves 1 tokens"),
    ],
)
def test_mistake_in_the_data_ends_in_one_sentence(changes, sentence, config, capsys):
    assert iterate.run(["--config", config(**changes)]) == 2
    assert sentence in capsys.readouterr().err


def test_config_without_a_file_ends_in_one_sentence(capsys):
    assert main(["iterate", "--config"]) == 2
    assert "expected a file name after --config" in capsys.readouterr().err
    assert main(["iterate", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: No such file" in capsys.readouterr().err


def test_data_without_prompts_are_refused(config, tmp_path, capsys):
    path = config()
    (tmp_path / "prompts.jsonl").write_text('{"question": "why?"}\n')
    assert iterate.run(["--config", path]) == 2
    assert "lacks the column prompt of a data set of prompts; it has question" in capsys.readouterr().err
