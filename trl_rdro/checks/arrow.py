"""Masks over Arrow columns, as NumPy arrays of booleans, one for each row."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_true(mask: pa.Array) -> np.ndarray:
    """A mask whose missing values count as False."""
    return mask.fill_null(False).to_numpy(zero_copy_only=False)


def no_rows(array: pa.Array) -> np.ndarray:
    return np.zeros(len(array), dtype=bool)


def is_blank(text: pa.Array) -> np.ndarray:
    """Which texts are empty or white space only."""
    return is_true(pc.or_(pc.equal(pc.binary_length(text), 0), pc.utf8_is_space(text)))


def lengths(lists: pa.Array) -> np.ndarray:
    """The number of entries of each list, 0 where there is no list."""
    return pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
