"""
A short name for the content of a data set: the same in every process and on every machine, another for other rows,
another order or other columns.

It is made from the values, not from how Arrow happens to keep them (chunks, offsets, 32 or 64 bits), and reads some
hundred megabytes a second.
"""

import hashlib
import json
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


ROWS_AT_ONCE = 1000
ROWS_OF_A_STREAM = 8


def digest_dataset(dataset: Any) -> str:
    """For example `1000 rows of prompt, chosen, rejected, 3f2a9c41b07d`; of a stream the first rows count only."""
    digest = hashlib.blake2b(digest_size=6)
    if isinstance(dataset, Dataset):
        columns, size = dataset.column_names, f"{len(dataset)} rows"
        for table in dataset.select_columns(sorted(columns)).with_format("arrow").iter(ROWS_AT_ONCE):
            for name, column in zip(table.column_names, table.columns, strict=True):
                digest.update(name.encode())
                _add(digest, column.combine_chunks())
    else:
        rows = list(islice(iter(dataset), ROWS_OF_A_STREAM))
        columns, size = list(rows[0]) if rows else [], f"a {type(dataset).__name__}"
        # Images and the like have no stable text
        digest.update(json.dumps(rows, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return f"{size} of {', '.join(sorted(columns))}, {digest.hexdigest()}"


def _add(digest: Any, array: pa.Array) -> None:
    """Add the values of an array, column by column for nested ones."""
    if isinstance(array, pa.ChunkedArray):  # `combine_chunks` of several dictionaries or too much text
        for chunk in array.chunks:
            _add(digest, chunk)
        return
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_null(kind):
        digest.update(f"null {len(array)}".encode())
        return
    if array.null_count:
        digest.update(b"nulls" + np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        for name, field in sorted(zip(names, array.flatten(), strict=True), key=lambda pair: pair[0]):
            digest.update(name.encode())
            _add(digest, field)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _add_numbers(digest, pc.list_value_length(array))
        _add(digest, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        _add_numbers(digest, pc.binary_length(array))
        _add_text(digest, array)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.update(b"bool" if pa.types.is_boolean(kind) else b"number")
        _add_numbers(digest, array)
    else:  # dates, decimals, maps
        digest.update(repr(array.to_pylist()).encode())


def _add_numbers(digest: Any, array: pa.Array) -> None:
    wide = pa.float64() if pa.types.is_floating(array.type) else pa.int64()
    values = pc.fill_null(array.cast(wide), 0) if array.null_count else array.cast(wide)
    digest.update(values.to_numpy(zero_copy_only=False).tobytes())


def _add_text(digest: Any, array: pa.Array) -> None:
    if array.null_count:
        array = array.drop_null()
    if len(array):
        _, offsets, data = array.buffers()
        width = np.int64 if pa.types.is_large_string(array.type) else np.int32
        bounds = np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1]
        digest.update(memoryview(data)[bounds[0] : bounds[-1]] if data is not None else b"")
