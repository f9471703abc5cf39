"""
A mistake of the user is one sentence on stderr and exit code 2, in every command: bad arguments, bad YAML files,
values of another kind than the field's, accelerate configs, and names of files that cannot be.
"""

import json
import subprocess
import sys

import pytest

from trl_rdro.cli import COMMANDS, launch, main, train
from trl_rdro.tools.recipes import recipe_directory

from ..helpers import refusal


READS_YAML = ("dpo", "kto", "inspect", "estimate", "iterate")
REQUIRED = {
    "dynamics": ["--cycle", "0.3", "--a", "0.5", "--b", "1"],
    "score": ["--model", "any", "--dataset", "any"],
    "plot": ["run"],
}
ON_CPU = {name: ["--use_cpu", "--bf16", "false"] for name in ("dpo", "kto", "iterate")}
# An option of each command that takes a number
NUMBERS = {
    **dict.fromkeys(("dpo", "kto", "iterate"), "--learning_rate"),
    "inspect": "--row",
    "estimate": "--gpus",
    "score": "--limit",
    "dynamics": "--rounds",
}
# And one whose values are listed
CHOICES = {
    **dict.fromkeys(("dpo", "kto", "estimate"), "--dtype"),
    "inspect": "--dtype",
    "score": "--dtype",
    "iterate": "--pair_selection",
}


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    monkeypatch.setattr(launch, "launch_command", lambda args: pytest.fail("launched"))


def refused(capsys, *argv: str) -> str:
    """The sentence that a command line ends in. Nothing else is printed, above all no usage."""
    code = main(list(argv))
    captured = capsys.readouterr()
    assert code == 2
    sentences = [line for line in captured.err.splitlines() if line.startswith("trl-rdro: error: ")]
    assert len(sentences) == 1 and not captured.out
    assert "usage:" not in captured.err + captured.out and "Traceback" not in captured.err
    return sentences[0].removeprefix("trl-rdro: error: ")


# Arguments


def test_unknown_command(capsys):
    message = refused(capsys, "dpoo")
    assert "dpoo" in message and "dpo" in message
    assert "--nope" in refused(capsys, "--nope", "dpo")


def bad_arguments():
    for command in COMMANDS:
        required = REQUIRED.get(command, []) + ON_CPU.get(command, [])
        yield pytest.param(command, [*required, "--nope", "1"], "--nope", id=f"{command}: unknown option")
        yield pytest.param(command, [*required, "--nope=1"], "--nope", id=f"{command}: unknown option with =")
        last = {"recipes": "--copy", "plot": "--output"}.get(command, NUMBERS.get(command))
        yield pytest.param(command, [*required, last], last, id=f"{command}: no value")
        if command in NUMBERS:
            argv = [*required, NUMBERS[command], "many"]
            yield pytest.param(command, argv, "many", id=f"{command}: text for a number")
        if command in CHOICES:
            argv = [*required, CHOICES[command], "nope"]
            yield pytest.param(command, argv, "nope", id=f"{command}: none of the choices")
        if command in REQUIRED:
            yield pytest.param(command, [], "required", id=f"{command}: nothing given")
    for command in ("recipes", "score", "dynamics", "inspect", "estimate", "dpo", "kto", "iterate"):
        known = ["--model_name_or_path", "any", "--dataset_name", "any", "--max_length", "8"]
        if command == "iterate":
            known += ["--reward_funcs", "trl_rdro.iterate.rewards.positivity", "--max_completion_length", "4"]
        argv = REQUIRED.get(command, []) + ON_CPU.get(command, []) + (known if command in READS_YAML else [])
        yield pytest.param(command, ["stray.yaml", *argv], "stray.yaml", id=f"{command}: stray argument")


@pytest.mark.parametrize(("command", "argv", "word"), list(bad_arguments()))
def test_bad_arguments(command, argv, word, capsys):
    assert word in refused(capsys, command, *argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_no_mistake(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as exit:
        code = exit.code
    assert code == 0
    assert "usage: trl-rdro" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["recipes", "plot", "dynamics", "score", "inspect", "estimate"])
def test_parsing_imports_nothing_slow(command):
    code = (
        f"import sys; from trl_rdro.cli import main; assert main([{command!r}, '--gpus', 'x', '--row', 'x']) == 2; "
        "sys.exit(bool({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# YAML files

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGED_BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n  k{i}: 1\n" for i in range(1, 12)
)
BAD_YAML = {
    "a list": (b"- 1\n- 2\n", "not a list"),
    "text": (b"hello\n", "not a single value"),
    "a number": (b"3\n", "not a single value"),
    "empty": (b"", "not an empty file"),
    "a comment": (b"# nothing\n", "not an empty file"),
    "open bracket": (b"a: [1\n", "expected"),
    "tabs": (b"a:\tb\n\tc: 1\n", "\\t"),
    "two documents": (b"a: 1\n---\nb: 2\n", "single document"),
    "a tag that runs code": (b'a: !!python/object/apply:os.system ["true"]\n', "tag"),
    "undefined alias": (b"a: *b\n", "undefined alias"),
    "binary": (bytes(range(256)), "UTF-8"),
    "latin-1": ("a: caf\xe9\n".encode("latin1"), "UTF-8"),
    "utf-16": ("a: 1\n".encode("utf16"), "UTF-8"),
    "a zero byte": (b"a: \0\n", "#x0000"),
    "equal keys": (b"beta: 0.1\nbeta: 0.2\n", "beta is there twice, in lines 1 and 2"),
    "equal keys deeper down": (b"env: {A: 1, A: 2}\n", "A is there twice"),
    "a number as key": (b"1: 2\n", "key 1 is not text"),
    "a list as key": (b"? [a]\n: 1\n", "unhashable"),
    "bomb": (BOMB.encode(), "anchors"),
    "bomb of merged keys": (MERGED_BOMB.encode(), "anchors"),
    "a list in itself": (b"a: &a [*a]\n", "anchors"),
    "deep": (b"a: " + b"[" * 3000, "depth"),
}


@pytest.mark.parametrize("command", READS_YAML)
@pytest.mark.parametrize("kind", BAD_YAML)
def test_bad_yaml_file(command, kind, tmp_path, capsys):
    content, words = BAD_YAML[kind]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    message = refused(capsys, command, "--config", str(path))
    assert str(path) in message and words in message


@pytest.mark.parametrize("command", READS_YAML)
def test_yaml_file_that_cannot_be_read(command, tmp_path, capsys, monkeypatch):
    for name in ("nowhere.yaml", str(tmp_path), "a" * 5000):
        assert name in refused(capsys, command, "--config", name)
    monkeypatch.setattr("trl_rdro.tools.yaml_files.LARGEST", 10)
    (tmp_path / "large.yaml").write_text("beta: 0.1\n" * 2)
    assert "more than 10 bytes" in refused(capsys, command, "--config", str(tmp_path / "large.yaml"))


@pytest.mark.parametrize("command", ["dpo", "kto", "iterate"])
def test_config_is_given_once_in_either_form(command, capsys):
    assert "expected a file name after --config" in refused(capsys, command, "--config")
    assert "expected a file name after --config" in refused(capsys, command, "--config=")
    assert "nowhere.yaml" in refused(capsys, command, "--config=nowhere.yaml")
    assert "given twice" in refused(capsys, command, "--config", "a.yaml", "--config=b.yaml")


def test_config_with_an_equals_sign_is_read(config):
    (_, args, _, _), *_ = train.parse("dpo", [f"--config={config(rdro_alpha=0.25)}"])
    assert args.rdro_alpha == 0.25


# Values

BAD_VALUES = [
    *(("learning_rate", value) for value in (float("nan"), float("inf"), -1, [1e-5], True, "fast", {"a": 1})),
    *(("per_device_train_batch_size", value) for value in (0, -1, 2.5, "two", [4])),
    *(("gradient_accumulation_steps", value) for value in (0, -1)),
    *(("loss_weights", value) for value in ("1.0", 1.0, [1.0, "x"], [1.0, None], {"a": 1.0})),
    *(("model_init_kwargs", value) for value in ("text", "{", [1], '"text"', {"nonsense": 1})),
    *(("lr_scheduler_kwargs", value) for value in ("text", 3)),
    *(("datasets", value) for value in ("mine.jsonl", ["mine.jsonl"], [{}], [{"pathh": "x"}], {"path": "x"}, 3)),
    *(("report_to", value) for value in ("nope", ["none", "nope"], {"a": 1}, 3)),
    *(("output_dir", value) for value in ("", ["x"], "a" * 5000, "/proc/nowhere/out")),
    *(("bf16", value) for value in (1, "perhaps", [True])),
    *(("loss_type", value) for value in (3, [], [["rdro"]], {"rdro": 1}, "rdr")),
    *(("truncation_mode", value) for value in ("middle", True)),
    *(("optim", value) for value in ("nope", 3, ["sgd"])),
    *(("eval_strategy", value) for value in (True, "sometimes", 3)),
    *(("max_steps", value) for value in (1.5, "1e3", [1])),
    *(("seed", value) for value in (-1, 2**70, "x")),
    *(("adam_beta1", value) for value in (-0.1, 1.0)),
    *(("env", value) for value in (["A"], "A=1", {"A": [1]}, {"A=B": 1})),
    *(("run_name", value) for value in (1.5, ["x"])),
    ("model_name_or_path", ["x"]),
    ("dataset_name", ["x"]),
    ("max_length", 0),
    ("label_smoothing", float("nan")),
    ("ref_model_sync_steps", 0),
    ("lora_r", 0),
    ("num_processes", "x"),
    ("num_processes", [1]),
    ("multi_gpu", "perhaps"),
    ("accelerate_config", ["x"]),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_value_of_another_kind(name, value, config, capsys):
    launched = name in ("num_processes", "multi_gpu", "accelerate_config")
    changes = {name: value, **({"dataset_name": None} if name == "datasets" else {})}
    argv = ["--config", config(**changes)]
    message = refusal(capsys, main(["dpo", *argv]) if launched else train.main("dpo", argv))
    assert name.replace("per_device_", "") in message or str(value) in message


@pytest.mark.parametrize("number", ["nan", "-1", "0.5x"])
@pytest.mark.parametrize("method", ["dpo", "kto", "iterate"])
def test_numbers_on_the_command_line(method, number, config, capsys):
    judge = ["--reward_funcs", "trl_rdro.iterate.rewards.positivity"] if method == "iterate" else []
    argv = ["--model_name_or_path", "any", "--dataset_name", "any", *ON_CPU[method], *judge, "--learning_rate", number]
    assert "learning" in refused(capsys, method, *argv)


def test_tracker_that_is_not_installed(config, capsys, monkeypatch):
    monkeypatch.setattr("trl_rdro.configs.run_config.get_available_reporting_integrations", lambda: ["tensorboard"])
    message = refused(capsys, "dpo", "--config", config(report_to=["tensorboard", "wandb"]))
    assert "wandb, which is not installed" in message
    (_, args, _, _), *_ = train.parse("dpo", ["--config", config(report_to="tensorboard")])
    assert args.report_to == ["tensorboard"]


def test_output_dir_that_is_a_file(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        path = str(tmp_path / name)
        message = refusal(capsys, train.main("dpo", ["--config", config(output_dir=path)]))
        assert "output_dir" in message and path in message


def test_what_yaml_makes_of_a_value_is_what_was_meant(config):
    changes = {"loss_type": ["rdro", "sft"], "loss_weights": ["1e-3", 1], "run_name": 2026, "eval_strategy": False}
    (_, args, _, _), *_ = train.parse("dpo", ["--config", config(**changes, learning_rate="1e-6")])
    assert (args.loss_weights, args.run_name, args.learning_rate) == ([1e-3, 1.0], "2026", 1e-6)
    assert args.eval_strategy == "no"  # a bare `no` is False in YAML


# Keys

STRANGE_KEYS = {
    "learning-rate: 1.0e-5": "unknown key learning-rate, did you mean learning_rate?",
    "no_dataloader_pin_memory: true": "unknown key no_dataloader_pin_memory: write `dataloader_pin_memory: false`",
    "no-remove-unused-columns: true": "unknown key no-remove-unused-columns: write `remove_unused_columns: false`",
    "pair_selection: random": "unknown option --pair_selection: it is one of `trl-rdro iterate`",
    "beta=0.1: 1": "unknown key beta=0.1",
    "num_processes=1: 1": "unknown key num_processes=1",
    "distributed_type: DEEPSPEED": "give it with --accelerate_config",
}


@pytest.mark.parametrize("command", ["dpo", "kto", "inspect", "estimate"])
@pytest.mark.parametrize("line", STRANGE_KEYS)
@pytest.mark.parametrize("believed", [True, False], ids=["table", "parsers"])
def test_key_that_is_no_option_name(command, line, believed, config, capsys, monkeypatch):
    if not believed:
        monkeypatch.setattr("trl_rdro.cli.option_table.installed_versions", dict)
    path = config(max_length=64)
    with open(path, "a") as file:
        file.write(f"{line}\n")
    assert STRANGE_KEYS[line] in refused(capsys, command, "--config", path)


def test_launch_flags_keep_their_dashes_in_yaml(config):
    _, launch_flags, _ = train.parse("dpo", ["--config", config(**{"num-processes": 1})])
    assert launch_flags == ["--num-processes", "1"]


@pytest.mark.parametrize("command", ["dpo", "kto", "inspect", "estimate"])
@pytest.mark.parametrize("recipe", ["iterate", "accelerate/zero3_offload"])
def test_yaml_file_of_another_use(command, recipe, capsys):
    path = str(recipe_directory() / f"{recipe}.yaml")
    words = "accelerate config" if "/" in recipe else "trl-rdro iterate"
    assert words in refused(capsys, command, "--config", path)


@pytest.mark.parametrize("command", ["dpo", "kto", "iterate", "inspect", "estimate"])
def test_forgotten_config(command, capsys):
    assert "a YAML file is given with --config" in refused(capsys, command, "mine.yaml")


@pytest.mark.parametrize("value", ["", "3", "true", "{a: 1}"])
@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_loss_type_that_is_no_text(command, value, config, capsys):
    path = config(loss_type=None)
    with open(path, "a") as file:
        file.write(f"loss_type: {value}\n")
    assert "loss_type" in refused(capsys, command, "--config", path)


@pytest.mark.parametrize("number", ["-1e-5", "-2E+1", "-.5e3"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_negative_number_with_an_exponent(method, number, config, capsys):
    message = refused(capsys, method, "--config", config(), "--learning_rate", number)
    assert "learning_rate" in message and "expected one argument" not in message
    rewards = ["--rewards", "-1", number, "--a", "0.5", "--b", "0.1"]
    assert main(["dynamics", *rewards]) == 0


def test_sampling_is_checked_before_anything_is_printed(capsys):
    message = refused(capsys, "dynamics", *REQUIRED["dynamics"], "--sampling", "1", "1")
    assert "2 weights for 3 answers" in message


def test_beta_of_score_goes_with_suspects(capsys):
    assert "--suspects" in refused(capsys, "score", *REQUIRED["score"], "--beta", "1")


# Accelerate configs

BAD_ACCELERATE = {
    "a list": "- 1\n",
    "text": "hello\n",
    "empty": "",
    "text for a number": "num_processes: two\n",
    "a list for a number": "num_processes: [2]\n",
    "a number for settings": "distributed_type: FSDP\nfsdp_config: 3\n",
    "a list for settings": "distributed_type: DEEPSPEED\ndeepspeed_config: [1]\nnum_processes: 2\n",
    "equal keys": "num_processes: 1\nnum_processes: 2\n",
}


@pytest.mark.parametrize("command", ["dpo", "kto", "estimate"])
@pytest.mark.parametrize("kind", BAD_ACCELERATE)
def test_bad_accelerate_config(command, kind, config, tmp_path, capsys):
    path = tmp_path / "accelerate.yaml"
    path.write_text(BAD_ACCELERATE[kind])
    message = refused(capsys, command, "--config", config(max_length=64), "--accelerate_config", str(path))
    assert "accelerate" in message
    json_file = tmp_path / "accelerate.json"
    json_file.write_text(json.dumps([1]))
    assert "not a list" in refused(
        capsys, command, "--config", config(max_length=64), "--accelerate_config", str(json_file)
    )


# Bugs


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("trl_rdro.cli.recipes.list_recipes", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])
