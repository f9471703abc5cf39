"""
Whether the weight files of a model directory are whole, told from their headers and sizes without reading them.

A safetensors file is eight bytes with the length of its header, the header in JSON, which says where each tensor ends,
and the tensors: a download that was cut short, or a Git LFS pointer in place of the file, shows at once.
"""

import json
import zipfile
from pathlib import Path
from typing import Any


# In the order in which transformers looks for them
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
AGAIN = "copy or download it again"


def check_weights(folder: Path) -> dict[str, list[int]] | None:
    """
    Look at the weight files of a local model.

    Returns:
        The shape of each tensor by its name, or None for pickled files, which do not tell.

    Raises:
        `ValueError`: if there are none, or one is missing, empty, cut short or not what its name says.
    """
    kinds = (SAFETENSORS, SAFETENSORS_INDEX, tensor_shapes), (PICKLED, PICKLED_INDEX, check_pickled)
    for single, index, check in kinds:
        if (folder / single).exists():
            return check(folder / single)
        if (folder / index).exists():
            shapes: dict[str, list[int]] = {}
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{folder / index} names no weights: {AGAIN}")
            for shard in sorted(set(map(str, weight_map.values()))):
                if not (folder / shard).exists():
                    raise ValueError(f"{folder / index} names the file {shard}, which is not there: {AGAIN}")
                shapes |= check(folder / shard) or {}
            if lost := sorted(set(weight_map) - set(shapes)) if shapes else []:
                raise ValueError(f"{folder / weight_map[lost[0]]} lacks the tensor {lost[0]}: {AGAIN}")
            return shapes or None
    raise ValueError(f"{folder} has no weights ({SAFETENSORS} or {PICKLED}, in one file or with an index)")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{path} is not JSON ({error}): {AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}: {AGAIN}")
    return value


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes in a safetensors file. Raises `ValueError` if the file is not whole."""
    size = _size(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > size - 8:
            raise ValueError(f"{path} is not a whole safetensors file ({size} bytes, its header needs more): {AGAIN}")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: list(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not a safetensors file (its header cannot be read): {AGAIN}") from error
    if size != 8 + length + end:
        raise ValueError(f"{path} has {size} bytes where its header announces {8 + length + end}: {AGAIN}")
    return shapes


def check_pickled(path: Path) -> None:
    """Raise `ValueError` if a file of PyTorch's is empty or cut short."""
    _size(path)
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut short: {AGAIN}")


def _size(path: Path) -> int:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(20).startswith(b"version https://git"):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its directory")
    if size < 8:
        raise ValueError(f"{path} is {'cut short' if size else 'empty'} ({size} bytes): {AGAIN}")
    return size
