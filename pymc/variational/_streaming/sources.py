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
"""Where rows come from: arrays, Arrow readers and iterables, as blocks of rows."""

import os

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from rich.console import Console

from pymc.progress_bar import CustomProgress, default_progress_theme
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.files import (
    import_pyarrow,
)
from pymc.variational._streaming.rows import RowFormat

__all__ = [
    "Source",
    "arrow_source",
    "as_source",
    "draw_seed",
    "positive_int",
    "progress_bar",
    "skip_rows",
]

_BLOCK_BYTES = 1 << 22


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
    seed: int | None = None
    fingerprint: str | None = None
    """What the stream of rows depends on, besides the epoch."""
    random_access: bool = False
    """Whether rows can be reached without reading all rows before them."""
    shuffled: bool = False
    """Whether the whole table was shuffled before."""
    path: Any = None
    """What :func:`preshuffle` would be called with, where the rows are in Parquet files."""

    @abstractmethod
    def blocks(self, epoch: int = 0, start: int = 0) -> Generator[np.ndarray]:
        """Yield the rows of an epoch from row *start* on, as arrays (rows, *sample_shape)."""

    def probe(self) -> None:
        """Learn ``sample_shape`` and ``columns`` from the first block, if need be."""

    def entry(self, rows: np.ndarray) -> np.ndarray:
        """Return where reading must start to reach each of *rows* of epoch 0."""
        return np.zeros_like(rows)

    def ranges(self, start: int, stop: int) -> np.ndarray | None:
        """Return bounds on the columns in rows *start* to *stop* of epoch 0, shape (columns, 2).

        They come from metadata; None where there are none, NaN for a column without them.
        """
        return None

    def count(self) -> int:
        """Read one epoch to count its rows."""
        with progress_bar() as progress:
            task = progress.add_task("Counting rows", total=None)
            n_rows = 0
            for block in self.blocks():
                n_rows += len(block)
                progress.update(task, completed=n_rows)
        return n_rows

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.blocks()


def arrow_source(
    make_reader: Callable[[], Any],
    *,
    columns: Sequence[str] | None = None,
    n_rows: int | None = None,
) -> Source:
    """Stream the record batches of anything that speaks Arrow.

    Parameters
    ----------
    make_reader : callable
        Called afresh for each pass over the data; returns a ``RecordBatchReader``, a table,
        an iterable of record batches, or an object with ``__arrow_c_stream__``.
    columns : sequence of str, optional
        The columns of a row, in this order. Default: all columns of the first batch.
    n_rows : int, optional
        Rows of one pass, if you know them; checked when a pass ends.

    Returns
    -------
    Source
        Memory is bounded by the largest record batch, and by what the library behind the
        reader holds.

    Examples
    --------
    >>> import duckdb  # doctest: +SKIP
    >>> query = "SELECT mid, spread, up FROM 'book/*.parquet'"
    >>> source = arrow_source(lambda: duckdb.sql(query).to_arrow_reader())  # doctest: +SKIP
    """
    if not callable(make_reader):
        raise TypeError(
            f"make_reader={type(make_reader).__name__} is not callable; "
            "pass a function that opens the reader afresh, e.g. lambda: table.to_reader()"
        )
    return _IterableSource(make_reader, columns=columns, n_rows=n_rows)


def as_source(data: Any) -> Source:
    """Make a source of an array, a factory, a re-iterable or a one-shot iterator of blocks."""
    if isinstance(data, Source):
        return data
    if isinstance(data, np.ndarray):
        return _ArraySource(data)
    if isinstance(data, str | os.PathLike):
        raise TypeError(f"source={data!r} is a path; pass parquet_source({data!r})")
    if callable(data):
        return _IterableSource(data)
    if _is_arrow(data):
        return _IterableSource(lambda: data)
    if isinstance(data, Iterator):
        return _OneShotSource(data)
    if isinstance(data, Iterable):
        return _IterableSource(lambda: data)
    raise TypeError(
        f"source={type(data).__name__} is not a source; pass parquet_source(...), "
        "arrow_source(...), an array, or an iterable or factory of blocks of rows"
    )


def draw_seed(seed: int | None) -> int:
    """Return *seed*, or fresh entropy where it is None."""
    if seed is None:
        return int(np.random.SeedSequence().entropy)  # type: ignore[arg-type]
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a non-negative integer or None")
    return int(seed)


def positive_int(name: str, value: Any) -> int:
    """Return *value* as a plain int of at least 1."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return int(value)


class _ArraySource(Source):
    random_access = True

    def __init__(self, array: np.ndarray):
        _require_numbers(array)
        if not len(array):
            raise ValueError("source=array has no rows")
        self._array = array
        self.n_rows = len(array)
        self.sample_shape = array.shape[1:]

    def entry(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def blocks(self, epoch: int = 0, start: int = 0) -> Generator[np.ndarray]:
        row_bytes = max(1, self._array[:1].nbytes)
        step = max(1, _BLOCK_BYTES // row_bytes)
        for first in range(start, len(self._array), step):
            yield self._array[first : first + step]


class _IterableSource(Source):
    """Blocks from whatever *make* returns; Arrow batches become rows of numbers."""

    def __init__(self, make: Callable[[], Any], *, columns=None, n_rows=None):
        self._make = make
        self._names = columns
        self.n_rows = n_rows
        self._format: RowFormat | None = None
        self._kind: tuple[tuple[int, ...], np.dtype] | None = None

    def probe(self) -> None:
        if self.sample_shape is None:
            blocks = self.blocks()
            if next(blocks, None) is None:
                raise ValueError("source yields no blocks, so the shape of a row is unknown")
            blocks.close()

    def blocks(self, epoch: int = 0, start: int = 0) -> Generator[np.ndarray]:
        return skip_rows(self._convert(self._open()), start)

    def _open(self) -> Iterator[Any]:
        return _arrow_batches(self._make())

    def _convert(self, blocks: Iterable[Any]) -> Iterator[np.ndarray]:
        for number, block in enumerate(blocks):
            rows = self._arrow_rows(block, number) if _is_arrow(block) else block
            _require_numbers(rows)
            kind = rows.shape[1:], rows.dtype
            if self._kind is None:
                self._kind = kind
                self.sample_shape = rows.shape[1:]
            if kind != self._kind:
                raise StreamError(
                    f"block {number} has rows of shape {kind[0]} and type {kind[1]} where "
                    f"{self._kind[0]} and {self._kind[1]} came before; make all blocks alike"
                )
            yield rows

    def _arrow_rows(self, batch: Any, number: int) -> np.ndarray:
        where = f"block {number}"
        if self._format is None:
            self._format = RowFormat.from_schema(batch.schema, self._names, where)
            self.columns, self.integral = self._format.columns, self._format.integral
        self._format.require(batch.schema, where, whole=self._names is None)
        rows, bad = self._format.to_rows(batch)
        if bad is not None:
            fault = self._format.fault(batch, bad)
            raise StreamError(
                f"{where}: column {fault.column!r} {fault.reason} in row {fault.row}; "
                "repair or filter the rows before they are streamed"
            )
        return rows


class _OneShotSource(_IterableSource):
    """Blocks of an iterator, which can be read only once."""

    def __init__(self, iterator: Iterator[Any]):
        super().__init__(lambda: iterator)
        self._first: list[np.ndarray] = []
        self._iterator = self._convert(iterator)
        self._used = False

    def probe(self) -> None:
        if self.sample_shape is None:
            self._first = list(islice(self._iterator, 1))
            if not self._first:
                raise ValueError("source yields no blocks, so the shape of a row is unknown")

    def blocks(self, epoch: int = 0, start: int = 0) -> Generator[np.ndarray]:
        if self._used:
            raise StreamError(
                "source is a one-shot iterator and has been read; pass a function that makes "
                "a new iterator, or cycle=False for a single pass"
            )
        self._used = True
        return skip_rows(self._rest(), start)

    def count(self) -> int:
        raise ValueError(
            'total_size="auto" cannot count a one-shot iterator without using it up; '
            "pass total_size=<number of rows>, or a function that makes a new iterator"
        )

    def _rest(self) -> Iterator[np.ndarray]:
        yield from self._first
        yield from self._iterator


def _arrow_batches(data: Any) -> Iterator[Any]:
    """Yield blocks of *data*; tables and Arrow streams are taken apart into batches."""
    if isinstance(data, np.ndarray):
        data = [data]
    if hasattr(data, "__arrow_c_stream__"):
        data = import_pyarrow().RecordBatchReader.from_stream(data)
    for block in data:
        if hasattr(block, "__arrow_c_stream__"):
            yield from import_pyarrow().RecordBatchReader.from_stream(block)
        else:
            yield block


def progress_bar() -> CustomProgress:
    return CustomProgress(console=Console(theme=default_progress_theme))


def _is_arrow(block: Any) -> bool:
    return hasattr(block, "__arrow_c_array__") or hasattr(block, "__arrow_c_stream__")


def _require_numbers(block: Any) -> None:
    if not isinstance(block, np.ndarray) or not block.ndim:
        raise TypeError(
            f"a block of rows is {type(block).__name__}; "
            "pass arrays of shape (rows, *sample_shape) or Arrow record batches"
        )
    if block.dtype.kind not in "biuf":
        raise TypeError(f"a block of rows has dtype {block.dtype}; pass integers or floats")


def skip_rows(blocks: Iterator[np.ndarray], n: int) -> Generator[np.ndarray]:
    """Yield what follows the first *n* rows, without empty blocks."""
    for block in blocks:
        if len(block) > n:
            yield block[n:]
        n = max(0, n - len(block))
