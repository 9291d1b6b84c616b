#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""A checksum over rows that does not depend on their order."""

from typing import TYPE_CHECKING

import numpy as np

from pymc.variational._streaming.sources.parquet.files import import_pyarrow

if TYPE_CHECKING:
    import pyarrow

__all__ = ["checksum_rows"]

_WORD = 1 << 64
_SLICE_BYTES = {"fixed": 1 << 22, "variable": 1 << 18}
"""Words are made of slices of rows of about this size; of a string they take four times that."""
_CHUNK = 1 << 15
"""Rows that are hashed at once, so that all that it takes stays in the cache."""
_NULL = np.uint64(0x9E6D_5F41_C3A8_27B3)
_ALL_ONES = np.uint64(_WORD - 1)
_MULTIPLIER = np.uint64(0xD6E8_FEB8_6659_FD93)


def checksum_rows(batch: "pyarrow.RecordBatch") -> int:
    """Sum a hash of every row, modulo 2**64.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        Of any Arrow types that Parquet can hold, except views.

    Returns
    -------
    int
        The sum over two batches, modulo 2**64, is the sum of their checksums.

    Notes
    -----
    A row's hash covers the bits of all its values, where they stand, and which are null.
    Changing one number of one row always changes the sum; any other accident (rows lost,
    doubled, torn apart or swapped between columns) goes unnoticed with probability 2**-64.
    It is no protection against forgery.
    """
    fixed = all(import_pyarrow().types.is_primitive(field.type) for field in batch.schema)
    limit = _SLICE_BYTES["fixed" if fixed else "variable"]
    rows = max(1, batch.num_rows * limit // max(batch.nbytes, 1))
    slices = (batch.slice(first, rows) for first in range(0, batch.num_rows, rows))
    return sum(_sum_hashes(part) for part in slices) % _WORD


def _sum_hashes(batch: "pyarrow.RecordBatch") -> int:
    columns = [_words(column) for column in batch.columns]
    spare = np.empty((2, min(_CHUNK, batch.num_rows)), np.uint64)
    total = 0
    for first in range(0, batch.num_rows, _CHUNK):
        chunk = [words[first : first + _CHUNK] for words in columns]
        total += int(_combine(chunk, *spare[:, : batch.num_rows - first]).sum(dtype=np.uint64))
    return total


def _combine(columns: list[np.ndarray], total: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Make one word of the words that stand beside each other in each row, in *total*."""
    total[:] = 0
    for words, weight in zip(columns, _weights(len(columns))):
        total += np.multiply(words, weight, out=spare)
    return _mix(total, spare)


def _join(columns: list[np.ndarray], n: int) -> np.ndarray:
    """Combine words that belong to one value."""
    return _combine(columns, np.empty(n, np.uint64), np.empty(n, np.uint64))


def _words(array: "pyarrow.Array") -> np.ndarray:
    """Return an unsigned integer for each value; equal values have equal ones."""
    pa = import_pyarrow()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if isinstance(array, pa.NullArray):
        return np.full(len(array), _NULL)
    words = _valid_words(array)
    if array.null_count:
        words = np.where(array.is_valid().to_numpy(zero_copy_only=False), words, _NULL)
    return words


def _valid_words(array: "pyarrow.Array") -> np.ndarray:
    pa = import_pyarrow()
    types = pa.types
    kind = array.type
    if types.is_struct(kind):
        fields = [_words(array.field(i)) for i in range(kind.num_fields)]
        return _join(fields, len(array))
    if types.is_fixed_size_list(kind):
        bounds = np.arange(len(array) + 1) * kind.list_size
        children = array.values.slice(array.offset * kind.list_size, bounds[-1])
        return _segments(_words(children), bounds)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        bounds = array.offsets.to_numpy()
        children = array.values.slice(bounds[0], bounds[-1] - bounds[0])
        return _segments(_words(children), bounds - bounds[0])
    if types.is_boolean(kind):
        return array.cast(pa.uint8()).fill_null(0).to_numpy()
    if not types.is_primitive(kind) and not types.is_decimal(kind):
        return _binary_words(array)
    return _fixed_width_words(array)


def _fixed_width_words(array: "pyarrow.Array") -> np.ndarray:
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    data = data[array.offset * width : (array.offset + len(array)) * width]
    if width <= 8:
        return data.view(f"u{width}")
    halves = data.view(np.uint64).reshape(len(array), -1)
    return _join(list(halves.T), len(array))


def _binary_words(array: "pyarrow.Array") -> np.ndarray:
    types = import_pyarrow().types
    if types.is_fixed_size_binary(array.type):
        bounds = (array.offset + np.arange(len(array) + 1)) * array.type.byte_width
    else:
        large = types.is_large_string(array.type) or types.is_large_binary(array.type)
        offsets = np.frombuffer(array.buffers()[1] or bytes(8), np.int64 if large else np.int32)
        bounds = offsets[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(array.buffers()[-1] or b"", np.uint8)[bounds[0] : bounds[-1]]
    return _string_words(data, bounds - bounds[0])


def _string_words(data: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Make one word of each string ``data[bounds[i] : bounds[i + 1]]``, eight bytes at a time."""
    lengths = np.diff(bounds)
    ends = np.zeros(len(bounds), np.int64)
    np.cumsum((lengths + 7) >> 3, out=ends[1:])
    places = np.repeat(bounds[:-1] - 8 * ends[:-1], np.diff(ends)) + 8 * np.arange(ends[-1])
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    eights = np.ndarray(len(data) + 1, "<u8", padded, strides=(1,))[places]
    excess = -lengths & 7
    last = ends[1:][excess > 0] - 1
    eights[last] &= _ALL_ONES >> (8 * excess[excess > 0]).astype(np.uint64)
    return _join([_segments(eights, ends), lengths.astype(np.uint64)], len(lengths))


def _segments(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Make one word of each run ``values[bounds[i] : bounds[i + 1]]``."""
    lengths = np.diff(bounds)
    weights = _weights(int(lengths.max(initial=0)) + 1)
    places = np.arange(1, len(values) + 1) - np.repeat(bounds[:-1], lengths)
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * weights[places], out=sums[1:])
    return _mix(sums[bounds[1:]] - sums[bounds[:-1]] + lengths.astype(np.uint64) * weights[0])


def _weights(n: int) -> np.ndarray:
    """Return a fixed sequence of *n* odd words without a pattern."""
    return _mix(_mix(np.arange(1, n + 1, dtype=np.uint64) * _MULTIPLIER)) | np.uint64(1)


def _mix(words: np.ndarray, spare: np.ndarray | None = None) -> np.ndarray:
    """Scramble 64-bit words one to one and in place, so that sums of them tell rows apart."""
    words ^= np.right_shift(words, np.uint64(32), out=spare)
    words *= _MULTIPLIER
    words ^= np.right_shift(words, np.uint64(29), out=spare)
    return words
