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

import math
import os

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.sources.parquet.files import (
    ParquetInput,
    inspect_all,
    open_parquet,
    pa,
    warn_of_copies,
)
from pymc.variational._streaming.sources.parquet.mark import check_marks
from pymc.variational._streaming.sources.parquet.paths import Paths, list_parquet
from pymc.variational._streaming.sources.parquet.remote import fsspec_of
from pymc.variational._streaming.sources.rows import FileSource, RowFormat, piece_rows
from pymc.variational._streaming.sources.summary import (
    Categories,
    Located,
    Summary,
    find_levels,
    given_columns,
    given_levels,
)
from pymc.variational._streaming.utils import digest, draw_seed, progress_bar

__all__ = ["parquet_source", "read_batches"]


def parquet_source(
    path: Paths,
    *,
    columns: Sequence[str] | None = None,
    categories: Categories | None = None,
    shuffle_row_groups: bool = False,
    seed: int | None = None,
    invalid: Literal["raise", "drop"] = "raise",
    partial: bool = False,
    filesystem: Any = None,
) -> Source:
    """Stream the rows of Parquet files in bounded memory.

    Parameters
    ----------
    path : path_like or sequence of path_like
        A file, a directory (searched for ``*.parquet``, in order of name), a glob, or a list
        of these; local, or a URI that pyarrow or fsspec understands. Names that begin with
        ``_`` or ``.`` are left out unless they are spelled out. The files of a Delta, Iceberg or
        Hudi table are read with :func:`arrow_source`, because not all of them count.
    columns : sequence of str, optional
        The columns of a row, in this order. Default: all columns, in the order of the first file;
        every file must then have the same ones, in any order.
    categories : sequence of str, or mapping from str to sequence, optional
        Columns of strings, booleans or integers that stream as positions among their levels, and
        the levels of each (see ``StreamingDataset.coords``). Default levels: those that
        :func:`preshuffle` kept, or those that one pass finds, sorted, or in the order that a
        dictionary has. A null is a level only if the given ones hold None.
    shuffle_row_groups : bool, default False
        Read the row groups in another random order each epoch. This is *not* a shuffle of
        the rows: it helps a :func:`shuffle_buffer` only if row groups are much smaller than
        the buffer.
    seed : int, optional
        Seed of the order of the row groups. Default: drawn once, and shown as ``.seed``.
    invalid : {"raise", "drop"}, default "raise"
        What to do with a row that holds a null, a NaN, an infinity, a value that the rows' dtype
        cannot hold exactly, or one that is none of the given levels. "drop" reads the table
        once to count such rows, so that ``n_rows`` is right, and shows their number as
        ``.n_dropped``.
    partial : bool, default False
        Accept some of the files that :func:`preshuffle` wrote, such as all but those that are
        held out; they hold a random sample of the rows.
    filesystem : pyarrow.fs.FileSystem or fsspec filesystem, optional
        Filesystem of *path*. Default: the local one, or the one that a URI names.

    Returns
    -------
    Source
        Re-iterable; ``n_rows`` comes from the files' metadata, and ``mark`` holds the seed and
        the source of files that :func:`preshuffle` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no file or one comes twice, a folder is a table of another format, or columns
        are missing or not numeric, or differ between files.
    StreamError
        If pre-shuffled files are incomplete, or mixed with files of another shuffle or of none.
        While reading: if a file changed since the source was made, is truncated or corrupt,
        an object store fails in spite of retries, or a value is invalid; the message names
        file, row group, column and row.

    Warns
    -----
    StreamWarning
        If a folder has files that may be Parquet under other names, or a file looks like a copy of
        another one.

    Notes
    -----
    Integer, floating, boolean, decimal and dictionary-of-number columns are accepted, and
    converted to the smallest type that holds all of them exactly, also where it differs between
    files (decimals with a fraction are rounded to float64). Timestamps and dates become float64
    seconds since 1970, and must come back from there to their own unit; that of INT96 timestamps
    counts as microseconds.

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
    fs, paths = list_parquet(path, filesystem)
    levels = given_levels(categories)
    source = _ParquetSource(fs, paths, given_columns(columns), levels, partial)
    source.seed = draw_seed(seed) if shuffle_row_groups else None
    if invalid == "drop":
        source.drop_invalid_rows()
    source.path = os.fspath(path) if isinstance(path, str | os.PathLike) else list(path)
    return source


class _ParquetSource(FileSource):
    _part_name = "row group"

    def __init__(
        self,
        fs: Any,
        paths: Sequence[str],
        columns: Sequence[str] | None,
        levels: dict[str, Any],
        partial: bool,
    ):
        """Read the footer of each file once, and keep what is needed of it."""
        self._fs = fs
        self.concurrent = fsspec_of(fs) is None  # fsspec's own need not be safe to share
        self._drop, self.n_dropped = False, 0
        frozen: RowFormat | None = None
        summary = None
        files: list[ParquetInput] = []
        for file, schema, metadata in inspect_all(fs, paths):
            path = file.path
            frozen = frozen or RowFormat.from_schema(schema, columns, path, levels)
            frozen = frozen.widen(schema, path, whole=columns is None)
            summary = summary or Summary.from_metadata(metadata.metadata, path)
            files.append(file)
        assert frozen is not None
        self.mark = check_marks(files, partial=partial)
        warn_of_copies(fs, files)
        self._set_files(files)
        self.shuffled = self.mark is not None
        if self.shuffled and summary is not None:  # others need not be of these rows
            self.summary = summary.select(frozen.columns)
            kept = given_levels({name: self.summary[name].levels or None for name in levels})
            levels = {name: kept[name] if own is None else own for name, own in levels.items()}
        self._format = frozen.with_levels(find_levels(levels, self._read_columns, self.n_rows))
        self._format.describe(self)
        self._piece_rows = piece_rows(len(frozen.columns))

    def drop_invalid_rows(self) -> None:
        """Leave invalid rows out, and read the table once to count the others."""
        self._drop, n_rows = True, int(self._part_rows.sum())
        self._part_name = "the valid rows of row group"
        counts = []
        with progress_bar("Counting valid rows", n_rows) as add:
            for file, group in self._parts:
                counts.append(sum(len(block) for block in self._read(file, [group], None)))
                add(file.part_rows[group])
        self.n_dropped = n_rows - sum(counts)
        if not any(counts):
            raise ValueError(
                f"{self._files[0].path}: all {n_rows} rows hold a value that is invalid; "
                "leave the column that does out with columns=[...]"
            )
        self._set_rows(counts)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        contents = [(file.size, file.digest) for file in self._files]
        return digest(self.columns, self.levels, self.seed, self._drop, contents)

    def _read_columns(self, columns: Sequence[str]) -> Iterator[Located]:
        for file in self._files:
            yield from read_batches(self._fs, file, columns, piece_rows(len(columns)))

    def batches(self) -> Iterator[Located]:
        for where, batch in self._read_columns(self.columns or ()):
            bad = self._format.to_rows(batch, where)[1] if self._drop else None
            yield where, batch if bad is None else batch.filter(pa.array(~bad.any(axis=1)))

    def _read(
        self, file: ParquetInput, groups: Sequence[int], block_rows: int | None
    ) -> Iterator[np.ndarray]:
        most = max(file.part_rows[group] for group in groups)
        size = _divide(most, block_rows or self._piece_rows)
        first = 0
        try:
            for _, batch in read_batches(self._fs, file, self.columns or (), size, groups):
                yield self._convert(batch, file, groups, first)
                first += batch.num_rows
                del batch  # its memory is free while the next one is read
        finally:
            if block_rows is not None:  # Arrow keeps memory for a thread that may read no more
                pa.default_memory_pool().release_unused()

    def _convert(
        self, batch: "pa.RecordBatch", file: ParquetInput, groups: Sequence[int], first: int
    ) -> np.ndarray:
        """Return the rows of a batch that starts at row *first* of these row groups."""
        rows, bad = self._format.to_rows(batch, file.path)
        if bad is None:
            return rows
        if self._drop:
            return rows[~bad.any(axis=1)]
        row, fault = self._format.fault(batch, bad)
        group, row = file.place(groups, first + row)
        raise StreamError(
            f"{file.path}: {fault} in row {row} of row group {group}; "
            'repair the file or pass invalid="drop"'
        )


def read_batches(
    fs: Any,
    file: ParquetInput,
    columns: Sequence[str],
    batch_rows: int,
    groups: Sequence[int] | None = None,
) -> Iterator[Located]:
    """Yield the rows of some row groups of an unchanged file, by default all, and these columns."""
    chosen = list(range(len(file.part_rows)) if groups is None else groups)
    n_rows = 0
    with open_parquet(fs, file) as opened:
        for batch in opened.iter_batches(
            batch_rows, row_groups=chosen, columns=list(columns), use_threads=False
        ):
            n_rows += batch.num_rows
            yield file.path, batch.select(list(columns))
            del batch  # its memory is free while the next one is read
        promised = sum(file.part_rows[group] for group in chosen)
        if n_rows != promised:
            raise StreamError(
                f"{file.path}: {len(chosen)} row groups gave {n_rows} rows, "
                f"its footer promises {promised}"
            )


def _divide(group_rows: int, most: int) -> int:
    """Return how many rows, at most *most*, to read at a time.

    A read that crosses the end of a row group costs a copy, so the reads divide a row group
    evenly, or hold a whole number of them.
    """
    if group_rows > most:
        return math.ceil(group_rows / math.ceil(group_rows / most))
    return most - most % max(1, group_rows)
