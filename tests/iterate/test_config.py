"""`IterateConfig`: what it refuses, alone and with the trainer's config."""

import importlib.util
from types import SimpleNamespace

import pytest

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.cli.iterate import parse
from trl_rdro.errors import UserError
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.vllm_sampling import max_lora_rank

from ..tiny import cpu_args


VOWELS = "tests.iterate.worker.vowels"


def config(**changes) -> IterateConfig:
    return IterateConfig(**{"reward_funcs": [VOWELS], **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "ppo"}, "`method` has no value 'ppo'"),
        ({"pair_selection": "rejecton"}, "Did you mean 'rejection'?"),
        ({"rounds": 0}, "`rounds` must be a whole number >= 1, got 0"),
        ({"max_completion_length": 0}, "`max_completion_length` must be a whole number >= 1"),
        ({"prompts_per_chunk": 0}, "`prompts_per_chunk` must be a whole number >= 1"),
        ({"monitor_prompts": 0}, "`monitor_prompts` must be a whole number >= 1"),
        ({"samples_per_prompt": 1}, "`samples_per_prompt` must be a whole number >= 2, got 1"),
        ({"monitor_samples": True}, "`monitor_samples` must be a whole number >= 2, got True"),
        ({"top_k": -1}, "`top_k` must be a whole number >= 0"),
        ({"prompts_per_round": 0}, "`prompts_per_round` must be a whole number >= 1"),
        ({"keep_rounds": 0}, "`keep_rounds` must be a whole number >= 1"),
        ({"reference_mix": 1.1}, "`reference_mix` must be a number in [0, 1] or None, got 1.1"),
        ({"sampling_mix": -0.1}, "`sampling_mix` must be a number in [0, 1], got -0.1"),
        ({"temperature": 0}, "`temperature` must be a number in [1e-6, 1e6], got 0"),
        ({"top_p": 0}, "`top_p` must be a number in [1e-6, 1], got 0"),
        ({"entropy_floor": 1}, "`entropy_floor` must be a number in [0, 1)"),
        ({"threshold_eta": 0.9}, "`threshold_eta=0.9` has no effect with `pair_selection=None`"),
        ({"threshold_tau": 2.0, "pair_selection": "rejection"}, "Leave it at 1.0 or use `pair_selection='threshold'`"),
        ({"rejection_beta": 1.0, "pair_selection": "random"}, "`rejection_beta=1.0` has no effect"),
        (
            {"pair_selection": "rejection", "rejection_beta": 0},
            "`rejection_beta` must be a number in [1e-6, 1e6], got 0",
        ),
        ({"pair_selection": "rejection", "rejection_accepted": 1}, "`rejection_accepted` must be a whole number >= 2"),
        ({"pair_selection": "rejection", "rejection_accepted": 4}, "less than `samples_per_prompt` (4), got 4"),
        (
            {"pair_selection": "threshold", "threshold_eta": 0.4},
            "`threshold_eta` must be a number in [0.5, 1), got 0.4",
        ),
        ({"pair_selection": "threshold", "threshold_tau": -1}, "`threshold_tau` must be a number in"),
        ({"reward_funcs": None}, "Set one of `reward_funcs`, `preference_func` and `labelled_file`"),
        ({"preference_func": "a.b"}, "got reward_funcs and preference_func"),
        ({"reward_weights": [1.0, 2.0]}, "a weight for each of the 1 `reward_funcs`, got 2"),
        ({"use_vllm": True}, "`use_vllm=True` needs vLLM"),
        ({"vllm_gpu_memory_utilization": 0.0}, "`vllm_gpu_memory_utilization` must be a number"),
    ],
)
def test_bad_field_is_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        config(**changes)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "training", "sentence"),
    [
        ({"reference_mix": 0.5}, {"loss_type": "rdro"}, "its reference is the sampling distribution"),
        ({"temperature": 0.7, "top_k": 5}, {"loss_type": ["sigmoid", "nca_pair"]}, "`temperature=0.7`, `top_k=5`"),
        ({}, {"ld_alpha": 0.5}, "Set `ld_alpha=None`"),
        ({}, {"eval_strategy": "steps", "eval_steps": 1}, "`eval_strategy='steps'` has no data here"),
        ({"max_completion_length": 64}, {"max_length": 64}, "`max_completion_length=64`, got 64"),
        ({}, {"push_to_hub": True}, "`push_to_hub=True`"),
    ],
)
def test_training_options_that_do_not_go_with_the_loop_are_refused(changes, training, sentence, tmp_path):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), **training))
    with pytest.raises(ValueError) as error:
        config(**changes).validate_with(args)
    assert sentence in str(error.value)


def test_kto_is_refused_and_the_other_unpaired_losses_are_not(tmp_path):
    loop = config(method="kto")
    with pytest.raises(ValueError, match="Use `apo_zero_unpaired`, `rdro` or `ddro`"):
        loop.validate_with(KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="kto")))
    for loss in ("apo_zero_unpaired", "rdro", "ddro"):
        loop.validate_with(KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=loss)))


@pytest.mark.parametrize(
    ("sharded", "name"),
    [({"fsdp": True}, "FSDP"), ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO-3")],
)
def test_sharded_models_are_refused(sharded, name, tmp_path):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path)))
    vars(args).update(sharded)
    with pytest.raises(ValueError, match=f"which {name} shards"):
        config().validate_with(args)
    args.fsdp, args.deepspeed_plugin = False, SimpleNamespace(zero_stage=2)
    config().validate_with(args)


def test_vllm_is_refused_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    args = SimpleNamespace(**{**vars(DPOConfig(**cpu_args(output_dir=str(tmp_path)))), "world_size": 2})
    with pytest.raises(ValueError, match="samples in one process, got 2"):
        config(use_vllm=True).validate_with(args)


def test_vllm_has_sizes_of_its_own_for_adapters():
    assert [max_lora_rank(rank) for rank in (1, 8, 12, 16, 200, 512)] == [8, 8, 16, 16, 256, 512]
    with pytest.raises(ValueError, match="rank 512 at most, got `lora_r=513`"):
        max_lora_rank(513)


def test_vllm_refuses_a_rank_before_anything_is_loaded(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "vllm" or find_spec(name, *rest))
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--reward_funcs", VOWELS, "--use_vllm"]
    argv += ["--model_name_or_path", "m", "--dataset_name", "d", "--use_peft", "--lora_r", "1024"]
    with pytest.raises(UserError, match="got `lora_r=1024`"):
        parse(argv)


def test_defaults_have_a_margin_and_sigmoid_with_a_bounded_judge_only(tmp_path):
    from trl_rdro.cli.iterate import make_parser

    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--reward_funcs", VOWELS]
    loop, _, args, _ = make_parser("dpo").parse_args_and_config(argv)
    assert args.loss_type == ["cdpo"] and 0.05 < loop.guaranteed_margin(args) < 0.1
    loop, _, args, _ = make_parser("dpo", loss_is_given=True).parse_args_and_config(argv)
    assert args.loss_type == ["sigmoid"] and args.label_smoothing == 0
    assert loop.guaranteed_margin(args) is None  # a judge that can be certain
    loop.judge_bound = 0.6
    assert loop.guaranteed_margin(args) > 0.1
    args.beta = 0.1  # TRL's
    assert loop.guaranteed_margin(args) < 0
    args.loss_type = ["rdro"]
    assert loop.guaranteed_margin(args) is None
