"""Locks, settings, digests, secrets, full disks: what a run keeps beside its weights, without training anything."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.run.data_digest import ROWS_AT_ONCE, digest_dataset
from trl_rdro.run.disk import DiskFull, full_disk_said
from trl_rdro.run.lock import Unusable, only_run_in
from trl_rdro.run.secrets import args_without_secrets, is_secret, split_hub_token, without_secrets
from trl_rdro.run.settings import describe_model, differences, is_free, options_of, plain, settings_of

from ..helpers import hold
from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer


# One run per directory


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_lock_is_held_by_one_process_and_goes_with_it(tmp_path, how):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path / "out"), ready, how))
    holder.start()
    assert ready.wait(30)
    sentence = rf"Another run is writing to `output_dir='.*out'` \(process {holder.pid} on "
    with pytest.raises(Unusable, match=sentence), only_run_in(tmp_path / "out"):
        pass
    with only_run_in(tmp_path / "other"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with only_run_in(tmp_path / "out"):
        # Again in the same process: a loop's trainer, a command's trainer
        with only_run_in(tmp_path / "out" / ".." / "out"):
            assert json.loads((tmp_path / "out" / "_lock").read_text())["pid"] == os.getpid()
        assert json.loads((tmp_path / "out" / "_lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "out" / "_lock").read_text() == ""
    with only_run_in(tmp_path / "out"):
        pass


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Unusable, match=r"^`output_dir='.*'` cannot be written to \(.+\). Give another.$"):
            only_run_in(path).__enter__()


# The content of data


def messages(n: int) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "chosen": [{"role": "assistant", "content": "é" * (i % 5)}] * (i % 3),
            "score": i / 7 if i % 4 else None,
            "label": i % 2 == 0,
            "note": None if i % 6 else "x",
        }
        for i in range(n)
    ]


ROWS = messages(2 * ROWS_AT_ONCE + 17)


def test_a_digest_is_of_the_content_and_not_of_how_it_is_kept(tmp_path):
    whole = Dataset.from_list(ROWS)
    expected = digest_dataset(whole)
    assert expected.startswith(f"{len(ROWS)} rows of chosen, label, note, prompt, score, ")
    whole.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shuffled = whole.shuffle(seed=1)
    back = [int(i) for i in np.argsort(shuffled._indices.column(0).to_numpy())]
    same = [
        Dataset.load_from_disk(str(tmp_path / "saved")),
        Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path)),
        concatenate_datasets([whole.select(range(700)), whole.select(range(700, len(whole)))]),
        shuffled.select(back),
        whole.select_columns(["score", "note", "label", "chosen", "prompt"]),
        Dataset(pa.concat_tables([whole.data.table.slice(3, 900), whole.data.table.slice(903)])),
    ]
    assert [digest_dataset(dataset) == expected for dataset in same[:5]] == [True] * 5
    assert digest_dataset(same[5]) == digest_dataset(whole.select(range(3, len(whole))))
    wide = pa.schema(
        [
            field.with_type(pa.large_string() if field.name == "note" else field.type)
            for field in whole.data.table.schema
        ]
    )
    assert digest_dataset(Dataset(whole.data.table.cast(wide))) == expected


def changed(row: int, column: str, value) -> Dataset:
    rows = [dict(row) for row in ROWS]
    rows[row][column] = value
    return Dataset.from_list(rows)


def test_another_content_is_another_digest():
    whole = Dataset.from_list(ROWS)
    others = [
        changed(5, "score", 0.25),
        changed(5, "score", None),
        changed(4, "score", 0.0),  # was null
        changed(len(ROWS) - 1, "label", None),
        changed(1500, "prompt", [{"role": "user", "content": "Question 1500"}]),
        changed(1500, "prompt", [{"role": "system", "content": "question 1500"}]),
        changed(1501, "chosen", []),
        changed(1, "note", ""),
        whole.select(range(len(whole) - 1)),
        whole.select([1, 0, *range(2, len(whole))]),
        whole.remove_columns("note"),
        whole.rename_column("note", "remark"),
        Dataset.from_dict({"a": ["ab", "c"]}),
        Dataset.from_dict({"a": ["a", "bc"]}),
    ]
    digests = [digest_dataset(dataset) for dataset in [whole, *others]]
    assert len(set(digests)) == len(digests)


def test_a_digest_is_the_same_in_another_process():
    code = (
        "from tests.run.test_files_of_a_run import ROWS, Dataset, digest_dataset\n"
        "print(digest_dataset(Dataset.from_list(ROWS)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert result.stdout.strip() == digest_dataset(Dataset.from_list(ROWS)), result.stderr


def test_a_stream_is_known_by_its_first_rows():
    rows = [{"prompt": "a", "chosen": str(i), "rejected": "c"} for i in range(20)]
    stream, other = Dataset.from_list(rows).to_iterable_dataset(), Dataset.from_list(rows[1:]).to_iterable_dataset()
    assert digest_dataset(stream) == digest_dataset(stream) != digest_dataset(other)


def test_a_million_rows_take_seconds():
    text = pa.array([f"some words, and the number {i}" for i in range(1000)])
    table = pa.table({name: pa.concat_arrays([text] * 1000) for name in ("prompt", "chosen", "rejected")})
    start = time.perf_counter()
    assert digest_dataset(Dataset(table)).startswith("1000000 rows")
    assert time.perf_counter() - start < 20  # some 3 on an idle processor


# What a run is begun with


@pytest.mark.parametrize("config_class", [DPOConfig, KTOConfig])
def test_every_option_counts_unless_it_is_named(config_class, tmp_path):
    """So that an option of a later version counts too."""
    args = config_class(**cpu_args(output_dir=str(tmp_path)))
    fields = {field.name for field in dataclasses.fields(args)}
    assert options_of(args).keys() == {name for name in fields if not is_free(name)}
    assert json.loads(json.dumps(options_of(args))) == options_of(args)
    must = {"loss_type", "beta", "learning_rate", "seed", "data_seed", "max_length", "optim", "lr_scheduler_type"}
    must |= {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "bf16", "max_grad_norm"}
    must |= {"dataloader_drop_last", "disable_dropout", "neftune_noise_alpha", "deepspeed", "fsdp", "torch_compile"}
    assert must <= options_of(args).keys()
    may = {"output_dir", "logging_steps", "save_steps", "save_total_limit", "eval_steps", "report_to", "hub_token"}
    assert not (may | {"dataloader_num_workers", "push_to_hub", "resume_from_checkpoint"}) & options_of(args).keys()


def test_differences_name_the_old_and_the_new_value(tmp_path):
    def make(**changes):
        given = {"model": "some/model", "train_dataset": tiny_preferences(4), **changes.pop("given", {})}
        return settings_of(DPOConfig(**cpu_args(**{"output_dir": str(tmp_path), **changes})), **given)

    begun = json.loads(json.dumps(make(loss_type="kldpo")))
    assert differences(begun, make(loss_type="kldpo", logging_steps=3, output_dir="other")) == []
    assert differences(begun, make(loss_type="wdpo", seed=1)) == [
        "`seed` 42 (now 1)",
        "`loss_type` ['kldpo'] (now ['wdpo'])",
    ]
    adapter = make(loss_type="kldpo", given={"peft_config": LoraConfig(r=4, lora_alpha=8)})
    other = make(loss_type="kldpo", given={"peft_config": LoraConfig(r=4, lora_alpha=16)})
    assert differences(adapter, other) == ["`adapter.lora_alpha` 8 (now 16)"]
    assert "`adapter.r` None (now 4)" in differences(begun, adapter)
    assert "`adapter.r` 4 (now None)" in differences(adapter, begun)
    assert [text[:6] for text in differences(begun, make(loss_type="kldpo", given={"model": "a/b"}))] == ["`model"]
    [data] = differences(begun, make(loss_type="kldpo", given={"train_dataset": tiny_preferences(4, seed=1)}))
    assert data.startswith("`data` '4 rows of chosen, prompt, rejected, ")
    [tokenizer] = differences(begun, make(loss_type="kldpo", given={"processing_class": tiny_tokenizer()}))
    assert tokenizer.startswith("`tokenizer` None (now ")
    # Of a version that knows one option less
    assert differences({key: value for key, value in begun.items() if key != "beta"}, begun) == []


def test_a_deepspeed_file_counts_by_its_content(tmp_path):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path)))
    args.deepspeed = str(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert options_of(args)["deepspeed"] == {"zero_optimization": {"stage": 2}}


def test_models_are_known_by_their_content(tmp_path):
    here, there = save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b")
    other, half = save_tiny(tmp_path / "c", seed=1), save_tiny(tmp_path / "d", dtype=torch.bfloat16)
    assert describe_model(here) == describe_model(there) == describe_model(Path(here))
    assert len({describe_model(path) for path in (here, other, half)}) == 3
    assert describe_model("org/name") == "org/name" and describe_model(None) is None
    assert describe_model(tiny_qwen2()) == describe_model(tiny_qwen2()) != describe_model(tiny_qwen2(seed=1))
    lora = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
    adapted = [describe_model(get_peft_model(tiny_qwen2(), LoraConfig(**lora))) for _ in range(2)]
    assert adapted[0] == adapted[1], "a new adapter is random, and says nothing of the run"


# Tokens


SECRETS = "hub_token push_to_hub_token token use_auth_token wandb_api_key HF_TOKEN api_key client_secret password"
OTHERS = "pad_token eos_token num_tokens include_num_input_tokens_seen key max_length"


def test_names_of_secrets():
    assert [name for name in SECRETS.split() if not is_secret(name)] == []
    assert [name for name in OTHERS.split() if is_secret(name)] == []


def test_secrets_are_blanked_in_a_copy(tmp_path):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), hub_token="hf_a", pad_token="<pad>"))
    args.model_init_kwargs = {"token": "hf_b", "dtype": "float32", "deeper": [{"api_key": "hf_c"}]}
    torch.save(args_without_secrets(args), tmp_path / "args.bin")
    assert b"hf_" not in (tmp_path / "args.bin").read_bytes()
    loaded = torch.load(tmp_path / "args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.pad_token, loaded.model_init_kwargs["dtype"]) == (None, "<pad>", "float32")
    assert args.hub_token == "hf_a" and args.model_init_kwargs["token"] == "hf_b"
    assert "hf_" not in json.dumps(options_of(args)) and "hf_" not in json.dumps(plain(args.model_init_kwargs))
    assert without_secrets(("a", {"token": "b"})) == ("a", {"token": None})


@pytest.mark.parametrize(
    "argv, kept, token",
    [
        (["--beta", "1"], ["--beta", "1"], None),
        (["--hub_token", "t", "--beta", "1"], ["--beta", "1"], "t"),
        (["--beta", "1", "--hub_token=a=b"], ["--beta", "1"], "a=b"),
        (["--hub_token=a", "--hub_token", "b"], [], "b"),
    ],
)
def test_a_token_on_the_command_line(argv, kept, token):
    assert split_hub_token(argv) == (kept, token)


# Full disks


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "f"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "f"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said(error):
    with (
        pytest.raises(DiskFull, match="^No room on the disk for x. Make some$"),
        full_disk_said("x", lambda: "Make some"),
    ):
        raise error


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), RuntimeError("size mismatch"), KeyError("a")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as found, full_disk_said("x", lambda: "Make some"):
        raise error
    assert found.value is error
