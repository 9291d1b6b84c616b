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
"""Where rows come from: Parquet, Arrow readers, arrays and iterables, as blocks of rows."""

import hashlib
import os

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.files import (
    ParquetInput,
    import_pyarrow,
    inspect,
    list_parquet,
    read_batches,
)
from pymc.variational._streaming.mark import PreshuffleMark, check_marks, read_mark
from pymc.variational._streaming.rows import RowFormat, column_ranges

__all__ = ["Source", "arrow_source", "as_source", "draw_seed", "parquet_source", "positive_int"]

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
        return sum(len(block) for block in self.blocks())

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.blocks()


def parquet_source(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    columns: Sequence[str] | None = None,
    shuffle_row_groups: bool = False,
    seed: int | None = None,
    invalid: Literal["raise", "drop"] = "raise",
    filesystem: Any = None,
) -> Source:
    """Stream the rows of Parquet files in bounded memory.

    Parameters
    ----------
    path : path_like or sequence of path_like
        A file, a directory (searched for ``*.parquet``, in order of name), a glob, or a list
        of these; local, or a URI that pyarrow or fsspec understands.
    columns : sequence of str, optional
        The columns of a row, in this order. Default: all columns, in the files' own order,
        which must then be the same in every file.
    shuffle_row_groups : bool, default False
        Read the row groups in another random order each epoch. This is *not* a shuffle of
        the rows: it helps a :func:`shuffle_buffer` only if row groups are much smaller than
        the buffer.
    seed : int, optional
        Of the row-group order. Default: drawn once, and shown as ``.seed``.
    invalid : {"raise", "drop"}, default "raise"
        What to do with a row that holds a null, a NaN, an infinity or an integer that the
        rows' dtype cannot hold exactly. "drop" reads the table once to count such rows, so
        that ``n_rows`` is right, and shows their number as ``.n_dropped``.
    filesystem : pyarrow.fs.FileSystem or fsspec filesystem, optional
        Where *path* lives. Default: the local one, or the one that a URI names.

    Returns
    -------
    Source
        Re-iterable; ``n_rows`` comes from the files' metadata, and ``mark`` tells the seed and
        the source of files that :func:`preshuffle` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no file, or its columns are missing or not numeric, or differ between
        files.
    StreamError
        If pre-shuffled files are incomplete, or mixed with files of another shuffle or of none.
        While reading: if a file changed since the source was made, is truncated or corrupt,
        or a value is invalid; the message names file, row group, column and row.

    Notes
    -----
    Integer, floating, boolean, decimal and dictionary-of-number columns are accepted, and
    converted to the smallest type that holds all of them exactly (decimals with a fraction
    are rounded to float64).

    Memory is bounded by one read of 65,536 rows and one decoded page per column, whatever
    the size of files and row groups. Page checksums are verified where the files have them;
    without them, a flipped bit in a data page can go unnoticed.

    Examples
    --------
    >>> source = parquet_source("shuffled/", columns=["mid", "spread", "up"])  # doctest: +SKIP
    >>> source.n_rows  # doctest: +SKIP
    121800000
    """
    if invalid not in ("raise", "drop"):
        raise ValueError(f"invalid={invalid!r} is not a choice; pass 'raise' or 'drop'")
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string; pass a list of names")
    fs, paths = list_parquet(path, filesystem)
    source = _ParquetSource(fs, paths, columns, shuffle_row_groups, seed, invalid)
    source.path = os.fspath(path) if isinstance(path, str | os.PathLike) else list(path)
    return source


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


class _ParquetSource(Source):
    random_access = True

    def __init__(self, fs, paths, columns, shuffle_row_groups, seed, invalid):
        self._fs = fs
        self._files = []
        self.mark: PreshuffleMark | None = None
        self._format = self._open_all(paths, columns)
        self.columns = self._format.columns
        self.sample_shape = (len(self.columns),)
        self.integral = self._format.integral
        self.seed = draw_seed(seed) if shuffle_row_groups else None
        self._drop = invalid == "drop"
        self._parts = [(f, g) for f in self._files for g in range(len(f.group_rows))]
        self._part_rows = [f.group_rows[g] for f, g in self._parts]
        self.n_dropped = 0
        if self._drop:
            self._count_valid_rows()
        self.n_rows = sum(self._part_rows)
        if not self.n_rows:
            raise ValueError(f"{paths[0]}: no rows to stream in {len(paths)} file(s)")
        self.fingerprint = self._digest()

    def _open_all(self, paths: Sequence[str], columns: Sequence[str] | None) -> RowFormat:
        frozen: RowFormat | None = None
        marks = {}
        for path in paths:
            known, metadata = inspect(self._fs, path)
            schema = metadata.schema.to_arrow_schema()
            if frozen is None:
                frozen = RowFormat.from_schema(schema, columns, path)
            frozen.require(schema, path, whole=columns is None)
            self._files.append(known)
            marks[path] = read_mark(metadata)
        self.mark = check_marks(marks)
        self.shuffled = self.mark is not None
        assert frozen is not None
        return frozen

    def _count_valid_rows(self) -> None:
        """Learn how many rows of each row group are left when the invalid ones are dropped."""
        total = sum(self._part_rows)
        self._part_rows = [
            sum(len(rows) for rows in self._read(file, [group])) for file, group in self._parts
        ]
        self.n_dropped = total - sum(self._part_rows)

    def _digest(self) -> str:
        parts = [self.columns, self.seed, self._drop, [(f.size, f.digest) for f in self._files]]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def entry(self, rows: np.ndarray) -> np.ndarray:
        starts = self._part_starts()
        return starts[np.searchsorted(starts, rows, side="right") - 1]

    def ranges(self, start: int, stop: int) -> np.ndarray | None:
        starts = self._part_starts()
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        bounds = []
        for file, groups in self._runs(self._order(0)[first:last]):
            _, metadata = inspect(self._fs, file.path)
            bounds += [column_ranges(metadata.row_group(g), self._format.columns) for g in groups]
        low, high = np.array(bounds).transpose(2, 0, 1)
        return np.stack([low.min(axis=0), high.max(axis=0)], axis=1)

    def _order(self, epoch: int) -> list[int]:
        """Return the row groups in the order of an epoch."""
        order = list(range(len(self._parts)))
        if self.seed is not None:
            sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
            order = np.random.default_rng(sequence).permutation(len(order)).tolist()
        return order

    def _part_starts(self) -> np.ndarray:
        """Return the first row of each row group in the order of epoch 0."""
        rows = np.array(self._part_rows)[self._order(0)]
        return np.cumsum(rows) - rows

    def blocks(self, epoch: int = 0, start: int = 0) -> Generator[np.ndarray]:
        order = self._order(epoch)
        first = 0
        while first < len(order) and start >= self._part_rows[order[first]]:
            start -= self._part_rows[order[first]]
            first += 1
        return _skip(self._read_parts(order[first:]), start)

    def _read_parts(self, order: Sequence[int]) -> Iterator[np.ndarray]:
        for file, groups in self._runs(order):
            yield from self._read(file, groups)

    def _runs(self, order: Sequence[int]) -> list[tuple[ParquetInput, list[int]]]:
        """Put neighbours of one file together, to be read in one go."""
        runs: list[tuple[ParquetInput, list[int]]] = []
        for part in order:
            file, group = self._parts[part]
            if runs and runs[-1][0] is file:
                runs[-1][1].append(group)
            else:
                runs.append((file, [group]))
        return runs

    def _read(self, file: ParquetInput, groups: Sequence[int]) -> Iterator[np.ndarray]:
        batches = read_batches(self._fs, file, columns=self.columns, row_groups=groups)
        for group, first, batch in batches:
            rows, bad = self._format.to_rows(batch)
            if bad is not None and not self._drop:
                fault = self._format.fault(batch, bad)
                raise StreamError(
                    f"{file.path}: column {fault.column!r} {fault.reason} in row "
                    f"{first + fault.row} of row group {group}; "
                    'repair the file or pass invalid="drop"'
                )
            yield rows if bad is None else rows[~bad.any(axis=1)]


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
        return _skip(self._convert(self._open()), start)

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
        return _skip(self._rest(), start)

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


def _skip(blocks: Iterator[np.ndarray], n: int) -> Generator[np.ndarray]:
    """Yield what follows the first *n* rows, without empty blocks."""
    for block in blocks:
        if len(block) > n:
            yield block[n:]
        n = max(0, n - len(block))
