"""A directory that is not a causal language model with its tokenizer is refused in one sentence, before weights are
loaded; so is such a model in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_rdro.checks.models import check_config, check_model, check_model_object, check_processing_class
from trl_rdro.cli import main
from trl_rdro.tools.scoring import load_policy

from ..tiny import cpu_args, save_tiny, tiny_llama, tiny_preferences, tiny_qwen2, tiny_tokenizer


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def model(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "model"))


def without_tokenizer(model: Path):
    for path in [*model.glob("tokenizer*"), *model.glob("chat_template*")]:
        path.unlink()


def truncated(model: Path):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def too_long(model: Path):
    with open(model / "model.safetensors", "ab") as file:
        file.write(b"more")


def write(name: str, content: bytes):
    return lambda model: (model / name).write_bytes(content)


def remove(name: str):
    return lambda model: (model / name).unlink()


def change_config(**changes):
    def change(model: Path):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def sharded(lost: str | None = None, entry: str | None = None, empty: bool = False):
    def change(model: Path):
        tiny_qwen2().save_pretrained(model, max_shard_size="20KB")
        (model / "model.safetensors").unlink(missing_ok=True)
        index = json.loads((model / "model.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
        if lost:
            (model / shards[1]).unlink()
        if entry:
            index["weight_map"][entry] = shards[0]
        if empty:
            index["weight_map"] = {}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def other_kind(make):
    def change(model: Path):
        (model / "model.safetensors").unlink()
        make().save_pretrained(model)

    return change


def more_tokens(model: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    tokenizer.save_pretrained(model)


def adapter(model: Path):
    adapted = get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"]))
    shutil.rmtree(model)
    adapted.save_pretrained(model)


def saved_pickled(content: bytes):
    def change(model: Path):
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(content)

    return change


FAULTS = {
    "no tokenizer files": (without_tokenizer, "its tokenizer knows"),
    "tokenizer that is not JSON": (write("tokenizer.json", b"{"), "no tokenizer that can be read"),
    "truncated weights": (truncated, "where its header announces"),
    "weights with more behind": (too_long, "where its header announces"),
    "empty weights": (write("model.safetensors", b""), "model.safetensors is empty (0 bytes)"),
    "few bytes of weights": (write("model.safetensors", b"abc"), "cut short (3 bytes)"),
    "random weights": (write("model.safetensors", b"\xff" * 100), "not a whole safetensors file"),
    "weights without a header": (write("model.safetensors", (5).to_bytes(8, "little") + b"abcde"), "header cannot be"),
    "a Git LFS pointer": (write("model.safetensors", b"version https://git-lfs.example/spec/v1"), "git lfs pull"),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "empty pickled weights": (saved_pickled(b""), "pytorch_model.bin is empty"),
    "cut pickled weights": (saved_pickled(b"PK\x03\x04" + b"a" * 50), "pytorch_model.bin is cut short"),
    "a missing shard": (sharded(lost="second"), "which is not there"),
    "an index that names too much": (sharded(entry="model.more.weight"), "lacks the tensor model.more.weight"),
    "an empty index": (sharded(empty=True), "names no weights"),
    "no config": (remove("config.json"), "has no config.json"),
    "a config that is not JSON": (write("config.json", b"{'a': 1"), "config.json is not JSON"),
    "a binary config": (write("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
    "a config that is a list": (write("config.json", b"[]"), "must be a JSON object"),
    "an unknown type": (change_config(model_type="nothing"), "its config cannot be read"),
    "a wrong field": (change_config(num_attention_heads="four"), ""),
    "no architectures": (change_config(architectures=None), "no `architectures`"),
    "another vocabulary": (change_config(vocab_size=1000), "fewer than the `vocab_size` 1000"),
    "BERT": (other_kind(lambda: BertForMaskedLM(BertConfig(vocab_size=384, **SIZES))), "it is a BertForMaskedLM"),
    "a BERT body": (other_kind(lambda: BertModel(BertConfig(vocab_size=384, **SIZES))), "it is a BertModel"),
    "ViT": (other_kind(lambda: ViTForImageClassification(ViTConfig(**SIZES))), "it is a ViTForImageClassification"),
    "a classifier": (other_kind(lambda: Qwen2ForSequenceClassification(tiny_qwen2().config)), "Classification"),
    "T5": (other_kind(lambda: T5ForConditionalGeneration(T5Config(vocab_size=384, **T5_SIZES))), "encoder-decoder"),
    "few embeddings": (other_kind(lambda: tiny_qwen2(vocab_size=300)), "and the model has 300 embeddings only"),
    "a new token": (more_tokens, "gives the token '<|new|>' the number"),
    "an adapter": (adapter, "it is a PEFT adapter of"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_directory(fault, model):
    change, found = FAULTS[fault]
    change(model)
    with pytest.raises(ValueError) as error:
        check_model(str(model))
    sentence = str(error.value)
    assert sentence.startswith(f"cannot load the model {model}: ") and found in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "make",
    [tiny_qwen2, tiny_llama, lambda: tiny_qwen2(vocab_size=512), lambda: tiny_qwen2(tie=True, dtype=torch.bfloat16)],
)
@pytest.mark.parametrize("shards", ["20KB", "5GB"])
def test_sound_directories(make, shards, tmp_path):
    network = make()
    network.save_pretrained(tmp_path, max_shard_size=shards)
    tiny_tokenizer().save_pretrained(tmp_path)
    files = check_model(str(tmp_path))
    assert files.embeddings == network.config.vocab_size and len(files.processing_class) == len(tiny_tokenizer())
    assert files.config.architectures == [type(network).__name__]


def test_names_that_are_no_directories(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, found in (
        (tmp_path / "none", "it is not a local directory"),
        ("a/b/c", "it is not a local directory"),
        ("./none", "it is not a local directory"),
        (tmp_path / "file", "it is a file; give the directory"),
        (tmp_path / "empty", "has no config.json, nothing at all"),
    ):
        for check in (check_model, check_config):
            with pytest.raises(ValueError, match=f"cannot load the model {name}: .*{found}"):
                check(str(name))


def test_a_tokenizer_that_was_given_may_be_small(model):
    without_tokenizer(model)
    assert check_model(str(model), processing_class=tiny_tokenizer()).embeddings == len(tiny_tokenizer())
    tiny_qwen2(vocab_size=2000).save_pretrained(model)
    check_model(str(model), processing_class=tiny_tokenizer())


def test_a_token_that_no_text_comes_to_needs_no_embedding(model):
    """As published with Gemma 3: a token for images that the text model has no embedding for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"])
    tokenizer.save_pretrained(model)
    check_model(str(model))


def test_a_tokenizer_without_its_model(model):
    (model / "model.safetensors").unlink()
    check_processing_class(str(model))
    (model / "config.json").unlink()
    check_processing_class(str(model))
    without_tokenizer(model)
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        check_processing_class(str(model))


# In memory


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=384, **T5_SIZES)),
            "encoder-decoder",
        ),
        (lambda: BertModel(BertConfig(vocab_size=384, **SIZES)), "no language-model head"),
        (lambda: tiny_qwen2().model, "no language-model head"),
        (lambda: Qwen2ForSequenceClassification(tiny_qwen2().config), "no language-model head"),
        (lambda: tiny_qwen2(vocab_size=300), "and the model has 300 embeddings only"),
        (
            lambda: get_peft_model(tiny_qwen2(vocab_size=300), LoraConfig(target_modules=["q_proj"])),
            "300 embeddings only",
        ),
    ],
)
def test_a_model_object(make, found, tmp_path):
    network = make()
    with pytest.raises(ValueError, match=f"cannot load the model .*{found}"):
        check_model_object(network, tiny_tokenizer())
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro"))
    with pytest.raises(ValueError, match=found):
        DPOTrainer(network, args=args, train_dataset=tiny_preferences(4), processing_class=tiny_tokenizer())


# Who asks


@pytest.mark.parametrize(
    "fault", ["no tokenizer files", "truncated weights", "BERT", "T5", "few embeddings", "an adapter"]
)
def test_trainers_and_commands_refuse(fault, model, tmp_path, capsys):
    change, found = FAULTS[fault]
    change(model)
    for trainer, config in ((DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)):
        args = config(**cpu_args(output_dir=str(tmp_path / "out"), loss_type="rdro"))
        with pytest.raises(ValueError, match=f"cannot load the model .*{found}"):
            trainer(str(model), args=args, train_dataset=tiny_preferences(4))
    if fault != "an adapter":
        with pytest.raises(ValueError, match=found):
            load_policy(str(model), torch.float32)
    data = tmp_path / "pairs.jsonl"
    tiny_preferences(4).to_json(data)
    options = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--use_cpu", "true", "--bf16", "false"]
    config_is_wrong = fault in ("BERT", "T5", "an adapter")
    for command in (
        (["inspect"], ["estimate"]) if config_is_wrong else (["inspect"],) if fault != "truncated weights" else ()
    ):
        assert main([*command, *options]) == 2
        assert found in capsys.readouterr().err


def test_a_text_with_a_token_beyond_the_embeddings(model, tmp_path):
    """Which would be an IndexError in the first step."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    rows = tiny_preferences(4).map(lambda row: {"rejected": row["rejected"] + "<new>"})
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro"))
    with pytest.raises(ValueError, match="`train_dataset` has the token .* in `rejected_ids`, and the model has"):
        DPOTrainer(str(model), args=args, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="`eval_dataset` has the token"):
        DPOTrainer(
            str(model), args=args, train_dataset=tiny_preferences(4), eval_dataset=rows, processing_class=tokenizer
        )


@pytest.mark.parametrize("trainer_class, config", [(DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)])
@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "the data are text, and the tokenizer has no end token"),
        ({"eos_token": "<end>"}, "No prompt of the prepared `train_dataset` has tokens: the tokenizer knows nothing"),
        ({"chat_template": "{{ messages[-1].content }}"}, "row 0 .*the tokenizer knows nothing"),
    ],
    ids=["text without an end", "text", "messages"],
)
def test_a_tokenizer_that_knows_no_text(model, tmp_path, trainer_class, config, settings, found):
    """Given, it may be as small as its user likes, but every completion would be the same."""
    empty = Tokenizer(BPE(vocab={"<pad>": 0, "<end>": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>", **settings)
    rows = tiny_preferences(4)
    if "chat_template" in settings:
        role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{key: [{"role": role[key], "content": row[key]}] for key in role} for row in rows]
    args = config(**cpu_args(output_dir=str(tmp_path / "out"), loss_type="rdro"))
    with pytest.raises(ValueError, match=f"(?i){found}"):
        trainer_class(str(model), args=args, train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer)


def test_weights_of_an_adapter_that_were_cut_short(sound, tmp_path):
    adapted = get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = sound
    adapted.save_pretrained(tmp_path)
    load_policy(str(tmp_path), torch.float32)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="adapter_model.safetensors has .* bytes where its header announces"):
        load_policy(str(tmp_path), torch.float32)


def test_rows_that_are_tokens_already(sound, tmp_path):
    args = KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro"))
    rows = Dataset.from_list([{"prompt_ids": [1], "completion_ids": [2], "label": label} for label in (True, False)])
    trainer = KTOTrainer(sound, args=args, train_dataset=rows)
    assert trainer.preferred_fraction == 0.5
