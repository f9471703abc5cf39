"""
Models, tokenizers and data sets by their names: a directory, a file or a hub id.

Each of these functions raises a `UserError` that says what could not be loaded and where it was looked for.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError

from ..errors import UserError, describe, user_error


# The file types that can be named directly as a dataset, and the `datasets` builder that reads each.
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@contextmanager
def loading(what: str, name: str, *exceptions: type[Exception], local: str = "directory") -> Iterator[None]:
    """Turn `exceptions` in the body into "cannot load `what` `name`", and say where it is not, or that it is gated."""
    try:
        yield
    except UserError:
        raise
    except exceptions as error:
        if _is_gated(error):
            raise UserError(
                f"cannot load {what} {name}: it is gated on the hub; accept its terms on its page there, then log in "
                "with `hf auth login`"
            ) from error
        where = "" if os.path.exists(name) else f" (not a local {local}, and not found on the hub)"
        raise UserError(f"cannot load {what} {name}{where}: {describe(error)}") from error


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub has refused a repository for want of permission, which libraries wrap in errors of their own."""
    while error is not None and not isinstance(error, GatedRepoError):
        error = error.__cause__ or error.__context__
    return error is not None


# Data


def file_builder(name: str) -> str | None:
    """The builder for a dataset given as a file, or None for a directory or a hub id."""
    path = Path(name)
    with user_error(OSError, ValueError):  # a name that no file can have
        is_file = path.is_file()
    if is_file:
        if path.suffix not in FILE_BUILDERS:
            raise UserError(f"cannot read the dataset {name}: its type is not one of {', '.join(FILE_BUILDERS)}")
        return FILE_BUILDERS[path.suffix]
    # A hub id has one slash at most and no file type. Asking the hub for anything else only costs time.
    if not path.exists() and (len(path.parts) > 2 or path.is_absolute() or path.suffix in FILE_BUILDERS):
        raise UserError(f"no such dataset: {name} is neither a file nor a directory here")
    return None


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """All splits of a data set."""
    from datasets import load_dataset

    builder = file_builder(name)
    require_configuration(name, config, "dataset_config")
    source = {"path": builder, "data_files": name} if builder else {"path": name}
    with loading("the dataset", name, Exception, local="file or directory"):
        return load_dataset(**source, name=config, streaming=streaming)


def require_configuration(name: str, config: str | None, option: str) -> None:
    """Refuse a configuration, which `option` gives, of a file, or of a directory that has none of the name: it would
    be passed over. A hub id is asked when it is loaded."""
    from datasets import get_dataset_config_names

    if config is None or not os.path.exists(name):
        return
    with loading("the dataset", name, Exception, local="file or directory"):
        names = [] if os.path.isfile(name) else get_dataset_config_names(name)
    if config not in names:
        has = f"it has {', '.join(names)}" if names else "a file has none"
        raise UserError(f"the dataset {name} has no configuration {config!r} ({option}): {has}; leave it out")


def require_split(splits: Mapping[str, Any], name: str, option: str, hint: str = "") -> Any:
    """The split of that name, which `option` gives."""
    if name not in splits:
        raise UserError(f"the dataset has no split {name} ({option}), only: {', '.join(splits)}{hint}")
    return splits[name]


def require_text(columns: Collection[str], command: str) -> None:
    """Refuse rows with images, and rows that are tokens already, for a command that shows or scores text."""
    if {"image", "images"} & set(columns):
        raise UserError(f"{command} reads text only, and this data set has images")
    if "prompt_ids" in columns:
        raise UserError(f"the data set is tokenised already (prompt_ids): {command} needs the text")


# Models


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a model, which tells whether there is a causal language model of that name."""
    from ..checks.models import check_config

    with user_error(ValueError), loading("the model", name, OSError):
        return check_config(name, revision, trust_remote_code)


def load_processing_class(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, or the processor that has it, as TRL's trainers load it."""
    from ..checks.models import check_processing_class

    with user_error(ValueError), loading("the tokenizer of", name, OSError):
        processing_class = check_processing_class(name, revision, trust_remote_code)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processing_class


def load_model(name: str, adapter: str | None = None, **kwargs: Any) -> Any:
    """
    A causal language model with TRL's fused head, for scoring.

    Args:
        name: a directory or hub id.
        adapter: a PEFT adapter to put on it, a directory or hub id.
        kwargs: of `from_pretrained`.

    Raises:
        `UserError`: where either cannot be loaded, or the adapter does not fit (`adapters.put_adapter`).
    """
    from transformers import AutoModelForCausalLM

    from ..compat.trl import add_fused_lm_head

    with loading("the model", name, OSError, ValueError, ImportError):
        model: Any = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        add_fused_lm_head(model)
    if adapter is None:
        return model.eval()
    from .adapters import put_adapter

    with loading("the adapter", adapter, OSError, ValueError, RuntimeError):  # the last for other shapes
        return put_adapter(model, adapter).eval()
