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
"""Rows from Parquet files."""

import hashlib
import math
import os

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import (
    Source,
    draw_seed,
    progress_bar,
    skip_rows,
)
from pymc.variational._streaming.sources.parquet.files import (
    ParquetInput,
    import_pyarrow,
    inspect,
    read_batches,
    read_metadata,
)
from pymc.variational._streaming.sources.parquet.mark import PreshuffleMark, check_marks, read_mark
from pymc.variational._streaming.sources.parquet.paths import Paths, list_parquet
from pymc.variational._streaming.sources.parquet.remote import fsspec_of
from pymc.variational._streaming.sources.rows import RowFormat, column_ranges, piece_rows

if TYPE_CHECKING:
    import pyarrow

__all__ = ["parquet_source"]


def parquet_source(
    path: Paths,
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
        of these; local, or a URI that pyarrow or fsspec understands. Names that begin with
        ``_`` or ``.`` are left out unless they are spelled out.
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
        If there is no file or one comes twice, or columns are missing or not numeric, or differ
        between files.
    StreamError
        If pre-shuffled files are incomplete, or mixed with files of another shuffle or of none.
        While reading: if a file changed since the source was made, is truncated or corrupt,
        an object store fails in spite of retries, or a value is invalid; the message names
        file, row group, column and row.

    Notes
    -----
    Integer, floating, boolean, decimal and dictionary-of-number columns are accepted, and
    converted to the smallest type that holds all of them exactly (decimals with a fraction
    are rounded to float64).

    Memory is bounded by one read of 262,144 rows or fewer and one decoded page per column, whatever
    the size of files and row groups. Page checksums are verified where the files have them;
    without them, a flipped bit in a data page can go unnoticed.

    Examples
    --------
    >>> import pyarrow as pa
    >>> import pyarrow.parquet as pq
    >>> pq.write_table(pa.table({"mid": [0.48, 0.52, 0.5], "up": [1, 0, 1]}), "book.parquet")
    >>> source = parquet_source("book.parquet", columns=["up", "mid"])
    >>> source.n_rows, source.columns
    (3, ('up', 'mid'))
    """
    if invalid not in ("raise", "drop"):
        raise ValueError(f"invalid={invalid!r} is not a choice; pass 'raise' or 'drop'")
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string; pass a list of names")
    fs, paths = list_parquet(path, filesystem)
    source = _ParquetSource(fs, paths, columns, shuffle_row_groups, seed, invalid)
    source.path = os.fspath(path) if isinstance(path, str | os.PathLike) else list(path)
    return source


class _ParquetSource(Source):
    def __init__(self, fs, paths, columns, shuffle_row_groups, seed, invalid):
        self._fs = fs
        self.concurrent = fsspec_of(fs) is None  # which need not be safe to share
        self._files = []
        self.mark: PreshuffleMark | None = None
        self._format = self._open_all(paths, columns)
        self.columns = self._format.columns
        self.sample_shape = (len(self.columns),)
        self._piece_rows = piece_rows(len(self.columns))
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
            try:
                marks[path] = read_mark(metadata)
            except (KeyError, TypeError, ValueError) as err:
                raise StreamError(f"{path}: its pre-shuffle mark is corrupt ({err})") from err
        self.mark = check_marks(marks)
        self.shuffled = self.mark is not None
        assert frozen is not None
        return frozen

    def _count_valid_rows(self) -> None:
        """Learn how many rows of each row group are left when the invalid ones are dropped."""
        total = sum(self._part_rows)
        with progress_bar("Counting valid rows", total) as add:
            for part, (file, group) in enumerate(self._parts):
                pieces = self._read(file, [group], self._piece_rows)
                self._part_rows[part] = sum(len(piece) for piece in pieces)
                add(file.group_rows[group])
        self.n_dropped = total - sum(self._part_rows)

    def _digest(self) -> str:
        parts = [self.columns, self.seed, self._drop, [(f.size, f.digest) for f in self._files]]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def read_starts(self, rows: np.ndarray) -> np.ndarray:
        starts = self._part_starts()
        return starts[np.searchsorted(starts, rows, side="right") - 1]

    def ranges(self, start: int, stop: int) -> np.ndarray | None:
        starts = self._part_starts()
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        bounds = []
        for file, groups in self._runs(self._order(0)[first:last]):
            metadata = read_metadata(self._fs, file)
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

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        rows = self._read_rows(self._order(epoch), start, block_rows or self._piece_rows)
        if block_rows is None:
            return rows
        return _then_release(rows)

    def _read_rows(self, order: list[int], start: int, size: int) -> Generator[np.ndarray]:
        """Read on from row *start* of the row groups in *order*, at most *size* rows at a time."""
        first = 0
        while first < len(order) and start >= self._part_rows[order[first]]:
            start -= self._part_rows[order[first]]
            first += 1
        return skip_rows(self._read_parts(order[first:], size), start)

    def _read_parts(self, order: Sequence[int], size: int) -> Iterator[np.ndarray]:
        for file, groups in self._runs(order):
            yield from self._read(file, groups, size)

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

    def _read(self, file: ParquetInput, groups: Sequence[int], size: int) -> Iterator[np.ndarray]:
        size = _even(max(file.group_rows[group] for group in groups), size)
        batches = read_batches(
            self._fs, file, columns=self.columns, row_groups=groups, batch_rows=size
        )
        for first, batch in batches:
            yield self._convert(batch, file, groups, first)
            del batch  # while the next one is read

    def _convert(
        self, batch: "pyarrow.RecordBatch", file: ParquetInput, groups: Sequence[int], first: int
    ) -> np.ndarray:
        """Return the rows of a batch that starts at row *first* of these row groups."""
        rows, bad = self._format.to_rows(batch)
        if bad is None:
            return rows
        if self._drop:
            return rows[~bad.any(axis=1)]
        fault = self._format.fault(batch, bad)
        group, row = file.place(groups, first + fault.row)
        raise StreamError(
            f"{file.path}: column {fault.column!r} {fault.reason} in row {row} of row group "
            f'{group}; repair the file or pass invalid="drop"'
        )


def _even(group_rows: int, most: int) -> int:
    """Return how many rows, at most, to read at a time so that a read ends where a row group does.

    A read across that border would move what it has to a larger place.
    """
    if group_rows <= most:
        return most // max(1, group_rows) * max(1, group_rows)
    return math.ceil(group_rows / math.ceil(group_rows / most))


def _then_release(rows: Generator[np.ndarray]) -> Generator[np.ndarray]:
    """Give back what Arrow keeps for this thread, which may read no more."""
    try:
        yield from rows
    finally:
        import_pyarrow().default_memory_pool().release_unused()
