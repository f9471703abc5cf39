"""What `accelerate launch` is told is looked at before a process is started: flags, our YAML file, a config."""

import importlib.resources

import pytest
import yaml

from trl_rdro.cli import launch, main
from trl_rdro.cli.launch_settings import check_accelerate_config
from trl_rdro.errors import UserError

from ..helpers import refusal


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    monkeypatch.setattr(launch, "launch_command", lambda args: pytest.fail("launched"))


WRONG = [
    *({"deepspeed_config": {"zero_stage": value}} for value in (7, -1, "two", 2.5, True, [2])),
    {"deepspeed_config": {"zero_stag": 2}},
    *({"deepspeed_config": {"offload_param_device": value}} for value in ("gpu", 1, True)),
    {"deepspeed_config": {"gradient_clipping": "x"}},
    *({"deepspeed_config": {"gradient_accumulation_steps": value}} for value in (0, "x")),
    {"deepspeed_config": {"zero3_init_flag": "maybe"}},
    {"deepspeed_config": {"deepspeed_multinode_launcher": "rsh"}},
    {"deepspeed_config": {"deepspeed_config_file": "nowhere.json"}},
    {"deepspeed_config": [1]},
    *({"fsdp_config": {"fsdp_version": value}} for value in (3, "x", None, [1]) if value is not None),
    {"fsdp_config": {"fsdp_auto_wrap_policy": "ALL"}},
    {"fsdp_config": {"fsdp_state_dict_type": "WHOLE"}},
    {"fsdp_config": {"fsdp_reshard_after_forward": "maybe"}},
    {"fsdp_config": {"fsdp_offload_params": "perhaps"}},
    {"fsdp_config": {"nope": 1}},
    {"fp8_config": {"fp8_backend": "x"}},
    {"dynamo_config": {"dynamo_mode": "x"}},
    {"dynamo_config": {"dynamo_backend": "x"}},
    *({"num_processes": value} for value in (0, -2, "two", 1.5, True, [2])),
    *({"num_machines": value} for value in (0, "x")),
    *({"machine_rank": value} for value in (-1, 1, "x")),
    *({"main_process_port": value} for value in (-1, 70000, "x")),
    *({"mixed_precision": value} for value in ("bf17", 16, False)),
    *({"distributed_type": value} for value in ("DEEPSPED", 3, True)),
    {"compute_environment": "MARS"},
    {"use_cpu": "perhaps"},
    {"gpu_ids": 0},
    {"nope": 1},
]
RIGHT = [
    {"deepspeed_config": {"zero_stage": "3", "gradient_accumulation_steps": "auto", "gradient_clipping": 1}},
    {"fsdp_config": {"version": 2, "auto_wrap_policy": "no_wrap", "fsdp_transformer_layer_cls_to_wrap": "A,B"}},
    {"distributed_type": False},  # a bare NO
    {"dynamo_backend": "INDUCTOR"},
    {"mixed_precision": None, "main_process_port": 0, "tpu_env": []},
]


def write(tmp_path, settings) -> str:
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "NO", "num_processes": 2, **settings}))
    return str(path)


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_a_wrong_key_or_value_of_a_config(settings, tmp_path):
    path = write(tmp_path, settings)
    with pytest.raises(UserError) as error:
        check_accelerate_config(path)
    (name, value), *_ = settings.items()
    named = [*value][0] if isinstance(value, dict) else name
    assert path in str(error.value) and named in str(error.value)


@pytest.mark.parametrize("settings", RIGHT, ids=str)
def test_a_right_one(settings, tmp_path):
    check_accelerate_config(write(tmp_path, settings))


def test_what_trl_ships_is_right():
    for file in importlib.resources.files("trl.accelerate_configs").iterdir():
        if file.name.endswith(".yaml"):
            assert check_accelerate_config(str(file))["num_processes"] == 8


@pytest.mark.parametrize("command", ["dpo", "kto", "estimate"])
def test_commands_refuse_it(command, config, tmp_path, capsys):
    path = write(tmp_path, {"deepspeed_config": {"zero_stage": 7}})
    argv = ["--config", config(max_length=64, loss_type=None, rdro_alpha=None), "--accelerate_config", path]
    message = refusal(capsys, main([command, *argv]))
    assert "`deepspeed_config.zero_stage` has no value '7'" in message and path in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("zero_stage", 7),
        ("num_processes", 0),
        ("main_process_port", 70000),
        ("fsdp_offload_params", "perhaps"),
        ("offload_param_device", "gpu"),
    ],
)
@pytest.mark.parametrize("in_yaml", [True, False])
def test_flags(flag, value, in_yaml, config, capsys):
    given = {flag: value} if in_yaml else {}
    argv = ["--config", config(**given)] + ([] if in_yaml else [f"--{flag}", str(value)])
    assert f"--{flag}" in refusal(capsys, main(["dpo", *argv]))
