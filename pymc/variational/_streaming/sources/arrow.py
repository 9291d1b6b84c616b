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
"""Rows from Arrow readers, and from Arrow IPC (Feather) files.

A row-major file, which :func:`preshuffle` writes with ``format="arrow"``, has a column for each
NumPy dtype: lists of fixed size, each with the values of one row.  The metadata of its schema hold
the schema of the table, whose categories are codes of the levels in the summary; those of each
record batch hold a checksum, since the format has none.
"""

import json
import os

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.arrays import IterableSource, as_source, is_table
from pymc.variational._streaming.sources.base import Source, is_arrow, value_type
from pymc.variational._streaming.sources.parquet.files import (
    as_stream_error,
    pa,
    watch,
)
from pymc.variational._streaming.sources.parquet.mark import (
    PreshuffleMark,
    check_marks,
    parse_mark,
)
from pymc.variational._streaming.sources.parquet.paths import is_path, list_ipc
from pymc.variational._streaming.sources.rows import FileSource, RowFormat, exact_limit
from pymc.variational._streaming.sources.summary import (
    Categories,
    Located,
    Summary,
    describe_levels,
    find_levels,
    given_columns,
    given_levels,
    is_text,
)
from pymc.variational._streaming.utils import crc_of_sums, digest, positive_int

__all__ = ["arrow_source", "checksum", "group_columns", "to_metadata", "with_columns"]

_ROWS_KEY, _SCHEMA_KEY, _CHECKSUM_KEY = b"pymc.rows", b"pymc.schema", b"pymc.checksum"
_TAIL = 1 << 16
"""Bytes at the end of a file: its footer, and the last rows."""
_UNREADABLE = (
    "not a readable Arrow IPC file; a stream without footer goes through a function that opens it"
)


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
    columns, levels = given_columns(columns), given_levels(categories)
    size = None if n_rows is None else positive_int("n_rows", n_rows)
    if is_path(make_reader):
        paths = list_ipc(make_reader)
        source: FileSource
        with _reading(paths[0]) as reader:
            metadata = reader.schema.metadata or {}
        if _ROWS_KEY in metadata:
            source = _RowMajorSource(paths, columns, levels, partial)
        else:
            source = _IpcSource(paths, columns, levels)
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
        table = pa.table(rows)  # a reader gives its rows only once
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
        own, expected = source.levels.get(name), levels.get(name)
        if own != expected:
            raise ValueError(
                f"rows has {describe_levels(own)} of {name!r} where the stream has "
                f"{describe_levels(expected)}; pass categories=train.levels to the source of rows, "
                "where train is the source of the stream"
            )
        if {source.times.get(name), stream.times.get(name)} == {True, "UTC"}:
            has = "a" if stream.times[name] is True else "no"
            raise ValueError(
                f"rows has {has} time zone in {name!r}, unlike the stream; give it what the stream "
                "has, as by tz_localize of pandas"
            )
    return source if source.columns == columns else _Rearranged(source, columns)


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

    def locate(self, epoch: int, start: int, stop: int) -> str:
        return self._source.locate(epoch, start, stop)

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        for block in self._source.blocks(epoch, start, block_rows=block_rows):
            zeros = np.zeros((len(block), 1), block.dtype)
            yield np.concatenate([block, zeros], axis=1)[:, self._places]


@contextmanager
def _reading(path: str, fields: Sequence[int] = ()) -> Iterator[Any]:
    """Open an IPC file to read these fields, or all.

    The file is not mapped to memory: a map of a file that is truncated ends the process.
    """
    options = pa.ipc.IpcReadOptions(included_fields=list(fields), use_threads=False)
    with (
        as_stream_error(path, _UNREADABLE),
        pa.OSFile(path) as handle,
        pa.ipc.open_file(handle, options=options) as reader,
    ):
        yield reader


@dataclass
class _IpcFile:
    """One Arrow IPC file as it was when it was first opened."""

    path: str
    part_rows: Sequence[int]
    """Number of rows of each record batch."""
    fields: Sequence[int] = ()
    """Indices of the columns to read; none stand for all."""
    has_checksums: bool = False
    mark: PreshuffleMark | None = None

    def __post_init__(self) -> None:
        self.identity = self._identify()

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file, which must not change until it is closed."""
        with _reading(self.path, self.fields) as reader:
            if self._identify() != self.identity:
                raise StreamError(
                    f"{self.path}: changed since the source was made; make the source anew"
                )
            with watch(self.path, lambda: self._identify() == self.identity):
                yield reader

    def _identify(self) -> tuple[int, int | str]:
        """Return the size, and the time of the last change; with checksums, a digest of the end."""
        status = os.stat(self.path)
        if not self.has_checksums:
            return status.st_size, status.st_mtime_ns
        with open(self.path, "rb") as file:
            file.seek(max(0, status.st_size - _TAIL))
            return status.st_size, digest(file.read())


class _IpcSource(FileSource):
    concurrent = True

    def __init__(self, paths: Sequence[str], columns: Sequence[str] | None, levels: dict[str, Any]):
        frozen: RowFormat | None = None
        files = []
        for path in paths:
            with _reading(path) as reader:
                schema = reader.schema
            if frozen is None:
                frozen = RowFormat.from_schema(schema, columns, path, levels)
            frozen = frozen.widen(schema, path, whole=columns is None)
            fields = tuple(schema.get_field_index(name) for name in frozen.columns)
            # A record batch must be read to learn its number of rows; one column is enough.
            with _reading(path, fields[:1]) as reader:
                batches = map(reader.get_batch, range(reader.num_record_batches))
                files.append(_IpcFile(path, [batch.num_rows for batch in batches], fields))
        assert frozen is not None
        self._set_files(files)
        self._format = frozen.with_levels(find_levels(levels, self._read_columns, self.n_rows))
        self._format.describe(self)
        self.fingerprint = digest(self.columns, self.levels, [file.identity for file in files])

    def batches(self) -> Iterator[Located]:
        return self._read_columns(self.columns or ())

    def _read_columns(self, columns: Sequence[str]) -> Iterator[Located]:
        for file in self._files:
            for where, batch in _read_batches(file, range(len(file.part_rows))):
                yield where, batch.select(list(columns))

    def _read(
        self, file: _IpcFile, parts: Sequence[int], block_rows: int | None
    ) -> Iterator[np.ndarray]:
        for where, batch in _read_batches(file, parts):
            yield from self._format.pieces(batch, where)


def _read_batches(file: _IpcFile, numbers: Sequence[int]) -> Iterator[Located]:
    with file.open() as reader:
        for number in numbers:
            batch = reader.get_batch(number)
            batch.validate(full=True)
            yield f"{file.path}: record batch {number}", batch


class _RowMajorSource(FileSource):
    """Rows of files that :func:`preshuffle` wrote with ``format="arrow"``."""

    shuffled = concurrent = True

    def __init__(
        self,
        paths: Sequence[str],
        columns: Sequence[str] | None,
        levels: Mapping[str, Any],
        partial: bool,
    ):
        files = []
        for path in paths:
            with _reading(path) as reader:
                metadata = reader.schema.metadata or {}
                if _ROWS_KEY not in metadata:
                    raise StreamError(f"{path}: not shuffled with {paths[0]}; remove it")
                sizes = json.loads(metadata[_ROWS_KEY])
                n_rows, size = sizes["n_rows"], sizes["batch_rows"]
                rows = [min(size, n_rows - first) for first in range(0, n_rows, size)]
                mark = parse_mark(path, metadata)
            files.append(_IpcFile(path, rows, has_checksums=True, mark=mark))
            self.summary = self.summary or Summary.from_metadata(metadata, path)
        self.mark = check_marks(files, partial=partial)
        schema = pa.ipc.read_schema(pa.py_buffer(metadata[_SCHEMA_KEY]))
        self._set_files(files)
        self._format = self._choose(schema, columns, paths[0])
        self._format.describe(self)
        self.levels = self._kept_levels(levels, paths[0])
        self.fingerprint = digest(self.columns, [file.identity for file in files])

    def _kept_levels(self, given: Mapping[str, Any], where: str) -> dict[str, tuple[Any, ...]]:
        """Return the levels whose codes the files hold, which those that are given must be."""
        kept = {
            name: column.levels
            for name, column in self.summary.items()
            # Of a dictionary of numbers, the files hold the values.
            if column.levels and (column.min is None or column.type == "bool")
        }
        for name, levels in given.items():
            if name not in kept or (levels is not None and tuple(levels.to_pylist()) != kept[name]):
                raise ValueError(
                    f"{where}: column {name!r} was written with {describe_levels(kept.get(name))}; "
                    "leave other levels out of categories, or shuffle to Parquet"
                )
        return kept

    def _choose(self, schema: "pa.Schema", columns: Sequence[str] | None, where: str) -> RowFormat:
        """Find where the chosen columns are; categories are the codes of their levels."""
        groups = group_columns(schema)
        codes = groups.get("int32", [])
        numbers = pa.schema([f.with_type(pa.int32()) if f.name in codes else f for f in schema])
        frozen = RowFormat.from_schema(numbers, columns, where)
        self.summary = self.summary.select(frozen.columns)
        for name, integral in zip(frozen.columns, frozen.integral):
            column = self.summary[name]
            largest = max(abs(column.min or 0), abs(column.max or 0))
            if integral and largest > exact_limit(frozen.dtype):
                raise ValueError(
                    f"{where}: column {name!r} holds {largest}, which {frozen.dtype} cannot hold "
                    "exactly; pass columns=[...] without it"
                )
        self._groups = list(groups.values())
        self._moves = [
            (number, _places(names, chosen), _places(frozen.columns, chosen))
            for number, names in enumerate(self._groups)
            if (chosen := [name for name in frozen.columns if name in names])
        ]
        return frozen

    def _read(
        self, file: _IpcFile, parts: Sequence[int], block_rows: int | None
    ) -> Iterator[np.ndarray]:
        with file.open() as reader:
            for number in parts:
                yield self._rows(reader, number, file.path)

    def _rows(self, reader: Any, number: int, path: str) -> np.ndarray:
        """Read the rows of a record batch, which must be those that were written."""
        batch, found = reader.get_batch_with_custom_metadata(number)
        arrays = [
            column.flatten().to_numpy().reshape(batch.num_rows, len(names))
            for column, names in zip(batch.columns, self._groups)
        ]
        if checksum(arrays, number) != dict(found or {}):
            raise StreamError(
                f"{path}: record batch {number} is not what preshuffle wrote; shuffle the rows again"
            )
        if list(self._format.columns) == self._groups[0]:
            return arrays[0]
        rows = np.empty((batch.num_rows, len(self._format.columns)), self._format.dtype)
        for group, source, target in self._moves:
            rows[:, target] = arrays[group][:, source]
        return rows


def _places(names: Sequence[str], chosen: Sequence[str]) -> slice | list[int]:
    """Return the indices of the chosen names, as a slice where they follow each other."""
    found = [list(names).index(name) for name in chosen]
    whole = slice(found[0], found[0] + len(found))
    return whole if found == list(range(whole.start, whole.stop)) else found


def group_columns(schema: "pa.Schema") -> dict[str, list[str]]:
    """Return the columns of each dtype; a ValueError names one that holds no numbers or levels."""
    is_: Any = pa.types
    groups: dict[str, list[str]] = {}
    for field in schema:
        kind = value_type(field.type)
        if is_.is_integer(kind) or is_.is_floating(kind):
            dtype = np.dtype(kind.to_pandas_dtype()).name
        elif is_.is_boolean(kind):
            dtype = "uint8"
        elif is_text(kind):
            dtype = "int32"
        else:
            raise ValueError(
                f'column {field.name!r} has type {field.type}, which format="arrow" cannot hold; '
                "leave it out with columns=[...], or write it as numbers"
            )
        groups.setdefault(dtype, []).append(field.name)
    return groups


def to_metadata(schema: "pa.Schema", n_rows: int, batch_rows: int) -> dict[bytes, bytes]:
    """Return what the metadata of a row-major file say of its table."""
    sizes = json.dumps({"n_rows": n_rows, "batch_rows": batch_rows})
    return {_ROWS_KEY: sizes.encode(), _SCHEMA_KEY: schema.serialize().to_pybytes()}


def checksum(arrays: Sequence[np.ndarray], number: int) -> dict[bytes, bytes]:
    """Return the metadata of a record batch: a checksum that any flipped bit changes."""
    for array in arrays:
        number = crc_of_sums(array.reshape(-1).view(np.uint8), number)
    return {_CHECKSUM_KEY: b"%d" % number}
