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
"""Arrow IPC files, and those whose record batches hold rows side by side.

A row-major file has a column for each NumPy dtype: lists of fixed size, each with the values of
one row.  The metadata of its schema hold the schema of the table, whose categories are codes of
the levels in the summary; those of each record batch hold a checksum, since the format has none.
"""

import json
import os
import zlib

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import Source, skip_rows
from pymc.variational._streaming.sources.parquet.files import import_pyarrow, watch
from pymc.variational._streaming.sources.parquet.mark import check_marks, parse_mark
from pymc.variational._streaming.sources.rows import RowFormat, exact_limit
from pymc.variational._streaming.sources.summary import Summary, is_dictionary, is_text
from pymc.variational._streaming.utils import digest

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "ROWS_KEY",
    "IpcFile",
    "RecordBatchSource",
    "RowMajorSource",
    "checksum",
    "group_columns",
    "reading",
    "to_metadata",
]

ROWS_KEY, _SCHEMA_KEY, _CHECKSUM_KEY = b"pymc.rows", b"pymc.schema", b"pymc.checksum"
_TAIL = 1 << 16
"""Bytes at the end of a file: its footer, and the last rows."""
_WORDS = 512
"""Words of 8 bytes that are added up before their sums get a CRC, which is ten times as slow."""


def group_columns(schema: "pyarrow.Schema") -> dict[str, list[str]]:
    """Return the columns of each dtype; a ValueError names one that holds no numbers or levels."""
    is_: Any = import_pyarrow().types
    groups: dict[str, list[str]] = {}
    for field in schema:
        kind = field.type
        if is_.is_integer(kind) or is_.is_floating(kind):
            dtype = np.dtype(kind.to_pandas_dtype()).name
        elif is_.is_boolean(kind):
            dtype = "uint8"
        elif is_dictionary(kind) or is_text(kind):
            dtype = "int32"
        else:
            raise ValueError(
                f'column {field.name!r} has type {kind}, which format="arrow" cannot hold; '
                "leave it out with columns=[...], or write it as numbers"
            )
        groups.setdefault(dtype, []).append(field.name)
    return groups


def to_metadata(schema: "pyarrow.Schema", n_rows: int, batch_rows: int) -> dict[bytes, bytes]:
    """Return what the metadata of a row-major file say of its table."""
    sizes = json.dumps({"n_rows": n_rows, "batch_rows": batch_rows})
    return {ROWS_KEY: sizes.encode(), _SCHEMA_KEY: schema.serialize().to_pybytes()}


def checksum(arrays: Sequence[np.ndarray], number: int) -> dict[bytes, bytes]:
    """Return the metadata of a record batch: a checksum that any flipped bit changes."""
    for array in arrays:
        data = array.reshape(-1).view(np.uint8)
        whole = len(data) - len(data) % (8 * _WORDS)
        sums = data[:whole].view(np.uint64).reshape(-1, _WORDS).sum(axis=1)
        number = zlib.crc32(data[whole:], zlib.crc32(sums, number))
    return {_CHECKSUM_KEY: b"%d" % number}


@contextmanager
def reading(path: str, fields: Sequence[int] = ()) -> Iterator[Any]:
    """Open an IPC file to read these fields, or all.

    The file is not mapped to memory: a map of a file that is truncated ends the process.
    """
    pa = import_pyarrow()
    options = pa.ipc.IpcReadOptions(included_fields=list(fields), use_threads=False)
    try:
        with pa.OSFile(path) as handle, pa.ipc.open_file(handle, options=options) as reader:
            yield reader
    except (OSError, UnicodeDecodeError, pa.ArrowException) as err:
        raise StreamError(
            f"{path}: not a readable Arrow IPC file ({str(err).partition(chr(10))[0]}); "
            "a stream without footer goes through a function that opens it"
        ) from err


@dataclass
class IpcFile:
    """One Arrow IPC file as it was when it was first opened."""

    path: str
    batch_rows: Sequence[int]
    """Number of rows of each record batch."""
    fields: Sequence[int] = ()
    """Indices of the columns to read; none stand for all."""
    has_checksums: bool = False

    def __post_init__(self) -> None:
        self.identity = self._identify()

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file, which must not change until it is closed."""
        with reading(self.path, self.fields) as reader:
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


class RecordBatchSource(Source):
    """Rows of IPC files, which are read from the first row of a record batch on."""

    concurrent = True

    def _set_files(self, files: Sequence[IpcFile]) -> None:
        rows = [n for file in files for n in file.batch_rows]
        self._files, self.n_rows = files, sum(rows)
        self._starts = np.cumsum([0, *rows])
        """First row of each record batch, and the number of all rows."""

    @abstractmethod
    def _read(self, file: IpcFile, first: int) -> Iterator[np.ndarray]:
        """Read the rows of a file from its record batch *first* on."""

    def read_starts(self, rows: np.ndarray) -> np.ndarray:
        return self._starts[np.searchsorted(self._starts, rows, side="right") - 1]

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        return skip_rows(self._read_from(first), start - int(self._starts[first]))

    def _read_from(self, first: int) -> Iterator[np.ndarray]:
        """Read on from the record batch *first*, counted over all files."""
        for file in self._files:
            if first < len(file.batch_rows):
                yield from self._read(file, max(first, 0))
            first -= len(file.batch_rows)


class RowMajorSource(RecordBatchSource):
    """Rows of files that :func:`preshuffle` wrote with ``format="arrow"``."""

    shuffled = True

    def __init__(
        self,
        paths: Sequence[str],
        columns: Sequence[str] | None,
        levels: Mapping[str, Any],
        partial: bool,
    ):
        pa, marks, files = import_pyarrow(), {}, []
        for path in paths:
            with reading(path) as reader:
                metadata = reader.schema.metadata or {}
                if ROWS_KEY not in metadata:
                    raise StreamError(f"{path}: not shuffled with {paths[0]}; remove it")
                sizes = json.loads(metadata[ROWS_KEY])
                n_rows, size = sizes["n_rows"], sizes["batch_rows"]
                rows = [min(size, n_rows - first) for first in range(0, n_rows, size)]
                files.append(IpcFile(path, rows, has_checksums=True))
            marks[path] = parse_mark(path, metadata)
            self.summary = self.summary or Summary.from_metadata(metadata, path)
        self._set_files(files)
        self.mark = check_marks(marks, partial=partial)
        self._choose(pa.ipc.read_schema(pa.py_buffer(metadata[_SCHEMA_KEY])), columns, paths[0])
        self.levels = self._kept_levels(levels, paths[0])
        self.fingerprint = digest(self.columns, [file.identity for file in files])

    def _kept_levels(self, given: Mapping[str, Any], where: str) -> dict[str, tuple[Any, ...]]:
        """Return the levels whose codes the files hold, which those that are given must be."""
        kept = {name: column.levels for name, column in self.summary.items() if column.levels}
        for name, levels in given.items():
            if name not in kept or (levels is not None and tuple(levels.to_pylist()) != kept[name]):
                raise ValueError(
                    f"{where}: column {name!r} holds codes of the levels {kept.get(name)}; "
                    "leave other levels out of categories, or shuffle to Parquet"
                )
        return kept

    def _choose(self, schema: "pyarrow.Schema", columns: Sequence[str] | None, where: str) -> None:
        """Find where the chosen columns are; categories are the codes of their levels."""
        pa = import_pyarrow()
        groups = group_columns(schema)
        codes = groups.get("int32", [])
        numbers = pa.schema([f.with_type(pa.int32()) if f.name in codes else f for f in schema])
        frozen = RowFormat.from_schema(numbers, columns, where)
        self.columns, self.integral, self._dtype = frozen.columns, frozen.integral, frozen.dtype
        self._width = len(frozen.columns)
        self.sample_shape = (self._width,)
        self.summary = self.summary.select(self.columns)
        for name, integral in zip(self.columns, self.integral):
            column = self.summary[name]
            largest = max(abs(column.min or 0), abs(column.max or 0))
            if integral and largest > exact_limit(self._dtype):
                raise ValueError(
                    f"{where}: column {name!r} holds {largest}, which {self._dtype} cannot hold "
                    "exactly; pass columns=[...] without it"
                )
        self._groups = list(groups.values())
        self._moves = [
            (number, _places(names, chosen), _places(self.columns, chosen))
            for number, names in enumerate(self._groups)
            if (chosen := [name for name in self.columns if name in names])
        ]

    def _read(self, file: IpcFile, first: int) -> Iterator[np.ndarray]:
        with file.open() as reader:
            for number in range(first, len(file.batch_rows)):
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
        if len(self._groups) == 1 and self._moves[0][1:] == (slice(0, len(self._groups[0])),) * 2:
            return arrays[0]
        rows = np.empty((batch.num_rows, self._width), self._dtype)
        for group, source, target in self._moves:
            rows[:, target] = arrays[group][:, source]
        return rows


def _places(names: Sequence[str], chosen: Sequence[str]) -> slice | list[int]:
    """Return the indices of the chosen names, as a slice where they follow each other."""
    found = [list(names).index(name) for name in chosen]
    whole = slice(found[0], found[0] + len(found))
    return whole if found == list(range(whole.start, whole.stop)) else found
