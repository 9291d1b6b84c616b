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
import re

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pymc.variational._streaming.preshuffle.table import Table, measure_rows
from pymc.variational._streaming.preshuffle.types import plain_schema
from pymc.variational._streaming.sources.parquet.files import ParquetInput
from pymc.variational._streaming.sources.parquet.mark import PreshuffleMark
from pymc.variational._streaming.sources.rows import PIECE_ROWS

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

__all__ = [
    "MAX_AT_ONCE",
    "MAX_PARTITIONS",
    "Piece",
    "Plan",
    "cut_table",
    "make_plan",
    "parse_bytes",
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

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Piece = tuple[ParquetInput, tuple[int, ...]]
"""A file, and some of its row groups."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all tasks of a shuffle share."""

    fs: "pyarrow.fs.FileSystem"
    """Filesystem of the source."""
    columns: tuple[str, ...] | None
    schema: "pyarrow.Schema"
    plain: "pyarrow.Schema"
    """The columns in types that can be taken apart by rows."""
    seed: int
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
    """Mark of the first file."""


def parse_bytes(value: int | str, name: str = "memory_limit") -> int:
    """Read a number of bytes, such as ``"512MB"``, ``"2 GiB"`` or 10**9."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0:
        return int(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?\s*", str(value).upper())
    if not isinstance(value, str) or not match or (match[3] and not match[2]):
        raise ValueError(f"{name}={value!r} is not a size; pass bytes or a string like '512MB'")
    return int(float(match[1]) * (_BINARY_UNITS if match[3] else _UNITS)[match[2]])


def make_plan(
    table: Table, *, seed: int, memory_limit: int, compression: str, row_group_size: int | None
) -> Plan:
    """Choose how many partitions there are, and how many rows a task holds."""
    if not table.n_rows:
        raise ValueError(f"source={table.name!r} holds no rows; there is nothing to shuffle")
    plain = plain_schema(table.schema)
    row_bytes = measure_rows(table, plain)
    widest = max(table.row_bytes, row_bytes)
    at_once, block = _share(memory_limit, table, widest)
    total = table.n_rows * row_bytes
    n_tasks = min(_FEWEST_TASKS, math.ceil(total / _SMALL_TASK))
    # Partitions are of random sizes; with some space, few of them are larger than a block.
    n_partitions = min(max(n_tasks, math.ceil(1.2 * total / block)), MAX_PARTITIONS)
    n_files = max(_FEWEST_FILES, math.ceil(total / _LARGE_TASK))
    group_rows = max(1, min(int(min(_ROW_GROUP_BYTES, block) / row_bytes), PIECE_ROWS))
    chosen: dict[str, Any] = {
        "task_rows": max(1, int(min(_LARGE_TASK, total / n_tasks) / row_bytes)),
        "n_partitions": n_partitions,
        "partitions_per_file": max(1, n_partitions // n_files),
        "block_bytes": block,
        "batch_rows": max(1, min(_BATCH_ROWS, int(min(_BATCH_BYTES, block / 4) / widest))),
        "row_group_rows": row_group_size or group_rows,
        "compression": compression,
    }
    return Plan(
        fs=table.fs,
        columns=table.columns,
        schema=table.schema,
        plain=plain,
        seed=seed,
        at_once=at_once,
        mark=_mark(table, seed, chosen),
        **chosen,
    )


def cut_table(table: Table, task_rows: int) -> Iterator[tuple[Piece, ...]]:
    """Cut the row groups of all files into runs of about *task_rows*, one for each task."""
    run: list[tuple[ParquetInput, list[int]]] = []
    n_rows = 0
    for file in table.files:
        for group, rows in enumerate(file.group_rows):
            if not run or run[-1][0] is not file:
                run.append((file, []))
            run[-1][1].append(group)
            n_rows += rows
            if n_rows >= task_rows:
                yield tuple((file, tuple(groups)) for file, groups in run)
                run, n_rows = [], 0
    if run:
        yield tuple((file, tuple(groups)) for file, groups in run)


def _share(limit: int, table: Table, widest: float) -> tuple[int, int]:
    """Return how many tasks may run at once, and how many bytes of rows each may hold."""
    available = limit - _PROCESS_OVERHEAD
    overhead = _TASK_OVERHEAD + table.page_bytes
    smallest = max(_SMALLEST_BLOCK, math.ceil(4 * widest))
    at_once = MAX_AT_ONCE
    while at_once > 1 and available // at_once < overhead + _COPIES * max(smallest, _GOOD_BLOCK):
        at_once //= 2
    block = (available // at_once - overhead) // _COPIES
    if block < smallest:
        enough = math.ceil((_PROCESS_OVERHEAD + overhead + _COPIES * smallest) / 10**6)
        raise ValueError(
            f"memory_limit={limit} is too small for {len(table.schema)} columns in rows of up to "
            f"{math.ceil(widest)} bytes, and {table.page_bytes} bytes for pages; "
            f"pass at least memory_limit='{enough}MB'"
        )
    return at_once, min(block, _LARGEST_BLOCK)


def _mark(table: Table, seed: int, chosen: dict[str, Any]) -> PreshuffleMark:
    # The contents identify the source, wherever its files are.
    contents = [(file.size, file.digest) for file in table.files]
    fingerprint = _digest(contents, table.schema.names)
    return PreshuffleMark(
        shuffle=_digest(fingerprint, seed, chosen),
        seed=seed,
        source=table.name,
        fingerprint=fingerprint,
        n_rows=table.n_rows,
        n_files=math.ceil(chosen["n_partitions"] / chosen["partitions_per_file"]),
        index=0,
    )


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
