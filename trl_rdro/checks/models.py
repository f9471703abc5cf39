"""
Whether a directory, a hub id or a model in memory is a causal language model with its tokenizer.

Said before weights are loaded: what is not one fails late and in the words of another library, or, with a tokenizer
that knows no text, not at all.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from transformers.models.auto import modeling_auto

from .weights import check_pickled, check_weights, read_json, tensor_shapes


# Below this share of the vocabulary a tokenizer is not the model's: those are padded by a few percent
LEAST_SHARE = 0.5
EMBEDDINGS = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
)


class ModelFiles(NamedTuple):
    """A model that has not been loaded: its config, its tokenizer or processor, and its number of embeddings, if its
    files tell."""

    config: Any
    processing_class: Any
    embeddings: int | None


def check_model(
    name: str, revision: str | None = None, trust_remote_code: bool = False, processing_class: Any = None
) -> ModelFiles:
    """
    Refuse a directory or hub id that is not a causal language model with its tokenizer.

    The weight files of a directory are looked at too (`weights.py`); those of a hub id are not there yet.

    Args:
        processing_class: the tokenizer or processor that is used instead of the model's own.

    Raises:
        `ValueError`: with one sentence.
        `OSError`: from transformers, for a hub id that cannot be reached.
    """
    config = check_config(name, revision, trust_remote_code)
    with _naming(name):
        if not config.architectures:
            raise ValueError("its config has no `architectures`; add the name of its model class")
        rows = _embedding_rows(config, check_weights(Path(name)) if Path(name).is_dir() else None)
        is_own = processing_class is None
        if is_own:
            processing_class = _load_processing_class(name, revision, trust_remote_code)
        check_tokenizer(processing_class, rows, is_own)
    return ModelFiles(config, processing_class, rows)


def check_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a causal language model; of nothing else. Raises as `check_model`."""
    folder = Path(name)
    with _naming(name):
        if folder.is_dir():
            _require_config(folder)
            if revision not in (None, "main"):
                raise ValueError(
                    f"it is a local directory, which has no revision {revision!r}; leave `model_revision` out"
                )
        elif folder.exists():
            raise ValueError("it is a file; give the directory that it is in")
        elif folder.is_absolute() or len(folder.parts) > 2 or name.startswith((".", "~")):
            raise ValueError("it is not a local directory, and the id of a model on the hub has one slash at most")
        config = _load_config(name, revision, trust_remote_code)
        check_kind(config)
    return config


def check_processing_class(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer or processor of a model of which no more is needed: its weights may be missing, and its config,
    with which it is compared, too. Raises as `check_model`."""
    config, files = None, ("config.json", "adapter_config.json")
    if not Path(name).is_dir() or any((Path(name) / file).exists() for file in files):
        config = check_config(name, revision, trust_remote_code)
    with _naming(name):
        processing_class = _load_processing_class(name, revision, trust_remote_code)
        if config is not None:
            check_tokenizer(processing_class, _embedding_rows(config, None), is_own=True)
    return processing_class


def check_adapter(name: str) -> None:
    """Refuse a local PEFT adapter whose weights are not whole. Raises as `check_model`."""
    for weights, check in (("adapter_model.safetensors", tensor_shapes), ("adapter_model.bin", check_pickled)):
        if (Path(name) / weights).exists():
            with _naming(name):
                check(Path(name) / weights)
            return
    if Path(name).is_dir():
        raise ValueError(f"cannot load the adapter {name}: it has no adapter_model.safetensors")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say of which model the reason in a `ValueError` speaks."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot load the model {name}: {error}") from error


def _require_config(folder: Path) -> None:
    if (folder / "config.json").exists():
        read_json(folder / "config.json")
        return
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"it is a PEFT adapter of {base}; give the model that it was trained from, or merge the adapter into it "
            "(`merge_and_unload`) and give the result"
        )
    inside = sorted(path.name for path in folder.iterdir())
    have = f"only {', '.join(inside[:5])}{', ...' * (len(inside) > 5)}" if inside else "nothing at all"
    raise ValueError(f"the directory has no config.json, {have}")


def _load_config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except OSError:
        raise
    except Exception as error:  # each kind of config has checks of its own
        raise ValueError(f"its config cannot be read ({_one_line(error)})") from error


def check_kind(config: Any) -> None:
    """Refuse an architecture that is not a causal language model, with or without images.

    Raises:
        `ValueError`: with the reason.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"it is an encoder-decoder model ({config.model_type}); give a causal language model")
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if architecture is not None and hasattr(transformers, architecture) and architecture not in _language_models():
        raise ValueError(f"it is a {architecture}; give a causal language model, such as one called ...ForCausalLM")


def _language_models() -> set[str]:
    """The classes that transformers loads as causal language models, with or without images."""
    names = set()
    for mapping in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        for classes in getattr(modeling_auto, mapping).values():
            names |= {classes} if isinstance(classes, str) else set(classes)
    return names


def _embedding_rows(config: Any, shapes: dict[str, list[int]] | None) -> int | None:
    """How many tokens the model knows, by its weights where they tell, else by its config."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    stored = [shape[0] for key, shape in (shapes or {}).items() if key.endswith(EMBEDDINGS) and len(shape) == 2]
    if stored and vocabulary is not None and stored[0] < vocabulary:
        raise ValueError(
            f"it has {stored[0]} embeddings, fewer than the `vocab_size` {vocabulary} of its config, which belongs to "
            "other weights"
        )
    return stored[0] if stored else vocabulary


def _load_processing_class(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer or processor of a model, as TRL's trainers load it."""
    try:
        processing_class = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain ones
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise
        raise ValueError(
            f"it has no tokenizer that can be read ({_one_line(error)}); put the model's tokenizer files beside its "
            "weights"
        ) from error
    if not hasattr(getattr(processing_class, "tokenizer", processing_class), "convert_ids_to_tokens"):
        raise ValueError(f"it has no tokenizer, only a {type(processing_class).__name__}; give a language model")
    return processing_class


def check_tokenizer(processing_class: Any, rows: int | None, is_own: bool) -> None:
    """Refuse a tokenizer that cannot be the one of a model with so many embeddings.

    Args:
        rows: the number of embeddings, if known.
        is_own: whether it was found beside the model. transformers makes one up where there is none, which knows no
            text; one that was given may be as small as its user likes.

    Raises:
        `ValueError`: with the reason.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if rows is None or not hasattr(tokenizer, "get_vocab"):
        return
    size = len(tokenizer)
    if is_own and size < LEAST_SHARE * rows:
        raise ValueError(
            f"its tokenizer knows {size} token{'s' * (size != 1)} and the model {rows}, so it is not the model's; put "
            "the model's tokenizer files (tokenizer.json, tokenizer_config.json) beside its weights"
        )
    token, number = max(_tokens_in_use(tokenizer).items(), key=lambda item: item[1])
    if number >= rows:
        raise ValueError(
            f"the tokenizer gives the token {token!r} the number {number}, and the model has {rows} embeddings only; "
            "give the model's own tokenizer, or resize the model (`resize_token_embeddings`)"
        )


def check_pad_token(pad_token: str | None, processing_class: Any) -> None:
    """Refuse a padding token that the tokenizer does not know. Raises `ValueError` with one sentence."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if pad_token is not None and tokenizer is not None and pad_token not in tokenizer.get_vocab():
        raise ValueError(
            f"`pad_token` must be a token that the tokenizer knows, got {pad_token!r}. Leave it None for the model's "
            "own."
        )


def _tokens_in_use(tokenizer: Any) -> dict[str, int]:
    """The tokens that texts may come to: the vocabulary without what was added to it, unless it is special or part of
    the chat template. Some models are published with a token added that they have no embedding for and never see."""
    added = {number: token.content for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    template = json.dumps(getattr(tokenizer, "chat_template", None), ensure_ascii=False)
    special = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    return {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number not in added or token in special or token in template
    }


def check_model_object(model: Any, processing_class: Any) -> int | None:
    """
    Refuse a model in memory that is not a causal language model, or is smaller than its tokenizer.

    Returns:
        The number of its embeddings, if it tells.

    Raises:
        `ValueError`: with one sentence.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        return None
    with _naming(type(base).__name__):
        if getattr(base.config, "is_encoder_decoder", False):
            raise ValueError("it is an encoder-decoder model; give a causal language model")
        if base.get_output_embeddings() is None:
            raise ValueError("it has no language-model head; give a causal language model (`AutoModelForCausalLM`)")
        rows = getattr(base.get_input_embeddings(), "num_embeddings", None)
        if processing_class is not None:
            check_tokenizer(processing_class, rows, is_own=False)
    return rows


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
