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
"""How a shuffle on disk is cut into tasks that fit in memory.

The plan follows from the source, the seed and the memory limit alone, so that the result is the
same on any number of workers.
"""

import hashlib
import math
import os
import re

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pymc.variational._streaming.preshuffle.piles import MAX_PILES
from pymc.variational._streaming.preshuffle.plain import plain_schema, to_plain
from pymc.variational._streaming.sources.parquet.files import (
    ParquetInput,
    import_pyarrow,
    inspect,
    read_batches,
)
from pymc.variational._streaming.sources.parquet.mark import MARK_KEY
from pymc.variational._streaming.sources.parquet.paths import Paths, list_parquet
from pymc.variational._streaming.sources.rows import PIECE_ROWS

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs
    import pyarrow.parquet

__all__ = ["MOST_AT_ONCE", "Piece", "Plan", "Table", "make_plan", "open_table", "parse_bytes"]

MOST_AT_ONCE = 4
"""Tasks that may run in one process at once, and so share its memory limit."""
_COPIES = 6
"""A task's rows in memory: as read, joined, in their new order, and encoded."""
_PROCESS_OVERHEAD = 32 << 20
_TASK_OVERHEAD = 44 << 20
"""Bytes that do not grow with the rows: code, buffers, and what the allocator keeps."""
_PAGE_BYTES = 1 << 20
_PAGE_ROWS = 1 << 10
"""Writers end a page when it has so many bytes, but look only every so many rows."""
_SMALLEST_BLOCK = 1 << 20
_GOOD_BLOCK = 1 << 23
"""Bytes.  Fewer tasks at once are better than smaller ones."""
_LARGEST_BLOCK = 1 << 30
"""Bytes.  An Arrow string array holds less than twice as much."""
_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 1 << 16
_FEWEST_TASKS = 16
"""Tasks per pass for tables of more than a few megabytes, to keep many workers busy."""
_SMALL_TASK = 1 << 22
_ROW_GROUP_BYTES = 1 << 23
"""At most; and no more rows than a source reads at a time, so that it reads them at once."""
_FEWEST_FILES = 8
_FILE_BYTES = 1 << 26
"""About what a file holds, of rows in memory, where there are more files than the fewest: opening
one takes a reader longer than a row group."""
_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 256

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Piece = tuple[ParquetInput, tuple[int, ...]]
"""A file, and some of its row groups."""


@dataclass(frozen=True, slots=True)
class Table:
    """The files to shuffle, as they were found."""

    name: str
    """What the caller called them."""
    fs: "pyarrow.fs.FileSystem"
    paths: tuple[str, ...]
    files: tuple[ParquetInput, ...]
    schema: "pyarrow.Schema"
    """Of the chosen columns, with metadata."""
    columns: tuple[str, ...] | None
    widest: float
    """Bytes of a row, as encoded, in the row group where rows are widest."""
    page_bytes: int
    """Bytes of the pages that are in memory while a row group is read."""

    @property
    def n_rows(self) -> int:
        return sum(file.n_rows for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Digest of the sizes and footers of the files, wherever they are, and of the columns."""
        contents = [(file.size, file.digest) for file in self.files]
        return _digest(contents, self.schema.names)

    @property
    def identity(self) -> str:
        """Digest that changes also when a file is moved or touched."""
        return _digest(self.files, self.schema.names)


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks of a shuffle, and what they may hold in memory."""

    seed: int
    table: Table
    plain: "pyarrow.Schema"
    """The columns in types that can be taken apart by rows."""
    scatter: tuple[tuple[Piece, ...], ...]
    """What each task of the first pass reads."""
    n_piles: int
    piles_per_file: int
    at_once: int
    """Tasks in one process."""
    block_bytes: int
    """Rows that a task may hold, not counting copies."""
    batch_rows: int
    row_group_rows: int
    compression: str
    shuffle: str
    """Digest of all that the rows of the result, their order and their files depend on."""

    @property
    def n_files(self) -> int:
        return math.ceil(self.n_piles / self.piles_per_file)


def parse_bytes(value: int | str, name: str = "memory_limit") -> int:
    """Read a number of bytes, such as ``"512MB"``, ``"2 GiB"`` or 10**9."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0:
        return int(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?\s*", str(value).upper())
    if not isinstance(value, str) or not match or (match[3] and not match[2]):
        raise ValueError(f"{name}={value!r} is not a size; pass bytes or a string like '512MB'")
    return int(float(match[1]) * (_BINARY_UNITS if match[3] else _UNITS)[match[2]])


def open_table(
    source: Paths,
    columns: Sequence[str] | None,
    filesystem: Any,
) -> Table:
    """Find the files of *source*, and check that their columns agree."""
    fs, paths = list_parquet(source, filesystem)
    files, schema, widest, pages = [], None, 1.0, 0
    for path in paths:
        known, metadata = inspect(fs, path)
        found = _choose(metadata.schema.to_arrow_schema(), columns, path)
        _refuse_int96(metadata.schema, found.names, path)
        schema = found if schema is None else _merge(schema, found, path, paths[0])
        files.append(known)
        for group in range(metadata.num_row_groups):
            row, page = _measure_group(metadata.row_group(group), set(found.names))
            widest, pages = max(widest, row), max(pages, page)
    assert schema is not None
    if columns is None:
        _refuse_partitions(paths, schema.names)
    names = None if columns is None else tuple(columns)
    # A page is held as stored and as decoded; remote reads are buffered by about as much.
    pages *= 2 if isinstance(fs, import_pyarrow().fs.LocalFileSystem) else 3
    return Table(_name(source), fs, tuple(paths), tuple(files), schema, names, widest, pages)


def make_plan(
    table: Table, *, seed: int, memory_limit: int, compression: str, row_group_size: int | None
) -> Plan:
    """Cut the shuffle of *table* into tasks."""
    if not table.n_rows:
        raise ValueError(f"source={table.paths[0]!r} holds no rows; there is nothing to shuffle")
    plain = plain_schema(table.schema)
    row_bytes = _measure_rows(table, plain)
    widest = max(table.widest, row_bytes)
    at_once, block = _share(memory_limit, table, widest)
    total = table.n_rows * row_bytes
    n_tasks = min(_FEWEST_TASKS, math.ceil(total / _SMALL_TASK))
    n_piles = min(max(n_tasks, math.ceil(1.2 * total / block)), MAX_PILES)
    batch_rows = max(1, min(_BATCH_ROWS, int(min(_BATCH_BYTES, block / 4) / widest)))
    default = min(int(min(_ROW_GROUP_BYTES, block) / row_bytes), PIECE_ROWS)
    group_rows = row_group_size or max(1, default)
    per_file = max(1, n_piles // max(_FEWEST_FILES, math.ceil(total / _FILE_BYTES)))
    chosen = (n_piles, per_file, block, batch_rows, group_rows, compression)
    return Plan(
        seed=seed,
        table=table,
        plain=plain,
        scatter=tuple(_cut(table.files, row_bytes, min(block, total / n_tasks))),
        n_piles=n_piles,
        piles_per_file=per_file,
        at_once=at_once,
        block_bytes=block,
        batch_rows=batch_rows,
        row_group_rows=group_rows,
        compression=compression,
        shuffle=_digest(table.fingerprint, seed, n_tasks, *chosen),
    )


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


def _merge(
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
    """Return the bytes of a row as encoded, and of the pages that reading holds at once."""
    rows = max(group.num_rows, 1)
    chunks = [group.column(i) for i in range(group.num_columns)]
    sizes = [
        chunk.total_uncompressed_size
        for chunk in chunks
        if not columns.isdisjoint((chunk.path_in_schema, chunk.path_in_schema.partition(".")[0]))
    ]
    pages = [min(size, max(_PAGE_BYTES, _PAGE_ROWS * size // rows)) for size in sizes]
    return sum(sizes) / rows, sum(pages)


def _measure_rows(table: Table, plain: "pyarrow.Schema") -> float:
    """Return the bytes of a row in memory, exactly for fixed widths, else from a sample."""
    try:
        bits = sum(field.type.bit_width + field.nullable for field in plain)
        return max(bits / 8, 1.0)
    except ValueError:
        rows = size = 0
        for batch in _sample(table):
            rows += batch.num_rows
            size += to_plain(batch, plain).nbytes
        return max(size / rows, 1.0)


def _sample(table: Table) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the first rows of some row groups spread over the table."""
    groups = [
        (file, group) for file in table.files for group, rows in enumerate(file.group_rows) if rows
    ]
    for number in range(min(_SAMPLED_GROUPS, len(groups))):
        file, group = groups[number * len(groups) // min(_SAMPLED_GROUPS, len(groups))]
        for _, batch in read_batches(
            table.fs,
            file,
            columns=table.columns,
            row_groups=[group],
            batch_rows=max(1, min(_SAMPLED_ROWS, int(_BATCH_BYTES / table.widest))),
        ):
            yield batch
            break


def _share(limit: int, table: Table, widest: float) -> tuple[int, int]:
    """Return how many tasks may run at once, and how many bytes of rows each may hold."""
    room = limit - _PROCESS_OVERHEAD
    overhead = _TASK_OVERHEAD + table.page_bytes
    smallest = max(_SMALLEST_BLOCK, math.ceil(4 * widest))
    at_once = MOST_AT_ONCE
    while at_once > 1 and room // at_once < overhead + _COPIES * max(smallest, _GOOD_BLOCK):
        at_once //= 2
    block = (room // at_once - overhead) // _COPIES
    if block < smallest:
        enough = math.ceil((_PROCESS_OVERHEAD + overhead + _COPIES * smallest) / 10**6)
        raise ValueError(
            f"memory_limit={limit} is too small for {len(table.schema)} columns in rows of up to "
            f"{math.ceil(widest)} bytes, and {table.page_bytes} bytes for pages; "
            f"pass at least memory_limit='{enough}MB'"
        )
    return at_once, min(block, _LARGEST_BLOCK)


def _cut(
    files: Sequence[ParquetInput], row_bytes: float, task_bytes: float
) -> Iterator[tuple[Piece, ...]]:
    """Cut the row groups of all files into runs of about *task_bytes*."""
    run: list[tuple[ParquetInput, list[int]]] = []
    size = 0.0
    for file in files:
        for group, rows in enumerate(file.group_rows):
            if not run or run[-1][0] is not file:
                run.append((file, []))
            run[-1][1].append(group)
            size += rows * row_bytes
            if size >= task_bytes:
                yield tuple((file, tuple(groups)) for file, groups in run)
                run, size = [], 0.0
    if run:
        yield tuple((file, tuple(groups)) for file, groups in run)


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
