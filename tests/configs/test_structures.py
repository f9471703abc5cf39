"""Fields whose values have a structure that another library reads: each wrong key, value and word ends in one sentence
when the config is built."""

import dataclasses
import json

import pytest

from trl_rdro import DPOConfig, KTOConfig

from ..tiny import cpu_args


WRONG = {
    "accelerator_config": [
        {"nope": 1},
        {"split_batchs": True},
        *({"split_batches": value} for value in ("x", 1, None, [True], {})),
        {"dispatch_batches": "no"},
        {"gradient_accumulation_kwargs": 3},
        {"gradient_accumulation_kwargs": {"nope": 1}},
        *({"gradient_accumulation_kwargs": {"num_steps": value}} for value in (0, -1, 1.5, "2", True, None)),
        {"gradient_accumulation_kwargs": {"sync_each_batch": "yes"}},
    ],
    "fsdp_config": [
        {"nope": 1},
        *({"version": value} for value in (3, 0, "two", 2.0, True, None)),
        {"cpu_offload": "yes"},
        {"auto_wrap_policy": "ALL"},
        {"state_dict_type": "WHOLE"},
        {"min_num_params": -1},
        {"transformer_layer_cls_to_wrap": [1]},
        {"fsdp_min_num_params": "many"},
    ],
    "deepspeed": [
        {"zero_optimization": 3},
        *({"zero_optimization": {"stage": value}} for value in (4, -1, "2", True, None, 1.5, [2])),
        {"zero_optimization": {"offload_param": {"device": "gpu"}}},
    ],
    "gradient_checkpointing_kwargs": [
        {"nope": 1},
        {"use_reentrent": False},
        *({"use_reentrant": value} for value in ("no", 0, None)),
        {"determinism_check": "maybe"},
    ],
    "debug": ["nope", "underflow_overflow nope", ["nope"]],
    "fsdp": ["nope", "full_shard nope", ["nope"]],
    "include_for_metrics": [["nope"]],
    "liger_kernel_config": [{"rope": "yes"}, {"rope": 1}],
    "optim_args": ["x", "momentum", "momentum=", "=1", "a=1,b", "a=1,,b=2", "a=b=c", ","],
    "torch_compile_mode": ["x", "", "max_autotune"],
    "torch_compile_backend": ["x", "", "inductr"],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


def build(**kwargs):
    return DPOConfig(**cpu_args(output_dir="out", **kwargs))


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_a_wrong_key_value_or_word(name, value):
    with pytest.raises(ValueError, match=name) as error:
        build(**{name: value})
    assert "\n" not in str(error.value)


FILES = ["accelerator_config", "fsdp_config", "deepspeed"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b"\xff\xfe", b'{"nope_at_all": {"a": 1}, "zero_optimization": 3}', b"[" * 5000],
)
def test_files_are_read_and_looked_at(name, content, tmp_path):
    path = tmp_path / "options.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        build(**{name: str(path)})


@pytest.mark.parametrize("name", [*FILES, "lr_scheduler_kwargs", "model_init_kwargs", "gradient_checkpointing_kwargs"])
@pytest.mark.parametrize("text", ["x", "{", "[1]", "3", "null", '"a"', "nowhere.json"])
def test_text_that_is_no_mapping(name, text):
    with pytest.raises(ValueError, match=name):
        build(**{name: text})


@pytest.mark.parametrize("name", FILES)
def test_keys_that_are_not_text(name):
    with pytest.raises(ValueError, match=name):
        build(**{name: {1: True}})


@pytest.mark.parametrize("config_class", [DPOConfig, KTOConfig])
def test_what_is_right_is_taken_as_it_is(config_class, tmp_path):
    settings = {"split_batches": False, "gradient_accumulation_kwargs": {"sync_each_batch": True}}
    path = tmp_path / "accelerator.json"
    path.write_text(json.dumps(settings))
    for value in (settings, json.dumps(settings), str(path)):
        args = config_class(**cpu_args(output_dir="out", accelerator_config=value))
        assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
        assert dataclasses.replace(args).accelerator_config == args.accelerator_config
    args = build(
        debug="underflow_overflow",
        optim_args="momentum=0.9, nesterov=true",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        include_for_metrics=["loss"],
    )
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_the_nearest_key_is_named():
    with pytest.raises(ValueError, match="Did you mean 'split_batches'"):
        build(accelerator_config={"split_batchs": True})
