"""
A language model without the tokens that its data do not need.

On a CPU the softmax over SmolLM2's 49,152 tokens is half of a training step, and the data of a study need a quarter
of them. Cut to those, the model is the same but for the probability that the others had, which is shared out, and
texts of the data are split into the same tokens as before.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from made_once import made_once
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


def cut_vocabulary(directory: str, texts: Iterable[str], target: Path) -> str:
    """Write the model and byte-level BPE tokenizer of `directory` to `target` with what `texts` need of their
    vocabulary, unless that has been done. Returns `target`."""

    def make(cut_directory: Path) -> None:
        needed = sorted(set(texts))
        tokenizer = AutoTokenizer.from_pretrained(directory)
        cut, kept = _cut_tokenizer(tokenizer, needed)
        for text in needed:  # the same tokens as before
            assert [kept[token] for token in cut(text)["input_ids"]] == tokenizer(text)["input_ids"], text
        cut.save_pretrained(cut_directory)
        _cut_model(AutoModelForCausalLM.from_pretrained(directory), kept, cut).save_pretrained(cut_directory)

    return str(made_once(target, make))


def _cut_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer, and the old number of each of its tokens."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in description["model"]["merges"]]
    parts = {}  # of the first merge that makes a token, which is the one that BPE applies
    for left, right in merges:
        parts.setdefault(left + right, (left, right))

    tokens = {number: token for token, number in vocabulary.items()}
    special = {added["content"] for added in description["added_tokens"]}
    needed = special | {token for token in vocabulary if len(token) == 1}  # a character stands for a byte
    stack = [tokens[number] for text in texts for number in set(tokenizer(text)["input_ids"]) if number in tokens]
    while stack:
        token = stack.pop()
        if token not in needed:
            needed.add(token)
            stack.extend(parts.get(token, ()))

    old = {**vocabulary, **{added["content"]: added["id"] for added in description["added_tokens"]}}
    kept = sorted(old[token] for token in needed if token in old)
    new = {number: i for i, number in enumerate(kept)}
    description["model"]["vocab"] = {token: new[n] for token, n in vocabulary.items() if token in needed}
    description["model"]["merges"] = [
        [left, right] for left, right in merges if {left, right, left + right} <= description["model"]["vocab"].keys()
    ]
    for added in description["added_tokens"]:
        added["id"] = new[added["id"]]
    cut = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token or tokenizer.eos_token,
        chat_template=tokenizer.chat_template,
    )
    return cut, kept


def _cut_model(model: torch.nn.Module, kept: list[int], tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = {id(layer.weight): layer for layer in (embedding, head)}.values()  # one, if their weights are tied
    weights = [layer.weight.detach()[kept].clone() for layer in layers]
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    with torch.no_grad():
        for get, weight in zip((model.get_input_embeddings, model.get_output_embeddings), weights, strict=False):
            get().weight.copy_(weight)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id, config.bos_token_id = (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            None,
        )
    return model
