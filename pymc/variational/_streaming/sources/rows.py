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
"""Arrow columns to rows of numbers, exactly or not at all."""

import re

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import seems_finite
from pymc.variational._streaming.sources.parquet.files import import_pyarrow

if TYPE_CHECKING:
    import pyarrow

__all__ = ["PIECE_ROWS", "RowFormat", "exact_limit", "is_pandas_index", "piece_rows"]

_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_TILE = 2048
"""Rows; many columns are interleaved in tiles that stay in the cache, few at once: each call gives
up the interpreter lock."""

PIECE_ROWS = 1 << 18
_PIECE_VALUES = 1 << 20
"""What is decoded or converted at a time, at most.  Each call gives up the interpreter lock, and
then waits for the step that compiled code makes meanwhile: few calls keep a stream ahead."""


def is_pandas_index(column: str) -> bool:
    """Tell whether pandas made a column of an index without a name."""
    return _PANDAS_INDEX.fullmatch(column) is not None


def exact_limit(dtype: np.dtype) -> float:
    """Return the n up to which *dtype* holds every integer; infinite for integer types."""
    return 2 ** (np.finfo(dtype).nmant + 1) if dtype.kind == "f" else np.inf


def piece_rows(n_columns: int) -> int:
    """Return how many rows to decode or convert at a time."""
    return max(1, min(_PIECE_VALUES // n_columns, PIECE_ROWS))


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The columns of a stream, frozen by name and type."""

    columns: tuple[str, ...]
    types: tuple["pyarrow.DataType", ...]
    """Types of the values; a dictionary has the type of its values."""
    dtype: np.dtype
    """The smallest type that holds all columns exactly."""
    integral: tuple[bool, ...]
    """Which columns hold integers, and so must survive every later cast."""

    @classmethod
    def from_schema(
        cls, schema: "pyarrow.Schema", columns: Sequence[str] | None, where: str
    ) -> "RowFormat":
        """Freeze the *columns* (default: all) of *schema*.

        A ValueError that names *where* is raised for a column that is missing, ambiguous or not
        numeric, and for the index of a data frame that *columns* does not name.
        """
        names = tuple(schema.names if columns is None else columns)
        index = [name for name in names if is_pandas_index(name)]
        if columns is None and index:
            raise ValueError(
                f"{where}: column {index[0]!r} is pandas' index; leave it out with columns=[...], "
                "or write the rows with index=False"
            )
        if not names:
            raise ValueError(f"{where}: no columns to stream; columns={columns!r}")
        types = tuple(_value_type(schema, name, where) for name in names)
        if len(set(names)) < len(names):
            raise ValueError(f"{where}: columns={list(names)} names a column twice")
        return cls(names, types, _common_dtype(types), tuple(_is_integral(t) for t in types))

    def require(self, schema: "pyarrow.Schema", where: str, *, whole: bool) -> None:
        """Raise ValueError unless *schema* holds these columns, and only them if *whole*."""
        if whole and tuple(schema.names) != self.columns:
            raise ValueError(
                f"{where}: columns {schema.names} where {list(self.columns)} came before; "
                "pass columns=[...] to stream columns by name"
            )
        for name, expected in zip(self.columns, self.types):
            found = _value_type(schema, name, where)
            if found != expected:
                raise ValueError(
                    f"{where}: column {name!r} is {found} where it was {expected} before; "
                    "write the files with one type"
                )

    def pieces(self, batch: "pyarrow.RecordBatch", where: str) -> Iterator[np.ndarray]:
        """Yield the rows of *batch* in bounded pieces.

        A value that is null, NaN, infinite or not exact in ``dtype`` is a StreamError that names
        *where*.
        """
        size = piece_rows(len(self.columns))
        for first in range(0, batch.num_rows, size):
            piece = batch.slice(first, size)
            rows, bad = self.to_rows(piece)
            if bad is not None:
                row, fault = self.fault(piece, bad)
                raise StreamError(
                    f"{where}: {fault} in row {first + row}; "
                    "repair or filter the rows before they are streamed"
                )
            yield rows

    def to_rows(self, batch: "pyarrow.RecordBatch") -> tuple[np.ndarray, np.ndarray | None]:
        """Interleave the columns of *batch*.

        Returns
        -------
        rows : ndarray, shape (n, n_columns)
        bad : ndarray of bool, shape (n, n_columns), or None
            Which values are null, NaN, infinite or not exact in ``dtype``; None if none is.
        """
        arrays = [_decode(batch.column(name)) for name in self.columns]
        values = [_to_numpy(array, kind) for array, kind in zip(arrays, self.types)]
        rows = _interleave(values, self.dtype)
        masks: dict[int, Any] = {}
        for j, (array, column) in enumerate(zip(arrays, values)):
            if array.null_count:
                masks[j] = array.is_null().to_numpy(zero_copy_only=False)
            if self.integral[j] and column.itemsize == 8 and self.dtype.kind == "f":
                masks[j] = masks.get(j, False) | _exceeds(column, exact_limit(self.dtype))
        if not any(mask.any() for mask in masks.values()) and seems_finite(rows):
            return rows, None
        bad = ~np.isfinite(rows)
        for j, mask in masks.items():
            bad[:, j] |= mask
        return rows, bad if bad.any() else None

    def fault(self, batch: "pyarrow.RecordBatch", bad: np.ndarray) -> tuple[int, str]:
        """Return the row of the first bad value of *batch*, and what is wrong with it."""
        row, j = (int(i) for i in np.argwhere(bad)[0])
        value = batch.column(self.columns[j])[row].as_py()
        problem = f"is {'null' if value is None else value}"
        if value is not None and np.isfinite(float(value)):
            problem += f", which {self.dtype} cannot hold exactly"
        return row, f"column {self.columns[j]!r} {problem}"


def _value_type(schema: "pyarrow.Schema", name: str, where: str) -> "pyarrow.DataType":
    pa = import_pyarrow()
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        problem = "has no column" if not found else "has more than one column"
        raise ValueError(f"{where}: {problem} {name!r}; its columns are {schema.names}")
    kind = schema.field(found[0]).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_number = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal
    if not any(test(kind) for test in is_number):
        raise ValueError(
            f"{where}: column {name!r} has type {kind}, which is not a number; "
            "leave it out with columns=[...] or write it as numbers"
        )
    return kind


def _common_dtype(types: Sequence["pyarrow.DataType"]) -> np.dtype:
    """Return the smallest exact type; 64-bit integers beside floats are checked by value."""
    is_decimal = import_pyarrow().types.is_decimal
    dtypes = [np.float64 if is_decimal(kind) else kind.to_pandas_dtype() for kind in types]
    common = np.result_type(*dtypes)
    return np.dtype({"bool": "uint8", "float16": "float32"}.get(common.name, common))


def _is_integral(kind: "pyarrow.DataType") -> bool:
    types = import_pyarrow().types
    return not types.is_floating(kind) and not (types.is_decimal(kind) and kind.scale > 0)


def _decode(array: "pyarrow.Array") -> "pyarrow.Array":
    """Return the values of a dictionary array, which can be null in the dictionary itself."""
    is_dictionary = import_pyarrow().types.is_dictionary(array.type)
    return array.dictionary_decode() if is_dictionary else array


def _to_numpy(array: "pyarrow.Array", kind: "pyarrow.DataType") -> np.ndarray:
    """Return the values of an array, and zeros for its nulls."""
    pa: Any = import_pyarrow()
    if pa.types.is_decimal(kind):
        array = array.cast(pa.float64())
    if array.null_count:
        array = array.fill_null(pa.scalar(0).cast(array.type))
    if pa.types.is_boolean(array.type):
        return array.to_numpy(zero_copy_only=False)
    return np.from_dlpack(array)


def _exceeds(values: np.ndarray, limit: float) -> np.ndarray:
    """Mark integers that a float with this limit cannot hold; decimals arrive as floats."""
    if values.dtype.kind == "f":
        return np.abs(values) >= limit
    return (values > limit) | (values < -limit)


def _interleave(values: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Return columns as the rows of a C-contiguous array."""
    rows = np.empty((len(values[0]), len(values)), dtype)
    tile = _TILE if len(values) > 8 else max(len(rows), 1)
    for start in range(0, len(rows), tile):
        for j, column in enumerate(values):
            rows[start : start + tile, j] = column[start : start + tile]
    return rows
