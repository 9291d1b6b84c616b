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
"""Rows from Arrow readers, and from Arrow IPC (Feather) files."""

import os

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from pymc.variational._streaming.sources.arrays import IterableSource, as_source, is_table
from pymc.variational._streaming.sources.base import Source, is_arrow, shorten
from pymc.variational._streaming.sources.categories import Categories, find_levels, given_levels
from pymc.variational._streaming.sources.ipc import (
    ROWS_KEY,
    IpcFile,
    RecordBatchSource,
    RowMajorSource,
    reading,
)
from pymc.variational._streaming.sources.parquet.files import import_pyarrow
from pymc.variational._streaming.sources.parquet.paths import list_ipc
from pymc.variational._streaming.sources.rows import RowFormat
from pymc.variational._streaming.utils import digest, positive_int

__all__ = ["arrow_source", "with_columns"]


def arrow_source(
    make_reader: Any,
    *,
    columns: Sequence[str] | None = None,
    categories: Categories | None = None,
    n_rows: int | None = None,
    partial: bool = False,
) -> Source:
    """Stream the record batches of anything that speaks Arrow, or of Arrow IPC files.

    Parameters
    ----------
    make_reader : callable, table, path_like or sequence of path_like
        A function that is called afresh for each pass over the data, and returns a
        ``RecordBatchReader``, a table, an iterable of record batches, or an object with
        ``__arrow_c_stream__``. Or a table or data frame (Arrow, pandas, Polars). Or the path of
        Arrow IPC (Feather version 2) files: a file, a directory (searched for ``*.arrow``,
        ``*.feather`` and ``*.ipc``, in order of name), a glob, or a list of these.
    columns : sequence of str, optional
        The columns of a row, in this order. Default: all columns of the first batch.
    categories : sequence of str, or mapping from str to sequence, optional
        Columns of strings, booleans or integers that stream as positions among their levels, and
        the levels of each, as in :func:`parquet_source`. Levels that are not given take one more
        pass.
    n_rows : int, optional
        Number of rows of one pass, if you know it; it is checked in every pass. The number of
        rows in files is known.
    partial : bool, default False
        Accept some of the files that :func:`preshuffle` wrote with ``format="arrow"``.

    Returns
    -------
    Source
        Memory is bounded by the largest record batch, and by what the library behind the
        reader holds.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no file or one comes twice, or columns are missing or not numeric, or differ
        between files.
    StreamError
        While reading: if a value is null, NaN, infinite or an integer that the rows' dtype
        cannot hold exactly, a pass does not give *n_rows* rows, or a file changed since the
        source was made or cannot be read; the message names the place.

    Notes
    -----
    Every pass must give the same rows. In which order, *make_reader* decides: an order that
    differs between passes still uses every row once in each epoch, but then the batches
    are not reproducible, and a resumed stream would repeat some rows and skip others.

    Examples
    --------
    >>> import pyarrow as pa
    >>> table = pa.table({"mid": [0.48, 0.52, 0.5], "up": [1, 0, 1]})
    >>> source = arrow_source(lambda: table.to_reader(max_chunksize=2))
    >>> [block.shape for block in source]
    [(2, 2), (1, 2)]
    """
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string; pass a list of names")
    levels = given_levels(categories)
    size = None if n_rows is None else positive_int("n_rows", n_rows)
    if isinstance(make_reader, str | os.PathLike | list | tuple):
        source = _open_files(list_ipc(make_reader), columns, levels, partial)
        if size not in (None, source.n_rows):
            raise ValueError(f"n_rows={n_rows} but the files hold {source.n_rows}; leave it out")
        return source
    if is_table(make_reader):
        table, make_reader = make_reader, lambda: table
        size = size or len(table) or None
    if not callable(make_reader):
        raise TypeError(
            f"make_reader={type(make_reader).__name__} is not callable; "
            "pass a function that opens the reader afresh, e.g. lambda: table.to_reader()"
        )
    return IterableSource(make_reader, columns=columns, levels=levels, n_rows=size)


def with_columns(rows: Any, stream: Source, unread: Sequence[str] = ()) -> Source:
    """Return a source of *rows* with the columns of a stream, in its order and with its levels.

    Columns that are *unread* may be missing, and are zero then.
    """
    stream.probe()
    columns, levels = stream.columns, stream.levels
    if is_arrow(rows) and columns is not None:
        table = import_pyarrow().table(rows)  # a reader gives its rows only once
        present = [name for name in columns if name in table.column_names or name not in unread]
        known = {name: levels[name] for name in levels if name in present}
        rows = arrow_source(lambda: table, columns=present, categories=known)
    source = as_source(rows)
    source.probe()
    if columns is None or source.columns is None:
        return source
    missing = [name for name in columns if name not in (*source.columns, *unread)]
    if missing:
        raise ValueError(
            f"rows has columns {list(source.columns)}, and none of {missing}, which the stream "
            "has; pass rows with all of its columns"
        )
    for name in set(columns).intersection(source.columns):
        if source.levels.get(name) != levels.get(name):
            raise ValueError(
                f"rows has {_few(source.levels.get(name))} of {name!r} where the stream has "
                f"{_few(levels.get(name))}; pass categories=train.levels to the source of rows, "
                "where train is the source of the stream"
            )
        if {source.times.get(name), stream.times.get(name)} == {True, "UTC"}:
            has = "a" if stream.times[name] is True else "no"
            raise ValueError(
                f"rows has {has} time zone in {name!r}, unlike the stream; give it what the stream "
                "has, as by tz_localize of pandas"
            )
    return source if source.columns == columns else _Rearranged(source, columns)


def _few(levels: Sequence[Any] | None) -> str:
    """Say which levels there are."""
    return f"levels {', '.join(shorten([repr(v) for v in levels], 4))}" if levels else "no levels"


class _Rearranged(Source):
    """The rows of another source with other columns: found by name, or zero."""

    def __init__(self, source: Source, columns: tuple[str, ...]):
        assert source.columns is not None
        self._source = source
        places = {name: place for place, name in enumerate(source.columns)}
        self._places = np.array([places.get(name, len(places)) for name in columns])
        self.columns, self.sample_shape, self.n_rows = columns, (len(columns),), source.n_rows
        if source.integral is not None:
            self.integral = tuple((*source.integral, True)[place] for place in self._places)

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        for block in self._source.blocks(epoch, start, block_rows=block_rows):
            zeros = np.zeros((len(block), 1), block.dtype)
            yield np.concatenate([block, zeros], axis=1)[:, self._places]


def _open_files(
    paths: Sequence[str], columns: Sequence[str] | None, levels: dict[str, Any], partial: bool
) -> Source:
    with reading(paths[0]) as reader:
        is_row_major = ROWS_KEY in (reader.schema.metadata or {})
    if is_row_major:
        return RowMajorSource(paths, columns, levels, partial)
    return _IpcSource(paths, columns, levels)


class _IpcSource(RecordBatchSource):
    def __init__(self, paths: Sequence[str], columns: Sequence[str] | None, levels: dict[str, Any]):
        frozen: RowFormat | None = None
        files = []
        for path in paths:
            with reading(path) as reader:
                schema = reader.schema
            if frozen is None:
                frozen = RowFormat.from_schema(schema, columns, path, levels)
            frozen = frozen.widen(schema, path, whole=columns is None)
            fields = tuple(schema.get_field_index(name) for name in frozen.columns)
            # A record batch must be read to learn its number of rows; one column is enough.
            with reading(path, fields[:1]) as reader:
                batches = map(reader.get_batch, range(reader.num_record_batches))
                files.append(IpcFile(path, [batch.num_rows for batch in batches], fields))
        assert frozen is not None
        self._set_files(files)
        if not self.n_rows:
            raise ValueError(f"{paths[0]}: no rows to stream in {len(paths)} file(s)")
        self.columns = frozen.columns
        self.sample_shape = (len(self.columns),)
        self._format = frozen.with_levels(
            find_levels(levels, lambda _: self.batches(), self.n_rows)
        )
        self.levels, self.integral = self._format.listed_levels(), self._format.integral
        self.times = self._format.times
        self.fingerprint = digest(self.columns, self.levels, [file.identity for file in files])

    def batches(self) -> Iterator[Any]:
        for file in self._files:
            for batch in _read_batches(file, 0):
                yield batch.select(list(self.columns or ()))

    def _read(self, file: IpcFile, first: int) -> Iterator[np.ndarray]:
        for number, batch in enumerate(_read_batches(file, first), start=first):
            yield from self._format.pieces(batch, f"{file.path}: record batch {number}")


def _read_batches(file: IpcFile, first: int) -> Iterator[Any]:
    with file.open() as reader:
        for number in range(first, len(file.batch_rows)):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            yield batch
