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
"""What is shuffled on disk, and how it is cut into tasks that fit in memory.

The plan follows from the source, the seed and the memory limit alone, so that the result is the
same on any number of workers.
"""

import math
import os
import re

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.preshuffle.types import plain_schema, to_plain
from pymc.variational._streaming.sources.parquet.files import (
    ParquetInput,
    import_pyarrow,
    inspect,
    is_local,
)
from pymc.variational._streaming.sources.parquet.mark import MARK_KEY, PreshuffleMark
from pymc.variational._streaming.sources.parquet.parquet import read_batches
from pymc.variational._streaming.sources.parquet.paths import Paths, list_parquet
from pymc.variational._streaming.sources.rows import PIECE_ROWS
from pymc.variational._streaming.utils import digest

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

__all__ = [
    "MAX_AT_ONCE",
    "MAX_PARTITIONS",
    "Piece",
    "Plan",
    "cut_files",
    "is_unchanged",
    "make_plan",
    "parse_bytes",
    "read_piece",
]

MAX_AT_ONCE = 4
"""Tasks that may run in one process at once, and so share its memory limit."""
MAX_PARTITIONS = 1 << 12
"""Partitions of one scatter; a message of fewer rows would cost more than its rows."""
_COPIES = 6
"""A task's rows in memory: as read, joined, in their new order, and encoded."""
_PROCESS_OVERHEAD = 32 << 20
_TASK_OVERHEAD = 44 << 20
"""Bytes that do not grow with the rows: code, buffers, and what the allocator keeps."""
_SMALLEST_BLOCK = 1 << 20
_GOOD_BLOCK = 1 << 23
"""Bytes.  Fewer tasks at once are better than smaller ones."""
_LARGEST_BLOCK = 1 << 30
"""Bytes.  An Arrow string array holds less than twice as much."""
_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 1 << 16
_FEWEST_TASKS = 16
"""Tasks per pass for tables of more than a few megabytes, to keep many workers busy."""
_FEWEST_FILES = 8
_SMALL_TASK = 1 << 22
_LARGE_TASK = 1 << 26
"""Bytes of rows that a scatter task reads, or a file of the result holds, where there are many;
opening a file takes longer than reading a row group."""
_ROW_GROUP_BYTES = 1 << 23
"""Largest row group; nor has it more rows than a source reads at a time."""
_PAGE_BYTES = 1 << 20
_PAGE_ROWS = 1 << 10
"""Writers end a page when it has so many bytes, but count them only every so many rows."""
_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 256

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Piece = tuple[ParquetInput, tuple[int, ...]]
"""A file, and some of its row groups."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all tasks of a shuffle share."""

    fs: "pyarrow.fs.FileSystem"
    """Filesystem of the source."""
    schema: "pyarrow.Schema"
    """Schema of the chosen columns, with metadata."""
    plain: "pyarrow.Schema"
    """The columns in types that can be taken apart by rows."""
    task_rows: int
    """Rows that a task of the first pass reads, or some more."""
    n_partitions: int
    partitions_per_file: int
    at_once: int
    """Tasks in one process."""
    block_bytes: int
    """Rows that a task may hold, not counting copies."""
    batch_rows: int
    row_group_rows: int
    compression: str
    mark: PreshuffleMark
    """Mark of the first file, with seed, source and number of rows."""


def parse_bytes(value: int | str) -> int:
    """Read a number of bytes, such as ``"512MB"``, ``"2 GiB"`` or 10**9."""
    pattern = r"\s*(\d+(?:\.\d*)?)\s*(?:([KMGT]?)B?|([KMGT])IB?)\s*"
    match = re.fullmatch(pattern, str(value).upper())
    if not match:
        raise ValueError(
            f"memory_limit={value!r} is not a size; pass bytes or a string like '512MB'"
        )
    return int(float(match[1]) * (_BINARY_UNITS[match[3]] if match[3] else _UNITS[match[2]]))


def make_plan(
    source: Paths,
    columns: Sequence[str] | None,
    filesystem: Any,
    *,
    seed: int,
    memory_limit: int,
    compression: str,
    row_group_size: int | None,
) -> tuple[Plan, list[ParquetInput]]:
    """Find the files of *source*, and choose how many rows a task holds."""
    fs, paths = list_parquet(source, filesystem)
    files, schema, row_bytes, page_bytes = _open_files(fs, paths, columns)
    if columns is None:
        _refuse_partitions(paths, schema.names)
    n_rows, name = sum(file.n_rows for file in files), _name(source)
    if not n_rows:
        raise ValueError(f"source={name!r} holds no rows; there is nothing to shuffle")
    plain = plain_schema(schema)
    sampled = _sample(fs, files, schema.names, max(1, int(_BATCH_BYTES / row_bytes)))
    in_memory = max(
        1.0, sum(to_plain(b, plain).nbytes / b.num_rows for b in sampled) / len(sampled)
    )
    widest = max(row_bytes, in_memory)
    at_once, block = _share(memory_limit, len(schema), widest, page_bytes)
    total = n_rows * in_memory
    n_tasks = min(_FEWEST_TASKS, math.ceil(total / _SMALL_TASK))
    # Partitions are of random sizes; with some space, few of them are larger than a block.
    n_partitions = min(max(n_tasks, math.ceil(1.2 * total / block)), MAX_PARTITIONS)
    per_file = max(1, n_partitions // max(_FEWEST_FILES, math.ceil(total / _LARGE_TASK)))
    group_rows = max(1, min(int(min(_ROW_GROUP_BYTES, block) / in_memory), PIECE_ROWS))
    # The contents identify the source, wherever its files are.
    fingerprint = digest([(file.size, file.digest) for file in files], schema.names)
    mark = PreshuffleMark(
        shuffle=digest(fingerprint, seed, memory_limit, compression, row_group_size),
        seed=seed,
        source=name,
        fingerprint=fingerprint,
        n_rows=n_rows,
        n_files=math.ceil(n_partitions / per_file),
        index=0,
    )
    plan = Plan(
        fs=fs,
        schema=schema,
        plain=plain,
        task_rows=max(1, int(min(_LARGE_TASK, total / n_tasks) / in_memory)),
        n_partitions=n_partitions,
        partitions_per_file=per_file,
        at_once=at_once,
        block_bytes=block,
        batch_rows=max(1, min(_BATCH_ROWS, int(min(_BATCH_BYTES, block / 4) / widest))),
        row_group_rows=row_group_size or group_rows,
        compression=compression,
        mark=mark,
    )
    return plan, files


def is_unchanged(
    fs: "pyarrow.fs.FileSystem", files: list[ParquetInput], source: Paths, filesystem: Any
) -> bool:
    """Return whether *source* still is what was found, by a look at each file."""
    paths = list_parquet(source, filesystem)[1]
    if paths != [file.path for file in files]:
        return False
    if not is_local(fs):  # where the time of the last modification may be unknown
        return all(inspect(fs, file.path)[0] == file for file in files)
    pairs = zip(fs.get_file_info(paths), files)
    return all((info.size, info.mtime_ns) == (file.size, file.mtime_ns) for info, file in pairs)


def cut_files(files: list[ParquetInput], task_rows: int) -> Iterator[tuple[Piece, ...]]:
    """Cut the row groups of all files into runs of about *task_rows*, one for each task."""
    run: list[Piece] = []
    n_rows = 0
    for file in files:
        first = 0
        for group, rows in enumerate(file.group_rows, start=1):
            n_rows += rows
            if n_rows >= task_rows or group == len(file.group_rows):
                run.append((file, tuple(range(first, group))))
                first = group
            if n_rows >= task_rows:
                yield tuple(run)
                run, n_rows = [], 0
    if run:
        yield tuple(run)


def read_piece(
    fs: "pyarrow.fs.FileSystem", piece: Piece, columns: Sequence[str], batch_rows: int
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield batches of the row groups of a piece, in bounded memory."""
    file, groups = piece
    for _, batch in read_batches(
        fs, file, columns=columns, row_groups=groups, batch_rows=batch_rows
    ):
        yield batch


def _share(limit: int, n_columns: int, widest: float, page_bytes: int) -> tuple[int, int]:
    """Return how many tasks may run at once, and how many bytes of rows each may hold."""
    available = limit - _PROCESS_OVERHEAD
    overhead = _TASK_OVERHEAD + page_bytes
    smallest = max(_SMALLEST_BLOCK, math.ceil(4 * widest))
    at_once = MAX_AT_ONCE
    while at_once > 1 and available // at_once < overhead + _COPIES * max(smallest, _GOOD_BLOCK):
        at_once -= 1
    block = (available // at_once - overhead) // _COPIES
    if block < smallest:
        enough = math.ceil((_PROCESS_OVERHEAD + overhead + _COPIES * smallest) / 10**6)
        raise ValueError(
            f"memory_limit={limit} is too small for {n_columns} columns in rows of up to "
            f"{math.ceil(widest)} bytes; pass at least memory_limit='{enough}MB'"
        )
    return at_once, min(block, _LARGEST_BLOCK)


def _open_files(
    fs: "pyarrow.fs.FileSystem", paths: list[str], columns: Sequence[str] | None
) -> tuple[list[ParquetInput], "pyarrow.Schema", float, int]:
    """Return the files, their common schema, and how large their rows and pages are.

    The sizes are bytes of an encoded row, where rows are widest, and of the pages that are in
    memory while a row group is read.
    """
    files, schema, row_bytes, page_bytes = [], None, 1.0, 0
    for path in paths:
        file, metadata = inspect(fs, path)
        found = _choose(metadata, columns, path)
        schema = found if schema is None else _unify(schema, found, path, paths[0])
        files.append(file)
        for group in range(metadata.num_row_groups):
            row, pages = _measure_group(metadata.row_group(group), set(found.names))
            row_bytes, page_bytes = max(row_bytes, row), max(page_bytes, pages)
    # A page is held as stored and as decoded; remote reads are buffered by about as much.
    return files, schema, row_bytes, page_bytes * (2 if is_local(fs) else 3)


def _sample(
    fs: "pyarrow.fs.FileSystem", files: list[ParquetInput], columns: list[str], n_rows: int
) -> list["pyarrow.RecordBatch"]:
    """Return the first rows of some row groups."""
    pieces = [(file, (g,)) for file in files for g, rows in enumerate(file.group_rows) if rows]
    chosen = pieces[:: math.ceil(len(pieces) / _SAMPLED_GROUPS)]
    return [next(read_piece(fs, piece, columns, min(n_rows, _SAMPLED_ROWS))) for piece in chosen]


def _measure_group(group: Any, columns: Collection[str]) -> tuple[float, int]:
    """Return the bytes of an encoded row, and of the pages that reading holds at once."""
    rows = max(group.num_rows, 1)
    chunks = [group.column(i) for i in range(group.num_columns)]
    sizes = [
        chunk.total_uncompressed_size
        for chunk in chunks
        if _is_chosen(chunk.path_in_schema, columns)
    ]
    pages = [min(size, max(_PAGE_BYTES, _PAGE_ROWS * size // rows)) for size in sizes]
    return sum(sizes) / rows, sum(pages)


def _is_chosen(leaf: str, columns: Collection[str]) -> bool:
    """Return whether a leaf of a Parquet schema is one of *columns*, or inside one of them."""
    return leaf in columns or leaf.partition(".")[0] in columns


def _name(source: Paths) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"{os.fspath(source[0])} and {len(source) - 1} more" if source[1:] else _name(source[0])


def _choose(metadata: Any, columns: Sequence[str] | None, path: str) -> "pyarrow.Schema":
    """Return the schema of the chosen columns of a file, without the mark of another shuffle."""
    pa = import_pyarrow()
    schema = metadata.schema.to_arrow_schema()
    names = schema.names if columns is None else list(columns)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: columns={names} must be at least one, and distinct")
    for name in names:
        if schema.names.count(name) != 1:
            problem = "more than one" if name in schema.names else "no"
            raise ValueError(f"{path}: has {problem} column {name!r}; it has {schema.names}")
    for leaf in map(metadata.schema.column, range(metadata.num_columns)):
        # Arrow reads them as nanoseconds, which end in 2262, and would wrap around.
        if leaf.physical_type == "INT96" and _is_chosen(leaf.path, names):
            raise ValueError(
                f"{path}: column {leaf.path!r} holds INT96 timestamps; rewrite it as "
                "timestamp[us], or pass columns=[...] to leave it out"
            )
    kept = {k: v for k, v in (schema.metadata or {}).items() if k != MARK_KEY}
    return pa.schema([_widen(schema.field(name)) for name in names], kept)


def _widen(field: "pyarrow.Field") -> "pyarrow.Field":
    """Let a dictionary column count also the values that other files add to it."""
    pa = import_pyarrow()
    kind = field.type
    if not pa.types.is_dictionary(kind) or kind.index_type.bit_width >= 32:
        return field
    return field.with_type(pa.dictionary(pa.int32(), kind.value_type, kind.ordered))


def _refuse_partitions(paths: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse to lose columns that only the names of folders hold, such as ``day=1``."""
    folders = [{part for part in path.split("/")[:-1] if "=" in part} for path in paths]
    differ = folders[0].union(*folders) - folders[0].intersection(*folders)
    lost = sorted({part.partition("=")[0] for part in differ}.difference(columns))
    if lost:
        raise ValueError(
            f"{paths[0]}: the values of {lost} are only in the names of folders; "
            "write them into the files, or pass columns=[...] to leave them out"
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
