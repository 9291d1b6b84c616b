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
"""What a source of rows is."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from numbers import Integral
from types import MappingProxyType
from typing import Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.parquet.files import pa
from pymc.variational._streaming.utils import positive_int, progress_bar

__all__ = [
    "Source",
    "as_batch",
    "describe_value",
    "is_arrow",
    "is_finite",
    "match_shape",
    "require_finite",
    "shorten",
    "value_type",
]


class Source(ABC):
    """Rows that can be read once per epoch, block by block.

    Iterating a source opens it afresh and yields the blocks of epoch 0; two iterations do
    not disturb each other.
    """

    n_rows: int | None = None
    """Rows of one epoch, where they are known without reading them."""
    columns: tuple[str, ...] | None = None
    sample_shape: tuple[int, ...] | None = None
    """Shape of one row, where it is known without reading one."""
    integral: tuple[bool, ...] | None = None
    """Which columns hold integers, where the blocks' dtype does not tell."""
    levels: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    """Levels of the category columns, by name; a row holds their positions."""
    times: Mapping[str, bool | str] = MappingProxyType({})
    """Columns of times, by name: "UTC" where their zone is known, else True."""
    seed: int | None = None
    fingerprint: str | None = None
    """What the stream of rows depends on, besides the epoch; None where nobody can know."""
    concurrent: bool = False
    """Whether several threads may read at once."""
    shuffled: bool = False
    """Whether the whole table was shuffled before."""
    summary: Any = None
    """What is known of the columns from metadata, a ``Summary`` of all rows that were shuffled."""
    path: Any = None
    """What :func:`preshuffle` would be called with, where the rows are in Parquet files."""

    @abstractmethod
    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        """Yield the rows of an epoch from row *start* on, in arrays of shape (n, *sample_shape).

        Their values are finite, and stay until the next block but one is asked for.  A block
        without rows only tells that reading takes a while.  A reader who needs few rows says how
        many to decode at a time, *block_rows*, which sources that decode nothing ignore.
        """

    def probe(self) -> None:
        """Learn ``sample_shape`` and ``columns`` from the first block, if need be."""

    def read_starts(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the row at which reading must start to reach each of *rows* of epoch 0.

        None where rows can only be reached by reading all rows before them.
        """
        return None

    def locate(self, epoch: int, start: int, stop: int) -> str:
        """Say in which file these rows of an epoch are, as what follows "row 5 of the stream"."""
        return ""

    def count(self) -> int:
        """Read one epoch to count its rows."""
        n_rows = 0
        with progress_bar("Counting rows") as add:
            for block in self.blocks():
                n_rows += len(block)
                add(len(block))
        return n_rows

    def batches(self) -> Iterator[tuple[str, Any]]:
        """Yield the rows of epoch 0 as record batches of their own types, after their places."""
        for number, block in enumerate(self.blocks()):
            yield f"block {number}", as_batch(block, self.columns, self.levels)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.blocks()

    def describe(self, n_rows: int | None = None) -> str:
        """Say how many rows there are, by default *n_rows*, and what they hold, if it is known."""
        n_rows = n_rows if self.n_rows is None else self.n_rows
        rows = "an unknown number of rows" if n_rows is None else f"{n_rows:,} rows"
        if self.columns is not None:
            return f"{rows} of {', '.join(shorten(self.columns))}"
        return rows if self.sample_shape is None else f"{rows} of shape {self.sample_shape}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lstrip('_')}: {self.describe()}>"


def as_batch(
    rows: np.ndarray, columns: Sequence[str] | None, levels: Mapping[str, Sequence[Any]] = {}
) -> Any:
    """Return rows as a record batch; without names, columns are called "0", "1" and so on."""
    if rows.ndim > 2:
        raise ValueError(f"rows have shape {rows.shape[1:]}; reshape them to one dimension")
    arrays = list(np.ascontiguousarray(rows.reshape(len(rows), -1).T))
    names = list(columns or map(str, range(len(arrays))))
    for j, name in enumerate(names):
        if name in levels:
            codes = pa.array(arrays[j].astype("int32"))
            arrays[j] = pa.DictionaryArray.from_arrays(codes, pa.array(levels[name]))
    return pa.RecordBatch.from_arrays(arrays, names=names)


def is_arrow(block: Any) -> bool:
    """Whether *block* can be read through Arrow's C interface."""
    return hasattr(block, "__arrow_c_array__") or hasattr(block, "__arrow_c_stream__")


def value_type(kind: "pa.DataType") -> "pa.DataType":
    """Return the type of the values, which may be those of a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def shorten(names: Sequence[str], n: int = 8) -> list[str]:
    """Return the first *n* names, and how many more there are."""
    return [*names[:n], *([f"{len(names) - n} more"] if len(names) > n else [])]


def is_finite(rows: np.ndarray) -> bool:
    """Whether all values are finite; False also where only their sum is not."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(rows.sum()))


def require_finite(rows: np.ndarray, offset: int) -> None:
    """Raise StreamError if a value is NaN or infinite; *offset* is the position of the first row."""
    if rows.dtype.kind != "f" or is_finite(rows):
        return
    places = np.argwhere(~np.isfinite(rows))
    if len(places):
        row = offset + int(places[0][0])
        raise StreamError(f"{describe_value(rows, places[0], row, None)}; repair the data")


def describe_value(
    rows: np.ndarray,
    place: np.ndarray,
    row: int,
    columns: tuple[str, ...] | None,
    where: str = "",
) -> str:
    """Say which value there is at *place* of *rows*, in this row of the stream."""
    column = tuple(int(i) for i in place[1:])
    name = repr(columns[column[0]]) if columns else column
    return f"row {row} of the stream{where} holds {rows[tuple(place)]} in column {name}"


def match_shape(source: Source, sample_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape of a row of *source*, which must be *sample_shape* where that is given."""
    if sample_shape is None:
        source.probe()
        assert source.sample_shape is not None
        return source.sample_shape
    if isinstance(sample_shape, Integral):
        raise TypeError(f"sample_shape={sample_shape} must be a tuple; pass ({sample_shape},)")
    shape = tuple(positive_int("sample_shape", n) for n in sample_shape)
    if source.sample_shape not in (None, shape):
        raise ValueError(
            f"sample_shape={shape} but a row of the source has shape {source.sample_shape}"
            + (f", columns {list(source.columns)}" if source.columns else "")
            + "; leave it out"
        )
    return shape
