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
"""The Parquet files to shuffle: their columns, and how wide their rows are."""

import os

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.preshuffle.types import to_plain
from pymc.variational._streaming.sources.parquet.files import (
    ParquetInput,
    import_pyarrow,
    inspect,
    is_local,
)
from pymc.variational._streaming.sources.parquet.mark import MARK_KEY
from pymc.variational._streaming.sources.parquet.parquet import read_batches
from pymc.variational._streaming.sources.parquet.paths import Paths, list_parquet

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs
    import pyarrow.parquet

__all__ = ["Table", "is_unchanged", "measure_rows", "open_table"]

_PAGE_BYTES = 1 << 20
_PAGE_ROWS = 1 << 10
"""Writers end a page when it has so many bytes, but count them only every so many rows."""
_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 256
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Table:
    """The files to shuffle, as they were found."""

    name: str
    """What the caller called them."""
    fs: "pyarrow.fs.FileSystem"
    files: tuple[ParquetInput, ...]
    schema: "pyarrow.Schema"
    """Schema of the chosen columns, with metadata."""
    columns: tuple[str, ...] | None
    row_bytes: float
    """Bytes of an encoded row, in the row group where rows are widest."""
    page_bytes: int
    """Bytes of the pages that are in memory while a row group is read."""

    @property
    def n_rows(self) -> int:
        return sum(file.n_rows for file in self.files)


def open_table(source: Paths, columns: Sequence[str] | None, filesystem: Any) -> Table:
    """Find the files of *source*, and check that they have the same columns."""
    fs, paths = list_parquet(source, filesystem)
    files, schema, row_bytes, page_bytes = [], None, 1.0, 0
    for path in paths:
        file, metadata = inspect(fs, path)
        found = _choose(metadata.schema.to_arrow_schema(), columns, path)
        _refuse_int96(metadata.schema, found.names, path)
        schema = found if schema is None else _unify(schema, found, path, paths[0])
        files.append(file)
        for group in range(metadata.num_row_groups):
            row, pages = _measure_group(metadata.row_group(group), set(found.names))
            row_bytes, page_bytes = max(row_bytes, row), max(page_bytes, pages)
    assert schema is not None
    if columns is None:
        _refuse_partitions(paths, schema.names)
    return Table(
        name=_name(source),
        fs=fs,
        files=tuple(files),
        schema=schema,
        columns=None if columns is None else tuple(columns),
        row_bytes=row_bytes,
        # A page is held as stored and as decoded; remote reads are buffered by about as much.
        page_bytes=page_bytes * (2 if is_local(fs) else 3),
    )


def is_unchanged(table: Table, source: Paths, filesystem: Any) -> bool:
    """Return whether *source* still is what was found, by a look at each file."""
    fs, paths = list_parquet(source, filesystem)
    if paths != [file.path for file in table.files]:
        return False
    if not is_local(fs):  # where the time of the last modification may be unknown
        return all(inspect(fs, file.path)[0] == file for file in table.files)
    pairs = zip(fs.get_file_info(paths), table.files)
    return all((info.size, info.mtime_ns) == (file.size, file.mtime_ns) for info, file in pairs)


def measure_rows(table: Table, plain: "pyarrow.Schema") -> float:
    """Return the bytes of a row in memory, exactly for fixed widths, else from a sample."""
    try:
        bits = sum(field.type.bit_width + field.nullable for field in plain)
        return max(bits / 8, 1.0)
    except ValueError:
        sample = [to_plain(batch, plain) for batch in _sample(table)]
        rows = sum(batch.num_rows for batch in sample)
        return max(sum(batch.nbytes for batch in sample) / rows, 1.0)


def _name(source: Paths) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"{os.fspath(source[0])} and {len(source) - 1} more" if source[1:] else _name(source[0])


def _choose(schema: "pyarrow.Schema", columns: Sequence[str] | None, path: str) -> "pyarrow.Schema":
    names = schema.names if columns is None else list(columns)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: columns={names} must be at least one, and distinct")
    for name in names:
        if name not in schema.names:
            raise ValueError(f"{path}: has no column {name!r}, only {schema.names}")
        if schema.names.count(name) > 1:
            raise ValueError(f"{path}: has more than one column {name!r}")
    metadata = {k: v for k, v in (schema.metadata or {}).items() if k != MARK_KEY}
    return import_pyarrow().schema([_widen(schema.field(name)) for name in names], metadata)


def _widen(field: "pyarrow.Field") -> "pyarrow.Field":
    """Let a dictionary column count also the values that other files add to it."""
    pa = import_pyarrow()
    kind = field.type
    if not pa.types.is_dictionary(kind) or kind.index_type.bit_width >= 32:
        return field
    return field.with_type(pa.dictionary(pa.int32(), kind.value_type, kind.ordered))


def _refuse_int96(schema: "pyarrow.parquet.ParquetSchema", columns: list[str], path: str) -> None:
    """Refuse timestamps that are read as nanoseconds, which end in 2262, and wrap around."""
    for column in map(schema.column, range(len(schema))):
        name = column.path if column.path in columns else column.path.partition(".")[0]
        if name in columns and column.physical_type == "INT96":
            raise ValueError(
                f"{path}: column {name!r} holds INT96 timestamps, which would be changed outside "
                "of 1677..2262; rewrite it as timestamp[us] first, or pass columns=[...] to leave "
                "it out"
            )


def _refuse_partitions(paths: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse to lose columns that only the names of folders hold, such as ``day=1``."""
    folders = [set(path.split("/")[:-1]) for path in paths]
    differ = folders[0].union(*folders) - folders[0].intersection(*folders)
    lost = sorted({part.partition("=")[0] for part in differ if "=" in part}.difference(columns))
    if lost:
        raise ValueError(
            f"{paths[0]}: the values of {lost} are only in the names of folders, and would be "
            "lost; write them into the files, or pass columns=[...] to leave them out"
        )


def _unify(
    schema: "pyarrow.Schema", found: "pyarrow.Schema", path: str, first: str
) -> "pyarrow.Schema":
    """Return *schema*, nullable where either is; its metadata are those of the first file."""
    pa = import_pyarrow()
    if schema.names != found.names:
        raise ValueError(
            f"{path}: has columns {found.names} where {first} has {schema.names}; "
            "pass columns=[...] to choose those that all files have"
        )
    try:
        return pa.unify_schemas([schema, found])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
        raise ValueError(f"{path}: its columns differ from those of {first} ({err})") from None


def _measure_group(group: Any, columns: set[str]) -> tuple[float, int]:
    """Return the bytes of an encoded row, and of the pages that reading holds at once."""
    rows = max(group.num_rows, 1)
    chunks = [group.column(i) for i in range(group.num_columns)]
    sizes = [
        chunk.total_uncompressed_size
        for chunk in chunks
        if not columns.isdisjoint((chunk.path_in_schema, chunk.path_in_schema.partition(".")[0]))
    ]
    pages = [min(size, max(_PAGE_BYTES, _PAGE_ROWS * size // rows)) for size in sizes]
    return sum(sizes) / rows, sum(pages)


def _sample(table: Table) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the first rows of some row groups spread over the table."""
    groups = [(file, g) for file in table.files for g, rows in enumerate(file.group_rows) if rows]
    n_rows = max(1, min(_SAMPLED_ROWS, int(_SAMPLED_BYTES / table.row_bytes)))
    for file, group in groups[:: -(-len(groups) // _SAMPLED_GROUPS)]:
        batches = read_batches(
            table.fs, file, columns=table.columns, row_groups=[group], batch_rows=n_rows
        )
        yield next(iter(batches))[1]
