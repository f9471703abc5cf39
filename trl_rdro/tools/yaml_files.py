"""
YAML files of settings, read strictly: mistakes that PyYAML passes over, or dies of, are named.

Of two equal keys PyYAML takes the last one; a few lines of nested anchors stand for more values than fit into memory.
"""

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, user_error


LARGEST = 10_000_000  # bytes of a file
MOST_VALUES = 100_000  # in a file, with its anchors written out


def read_text(path: str | Path) -> str:
    """The text of a file; a `UserError` that names it where it cannot be read or is not text."""
    with user_error(OSError), open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UserError(f"cannot read {path}: it has more than {LARGEST} bytes, which no settings have")
    with user_error(UnicodeDecodeError, prefix=f"cannot read {path}, which is not text in UTF-8: "):
        return data.decode("utf-8")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file. Raises `UserError` unless it is a mapping with text for keys, each there once."""
    text = read_text(path)
    with user_error(yaml.YAMLError, ValueError, RecursionError, prefix=f"cannot read {path}: "):
        loader = yaml.SafeLoader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        _check(node, {})
        settings = None if node is None else loader.construct_document(node)
    if not isinstance(settings, dict):
        raise UserError(f"cannot read {path}: it must be a mapping of settings (key: value), not {_kind(settings)}")
    if odd := [key for key in settings if not isinstance(key, str)]:
        raise UserError(f"cannot read {path}: the key {odd[0]!r} is not text")
    return settings


def _kind(value: Any) -> str:
    return {type(None): "an empty file", list: "a list"}.get(type(value), "a single value")


def _check(node: yaml.Node | None, sizes: dict[yaml.Node, int]) -> int:
    """Refuse equal keys and endless values. Returns how many values there are with all anchors written out."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if node not in sizes:
        sizes[node] = MOST_VALUES  # for a node inside itself
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise ValueError(f"the key {twice[0]} is there twice{_line(node, twice[0])}")
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value
        sizes[node] = 1 + sum(_check(child, sizes) for child in children)
    if sizes[node] >= MOST_VALUES:
        raise ValueError(f"its anchors stand for {MOST_VALUES} values or more, which no recipe needs")
    return sizes[node]


def _line(node: yaml.MappingNode, name: str) -> str:
    lines = [key.start_mark.line + 1 for key, _ in node.value if key.value == name]
    return f", in lines {' and '.join(map(str, lines))}"
