"""
The command line: a YAML file trains a model through each of the two ways to start one, and every mistake a user can
make ends in one sentence. Runs that start processes cost 10-20 s each, so what can be seen without them is checked in
this process, through the same functions.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import trl_rdro
from trl_rdro.cli import launch, main, train

from ..helpers import ROOT, hold, refusal, run_process, spoil
from ..tiny import tiny_preferences


CLI = [sys.executable, "-m", "trl_rdro.cli"]
SCRIPT = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "scripts" / "dpo.py")]


def logged_steps(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]


# Runs


@pytest.mark.slow
def test_yaml_trains_through_the_command(config, tmp_path):
    # PyYAML reads 5e-2 as text, which the parser must turn into a number. The command line wins over the file.
    path = config(learning_rate="5e-2", max_steps=50, env={"TRL_RDRO_TEST": "1"}, activation_checkpointing=None)
    result = run_process([*CLI, "dpo", "--config", path, "--max_steps", "2", "--num_processes", "2", "--cpu"])
    assert result.returncode == 0, result.stderr
    first, second, *_ = logged_steps(tmp_path / "out")
    assert second["epoch"] == 1  # 16 pairs in two steps of four on each of two processes
    for noise in ("FutureWarning", "were not passed to `accelerate launch`"):
        assert noise not in result.stderr
    assert first["loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert second["loss"] != first["loss"]
    assert first["learning_rate"] == pytest.approx(5e-2)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_yaml_trains_through_accelerate_launch(config, tmp_path):
    path = config(
        loss_type=["rdro", "sft"],
        loss_weights=[1.0, 0.5],
        use_peft=True,
        lora_target_modules="all-linear",
        eval_strategy="steps",
        eval_steps=2,
        dataset_test_split="train",
    )
    result = run_process([*SCRIPT, "--config", path])
    assert result.returncode == 0, result.stderr
    steps = logged_steps(tmp_path / "out")
    assert steps[0]["loss"] > 2 * math.log(2)  # the sft term comes on top of the constant
    assert any("eval_loss" in step for step in steps)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_error_in_the_training_process_is_one_sentence_through_the_launcher(config, tmp_path):
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    result = run_process([*CLI, "dpo", "--config", config(dataset_name=str(tmp_path / "wrong.jsonl"))])
    assert result.returncode == 2
    assert result.stderr.count("trl-rdro: error: ") == 1
    assert "chosen" in result.stderr
    assert "Traceback" not in result.stderr


def test_resume_continues_from_the_last_checkpoint(config, tmp_path):
    assert train.main("dpo", ["--config", config()]) == 0
    path = config(max_steps=3, save_steps=1, resume_from_checkpoint=True, resume_with_changes=True)
    assert train.main("dpo", ["--config", path]) == 0
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [step["step"] for step in history if "loss" in step] == [1, 2, 3]


def test_kto_trains_on_unpaired_and_on_paired_data(config, tmp_path):
    pairs = tiny_preferences(8)
    rows = [(row["prompt"], row["chosen"], True) for row in pairs]
    rows += [(row["prompt"], row["rejected"], False) for row in pairs]
    unpaired = Dataset.from_list([dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows])
    unpaired.to_json(tmp_path / "unpaired.jsonl")
    for dataset in (str(tmp_path / "unpaired.jsonl"), None):
        changes = {"dataset_name": dataset} if dataset else {}
        assert train.main("kto", ["--config", config(**changes)]) == 0
        assert "loss" in logged_steps(tmp_path / "out")[0]


# Parsing


def test_yaml_command_line_and_environment(config, monkeypatch):
    monkeypatch.setenv("TRL_RDRO_TEST", "")
    path = config(loss_type=["rdro", "sft"], loss_weights=[0.8, 0.2], wdpo_rho="5e-2", env={"TRL_RDRO_TEST": "yes"})
    (_, args, model_args, _), *_ = train.parse("dpo", ["--config", path, "--rdro_alpha", "0.3"])
    assert type(args) is trl_rdro.DPOConfig
    assert args.loss_type == ["rdro", "sft"]
    assert args.loss_weights == [0.8, 0.2]
    assert args.wdpo_rho == 0.05
    assert args.rdro_alpha == 0.3
    assert model_args.use_peft is False
    assert os.environ["TRL_RDRO_TEST"] == "yes"


@pytest.fixture
def launched(monkeypatch):
    """Replace `accelerate launch` by a list of the arguments that it was called with."""
    calls = []
    monkeypatch.setattr(launch, "launch_command", calls.append)
    return calls


def test_launch_options_are_told_from_training_options(config, launched):
    path = config(num_machines=1, multi_gpu=True, use_fsdp=False)
    argv = ["--max_steps", "2", "--num_processes", "2", "--config", path, "--accelerate_config", "zero2"]
    assert main(["dpo", *argv]) == 0
    args = launched[0]
    assert (args.num_processes, args.num_machines, args.multi_gpu, args.use_fsdp) == (2, 1, True, False)
    assert Path(args.config_file).name == "zero2.yaml"
    assert args.module and args.training_script == "trl_rdro.cli.train"
    assert args.training_script_args == ["dpo", "--max_steps", "2", "--config", path]


@pytest.mark.parametrize("where", ["command line", "config"])
def test_several_processes_on_a_cpu_are_several(config, launched, where):
    argv = ["--accelerate_config", "single_gpu"] if where == "config" else ["--cpu"]
    assert main(["dpo", "--config", config(), *argv, "--num_processes", "2"]) == 0
    assert (launched[0].num_processes, launched[0].multi_gpu, launched[0].cpu) == (2, True, False)
    assert ("--use_cpu" in launched[0].training_script_args) == (where == "command line")


def test_one_process_unless_several_are_asked_for(config, launched, monkeypatch):
    assert main(["dpo", "--config", config()]) == 0
    assert (launched[0].num_processes, launched[0].multi_gpu, launched[0].num_machines) == (1, False, 1)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    assert main(["dpo", "--config", config()]) == 0
    assert (launched[1].num_processes, launched[1].multi_gpu) == (4, True)


def test_more_processes_than_devices_are_refused(config, launched, capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    message = refusal(capsys, main(["dpo", "--config", config(), "--num_processes", "2"]))
    assert "--num_processes 2 is more than the 1" in message and not launched


def test_threads_are_those_of_the_machine(config, launched, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 6)
    for argv in ([], ["--num_processes", "2"], ["--num_cpu_threads_per_process", "1"]):
        assert main(["dpo", "--config", config(), *argv]) == 0
    assert [args.num_cpu_threads_per_process for args in launched] == [6, 3, 1]


def test_a_token_is_in_no_process_list(config, launched, monkeypatch):
    monkeypatch.delenv("TRL_RDRO_HUB_TOKEN", raising=False)
    path = config(hub_token="hf_of_the_file")
    assert main(["dpo", "--config", path]) == 0
    assert main(["dpo", "--config", path, "--hub_token", "hf_SECRET", "--beta", "0.2"]) == 0
    assert main(["dpo", "--hub_token=hf_SECRET", "--config", path]) == 0
    assert not any("hf_" in str(vars(args)) for args in launched)
    assert launched[1].training_script_args[-2:] == ["--beta", "0.2"]
    # What the launched process makes of it
    (_, training_args, *_), _, _ = train.parse("dpo", launched[1].training_script_args[1:])
    train.take_hub_token(training_args)
    assert training_args.hub_token == "hf_SECRET" and "TRL_RDRO_HUB_TOKEN" not in os.environ


def test_a_directory_in_use_is_refused(config, tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path / "out"), ready, "alone"))
    holder.start()
    assert ready.wait(30)
    message = refusal(capsys, train.main("dpo", ["--config", config(model_name_or_path="no/such/model")]))
    assert f"Another run is writing to `output_dir='{tmp_path / 'out'}'` (process {holder.pid} on" in message
    holder.kill()
    holder.join()


def test_another_run_is_refused_before_its_model_is_loaded(config, tmp_path, capsys, monkeypatch):
    assert train.main("dpo", ["--config", config()]) == 0
    loading = mock.Mock(side_effect=AssertionError("a model was loaded"))
    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", loading)
    path = config(loss_type="ddro", learning_rate=1e-5, resume_from_checkpoint=True)
    message = refusal(capsys, train.main("dpo", ["--config", path]))
    assert "`loss_type` ['rdro'] (now ['ddro'])" in message and "`learning_rate` 1e-06 (now 1e-05)" in message
    path = config(resume_from_checkpoint=True, resume_with_changes=True, loss_type="ddro")
    with pytest.raises(AssertionError, match="a model was loaded"):
        train.main("dpo", ["--config", path])


def test_accelerate_config_may_be_a_file(config, tmp_path, launched):
    (tmp_path / "mine.yaml").write_text("distributed_type: 'NO'\nnum_processes: 1\n")
    assert main(["dpo", "--config", config(accelerate_config=str(tmp_path / "mine.yaml"))]) == 0
    assert launched[0].config_file == str(tmp_path / "mine.yaml")


def test_script_accepts_launch_options_of_the_yaml_file(config):
    # The training process reads the same file as the launcher, and leaves alone what was meant for that.
    _, launch_flags, unused = train.parse("dpo", ["--config", config(num_processes=2, accelerate_config="zero3")])
    assert launch_flags == ["--accelerate_config", "zero3", "--num_processes", "2"]
    assert unused == []


# Refusals


@pytest.mark.parametrize(
    ("changes", "argv", "words"),
    [
        ({"rdro_alpha": 1.5}, [], ["rdro_alpha", "1.5"]),
        ({"rdro_alpha": "much"}, [], ["rdro_alpha", "much"]),
        ({"loss_type": "rdr"}, [], ["rdr", "Did you mean 'rdro'"]),
        ({}, ["--learning_rate", "fast"], ["learning_rate", "fast"]),
        ({"rdro_alhpa": 0.4}, [], ["--rdro_alhpa", "did you mean --rdro_alpha"]),
        ({}, ["--rdro_alhpa", "0.4"], ["--rdro_alhpa", "did you mean --rdro_alpha"]),
        ({}, ["--rdro_alph", "0.4"], ["unknown option --rdro_alph"]),
        ({}, ["--qqqqqq=3"], ["unknown option --qqqqqq"]),
        ({}, ["stray.yaml"], ["stray.yaml", "--config"]),
        ({}, ["--num_processes", "two"], ["num_processes", "two"]),
        ({}, ["--accelerate_config", "zero9"], ["zero9", "zero3"]),
        ({"model_name_or_path": None}, [], ["model_name_or_path"]),
        ({"dataset_name": None}, [], ["dataset_name"]),
        ({"env": "TRL_RDRO_TEST=1"}, [], ["env"]),
        ({}, ["--config"], ["--config"]),
    ],
)
def test_bad_arguments_are_refused_before_a_launch(config, capsys, launched, changes, argv, words):
    message = refusal(capsys, main(["dpo", "--config", config(**changes), *argv]))
    assert not launched
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"), [(None, "my.yaml"), ("a: [1", "expected"), ("- 1\n- 2\n", "mapping"), ("", "mapping")]
)
def test_bad_config_files_are_refused(tmp_path, capsys, launched, text, word):
    path = tmp_path / "my.yaml"
    if text is not None:
        path.write_text(text)
    assert word in refusal(capsys, main(["dpo", "--config", str(path)]))
    assert not launched


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_name": "nowhere/none"}, ["nowhere/none", "not a local file or directory", "hub"]),
        ({"dataset_name": "nowhere/none.jsonl"}, ["nowhere/none.jsonl", "neither a file nor a directory"]),
        ({"dataset_name": "/nowhere"}, ["/nowhere", "neither a file nor a directory"]),
        ({"dataset_name": "{tmp}/notes.txt"}, ["notes.txt", ".jsonl"]),
        ({"dataset_name": "{tmp}/broken.jsonl"}, ["broken.jsonl"]),
        ({"dataset_name": "{tmp}/empty.jsonl"}, ["empty.jsonl"]),
        ({"dataset_name": "{tmp}/wrong.jsonl"}, ["chosen", "rejected", "answer"]),
        ({"dataset_name": None, "datasets": [{"path": "nowhere/none"}]}, ["nowhere/none"]),
        ({"dataset_name": None, "datasets": [{"pathh": "nowhere/none"}]}, ["pathh"]),
        *(
            ({"dataset_name": None, "datasets": [{"path": "{data}", "fraction": value}]}, ["fraction"])
            for value in (-1, 0, float("nan"), "x", True)
        ),
        ({"dataset_name": None, "datasets": [{"path": "{data}", "columns": ["x"]}]}, ["datasets", "x"]),
        ({"dataset_name": None, "datasets": [{"path": "{data}", "split": "nope"}]}, ["datasets", "nope"]),
        ({"dataset_name": None, "datasets": [{"path": "{data}", "name": "x"}]}, ["no configuration 'x'", "a file"]),
        ({"dataset_config": "x"}, ["no configuration 'x' (dataset_config)", "a file has none"]),
        ({"dataset_name": "{folder}", "dataset_config": "x"}, ["no configuration 'x'", "it has default"]),
        ({"test_split_size": 2.0}, ["test_split_size"]),
        ({"model_revision": "x"}, ["local directory, which has no revision 'x'"]),
        ({"model_init_kwargs": {"revision": "x"}}, ["no revision 'x'"]),
        ({"dataset_train_split": "training"}, ["training", "only: train"]),
        ({"eval_strategy": "epoch"}, ["test", "dataset_test_split", "eval_strategy"]),
        ({"model_name_or_path": "/no/model"}, ["/no/model", "not a local directory"]),
        ({"model_name_or_path": "nobody/no-model"}, ["nobody/no-model", "hub"]),
        ({"model_name_or_path": "{tmp}"}, ["cannot load the model"]),
        ({"resume_from_checkpoint": "/no/checkpoint"}, ["cannot resume", "/no/checkpoint"]),
    ],
)
def test_bad_data_and_models_are_refused(config, data, tmp_path, capsys, changes, words):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": [1}\n')
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    names = {"{tmp}": str(tmp_path), "{data}": data, "{folder}": str(Path(data).parent)}

    def named(value):
        if isinstance(value, list):
            return [named(inner) for inner in value]
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        for short, name in names.items():
            value = value.replace(short, name) if isinstance(value, str) else value
        return value

    changes = {key: named(value) for key, value in changes.items()}
    message = refusal(capsys, train.main("dpo", ["--config", config(**changes)]))
    for word in words:
        assert word in message


def test_script_refuses_launch_options_after_its_name(config, capsys):
    message = refusal(capsys, train.main("dpo", ["--config", config(), "--num_processes", "2"]))
    assert "--num_processes" in message and "accelerate launch" in message


def test_parameters_that_are_not_finite_are_one_sentence(config, tmp_path, capsys):
    assert train.main("dpo", ["--config", config(save_steps=1)]) == 0
    spoil(tmp_path / "out" / "checkpoint-1")
    path = config(save_steps=1, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    message = refusal(capsys, train.main("dpo", ["--config", path]))
    assert "checkpoint-1 are not finite" in message and "Resume from an older checkpoint" in message


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_loss_that_is_not_finite_is_one_sentence(method, model, config, tmp_path, capsys):
    weights = shutil.copytree(model, tmp_path / "model")
    spoil(weights)
    message = refusal(capsys, train.main(method, ["--config", config(model_name_or_path=str(weights))]))
    assert "not finite" in message and "the model as it was loaded" in message


def test_error_inside_training_keeps_its_traceback(config, monkeypatch):
    monkeypatch.setattr(trl_rdro.DPOTrainer, "train", mock.Mock(side_effect=ValueError("not the user's fault")))
    with pytest.raises(ValueError, match="not the user's fault"):
        train.main("dpo", ["--config", config()])


def child_failed(exitcode: int) -> ChildFailedError:
    return ChildFailedError("train", {0: ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="none")})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (subprocess.CalledProcessError(1, "python"), 1),
        (subprocess.CalledProcessError(2, "python"), 2),
        (child_failed(2), 2),
    ],
)
def test_exit_code_is_that_of_the_training_process(config, capsys, monkeypatch, error, code):
    monkeypatch.setattr(launch, "launch_command", mock.Mock(side_effect=error))
    assert main(["dpo", "--config", config()]) == code
    assert "trl-rdro: error" not in capsys.readouterr().err  # the process itself has said what is wrong


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(-signal.SIGKILL, "python"), child_failed(-9)])
def test_killed_training_process_is_reported(config, capsys, monkeypatch, error):
    monkeypatch.setattr(launch, "launch_command", mock.Mock(side_effect=error))
    assert "SIGKILL" in refusal(capsys, main(["dpo", "--config", config()]))


# Data sets


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "directory", "mixture", "streaming"])
def test_local_files_are_data_sets(config, tmp_path, kind):
    pairs = tiny_preferences(6)
    suffix = kind if kind in ("json", "csv", "parquet") else "jsonl"
    path = tmp_path / "data" / f"pairs.{suffix}"
    path.parent.mkdir()
    {"csv": pairs.to_csv, "parquet": pairs.to_parquet}.get(suffix, pairs.to_json)(path)
    changes = {
        "directory": {"dataset_name": str(path.parent)},
        "mixture": {
            "dataset_name": None,
            "datasets": [{"path": str(path)}, {"path": str(path), "split": "train[:2]"}],
        },
        "streaming": {"dataset_name": str(path), "dataset_streaming": True},
    }.get(kind, {"dataset_name": str(path)})
    (script_args, _, _, dataset_args), *_ = train.parse("dpo", ["--config", config(**changes)])
    dataset, _ = train.load_data(script_args, dataset_args, with_eval=False)
    rows = list(dataset)
    assert rows[0] == pairs[0]
    assert len(rows) == (8 if kind == "mixture" else 6)


# The command itself


def test_help_of_the_command_needs_no_torch():
    code = (
        "import sys; from trl_rdro.cli import main; main([]); sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    )
    result = run_process([sys.executable, "-c", code])
    assert result.returncode == 0
    assert "dpo" in result.stdout and "kto" in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.strip() == f"trl-rdro {trl_rdro.__version__}"


@pytest.mark.parametrize(("method", "own"), [("dpo", ["--kldpo_tau", "--wdpo_rho"]), ("kto", ["--desirable_weight"])])
def test_help_lists_our_options_and_trls(capsys, method, own):
    with pytest.raises(SystemExit) as exit:
        main([method, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--rdro_alpha", "--lora_r", "--dataset_name", "--accelerate_config", *own):
        assert option in printed


def test_quickstart_recipe_is_strictly_valid():
    path = str(ROOT / "recipes" / "quickstart.yaml")
    (script_args, args, _, _), *_ = train.parse(
        "dpo", ["--config", path, "--model_name_or_path", "any", "--use_cpu", "--bf16", "false"]
    )
    assert args.loss_type == ["rdro"]
    assert {file.stem for file in (ROOT / script_args.dataset_name).glob("*.jsonl")} == {"train", "test"}
